# Commands that matter: `make landscape`, `make reproduce`, `make test`. All set up what they need in .venv and may be repeated.
VENV ?= .venv
PYTHON := $(VENV)/bin/python
export PATH := $(abspath $(VENV))/bin:$(PATH)

# A stage's name may have a `*`, which is for the study and not for the shell.
STAGES ?=
STUDY ?=

.PHONY: help setup landscape reproduce study smollm2 smollm2-study lora-study check test lint figures benchmarks clean
.DEFAULT_GOAL := help

help:  ## show this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /  make \1\t/'

setup:  ## create .venv with everything, a CPU build of vLLM included
	@bash scripts/setup.sh $(VENV)

landscape: setup  ## measure a real landscape on this machine and draw it
	$(PYTHON) -m rlvr_landscape_plugin.sweep @ configs/sweep/quickstart.toml
	$(PYTHON) -m rlvr_landscape_analysis outputs/quickstart

reproduce: setup  ## the study at a reduced size: train, measure what lies around the snapshots, write a page (15 minutes)
	$(PYTHON) scripts/study.py --reduced

smollm2: setup  ## download SmolLM2-135M-Instruct (89 MB) and make a snapshot of it in models/
	$(VENV)/bin/python -m pip --disable-pip-version-check --quiet install "gguf>=0.17"
	$(PYTHON) scripts/get_smollm2.py

study: setup  ## the laptop study in stages, about 7 hours in all; STAGES="train-* page" for some, STUDY="--short" for toy size
	set -f; $(PYTHON) scripts/study.py $(STUDY) $(STAGES)

lora-study: setup  ## train an adapter, and measure inside and outside the subspace in which it can move; STAGES and STUDY as for `make study`
	set -f; $(PYTHON) scripts/lora_study.py $(STUDY) $(STAGES)

smollm2-study: setup  ## SmolLM2 learns word problems, and what lies around it, in stages; STAGES and STUDY as for `make study`
	$(VENV)/bin/python -m pip --disable-pip-version-check --quiet install "gguf>=0.17"
	set -f; $(PYTHON) scripts/smollm2_study.py $(STUDY) $(STAGES)

figures: setup  ## draw the figures of outputs/quickstart again
	$(PYTHON) -m rlvr_landscape_analysis outputs/quickstart

lint: setup  ## ruff and pyright
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

check: lint  ## the fast loop: lint, types and every test that needs no server
	$(PYTHON) -m pytest -n 2 -m "not server and not slow and not nightly"

test: lint  ## lint, then every test that this machine can run
	$(PYTHON) -m pytest -n 2 -m "not server and not slow and not nightly"
	$(PYTHON) -m pytest -m "(server or slow) and not nightly"

benchmarks: setup  ## the benchmarks whose numbers docs/benchmarks.md quotes
	$(PYTHON) benchmarks/rollouts.py
	$(PYTHON) benchmarks/moves.py
	$(PYTHON) benchmarks/analysis.py
	$(PYTHON) benchmarks/harness.py
	$(PYTHON) benchmarks/common_random_numbers.py
	$(PYTHON) benchmarks/coupling_shares.py
	$(PYTHON) benchmarks/scaling.py
	$(PYTHON) benchmarks/seeds.py
	$(PYTHON) benchmarks/progressive.py --replay-only

clean:  ## remove outputs, keep the environment
	rm -rf outputs
