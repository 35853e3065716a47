"""Print the versions that pip resolves for this project today, as a constraints file.

In: a Python (the one that runs this), the extras to cover, more requirements, pins of what is installed without its
dependencies. Out, on stdout: `name==version` lines for everything that would be installed, transitively, without URLs.
Nothing is installed. `make constraints` calls it.
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import venv

PROJECT = pathlib.Path(__file__).resolve().parent.parent


def resolve(extras: str, also: list[str], alone: list[str]) -> list[str]:
    """`name==version`, sorted, of the project with `extras`, of `also`, and the pins in `alone` as they are."""
    with tempfile.TemporaryDirectory() as scratch:
        # A fresh environment, so that what happens to be installed here does not hide a requirement.
        venv.create(scratch, with_pip=True)
        report = pathlib.Path(scratch, "report.json")
        command = [f"{scratch}/bin/python", "-m", "pip", "install", "--quiet", "--ignore-installed"]
        command += ["--dry-run", "--report", str(report), f"{PROJECT}[{extras}]", *also]
        subprocess.run(command, check=True)
        found = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    # A local version (2.13.0+cpu) names a build that not every index has.
    pins = [f"{re.sub('[-_.]+', '-', m['name']).lower()}=={m['version'].split('+')[0]}" for m in found]
    return sorted([pin for pin in pins if not pin.startswith("jax-sft==")] + alone)


def main() -> None:
    """Read the arguments, print the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--extras", required=True)
    parser.add_argument(
        "--alone", action="append", default=[], help="name==version of a wheel taken without dependencies"
    )
    parser.add_argument("also", nargs="*")
    arguments = parser.parse_args()
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    print(f"# Python {python}, extras {arguments.extras}; made by `make constraints`, not by hand")
    print("\n".join(resolve(arguments.extras, arguments.also, arguments.alone)))


if __name__ == "__main__":
    main()
