# Everything here is a documented command with its set-up: each step prints what it runs.
#
#   PYTHON       the interpreter that makes .venv (3.10 or newer)
#   VENV         the environment's folder
#   PIP_ARGS     options for every pip install, e.g. PIP_ARGS="-c constraints.txt"
#   TORCH_INDEX  the index to take PyTorch alone from: on a machine without a GPU, that of PyTorch's CPU builds
#   ARGS         further arguments for pytest, e.g. make test ARGS="-k bucket"
#   JOBS         processes that make test and test-slow divide the tests among; 0: none beside their own, for a debugger

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
JOBS ?= 2
TORCH_INDEX ?=
ARGS ?=

COLOSSALAI := colossalai==0.5.0
TORCH := $(shell grep '^torch[<>=]' requirements.txt)

# A set-up is redone when what it was made from changes: the stamp's name holds a checksum of it.
checksum = $(shell { cat $(1); echo $(COLOSSALAI); } | cksum | cut -d ' ' -f 1)
RUNTIME_STAMP := $(VENV)/.installed-$(call checksum,requirements.txt pyproject.toml)
DEV_STAMP := $(VENV)/.installed-dev-$(call checksum,requirements-dev.txt requirements.txt pyproject.toml)

# Bytecode is compiled when a module is first imported: compiling all of it here takes a third of the installation.
PIP_INSTALL = python -m pip install --no-compile $(PIP_ARGS)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.SUFFIXES:
export PATH := $(abspath $(VENV))/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

heading = @printf '\n\033[1m== %s\033[0m\n' $(1)

.DEFAULT_GOAL := help
.PHONY: help
help:  ## what there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# ---- set-up --------------------------------------------------------------------------------------------------------

.PHONY: install install-dev
install: $(RUNTIME_STAMP)  ## make .venv and install what training and sampling need
install-dev: $(DEV_STAMP)  ## the same and what the tests and lint need

$(VENV)/bin/pip:
	$(call heading,"making the virtual environment $(VENV)")
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "Open-Sora needs Python 3.10 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

# ColossalAI comes last and without its own pins: they name an older PyTorch than it runs with (README, Installation).
$(RUNTIME_STAMP): | $(VENV)/bin/pip
	$(call heading,"installing (once; again when requirements.txt changes)")
ifneq ($(TORCH_INDEX),)
	$(PIP_INSTALL) --index-url $(TORCH_INDEX) "$(TORCH)"
endif
	$(PIP_INSTALL) -r requirements.txt
	$(PIP_INSTALL) --no-deps $(COLOSSALAI) -e .
	@rm -f $(VENV)/.installed-[0-9]*
	@touch $@

$(DEV_STAMP): $(RUNTIME_STAMP)
	$(call heading,"installing what the tests need")
	$(PIP_INSTALL) -r requirements-dev.txt
	@rm -f $(VENV)/.installed-dev-*
	@touch $@

# ---- the demo ------------------------------------------------------------------------------------------------------

# A file stands for each step, so a finished step is skipped and an interrupted one is done again; an interrupted
# training continues from its newest checkpoint. A finished training stays finished whatever changes: demo-clean.
RUN := outputs/shapes
SAMPLES := samples/shapes

.PHONY: demo demo-clean
demo: $(SAMPLES)/score.json  ## make a small dataset, train on it, sample, measure: clone to result
	$(call heading,"done. Look at")
	@printf '  %-38s %s\n' \
		$(SAMPLES)/contact_sheet.png "all samples at a glance" \
		$(SAMPLES)/ "the samples: mp4 files, and prompts.csv" \
		$(SAMPLES)/score.json "how many show what was asked for" \
		$(SAMPLES)/loss.png "the loss curve" \
		$(RUN)/log.txt "the training's log, and metrics.jsonl" \
		README.md "next: train on your own videos"
	@printf '\n'; cat $(SAMPLES)/score.json; printf '\n'

# made.json is what make_shapes.py writes last.
datasets/shapes/made.json: $(addprefix scripts/demo/,make_shapes.py render.py text_encoders.py) opensora/models/autoencoder/linear_causal.py | $(RUNTIME_STAMP)
	$(call heading,"1/5 the dataset: videos of moving shapes and small frozen encoders")
	python scripts/demo/make_shapes.py
	@touch $@

datasets/shapes_nec.csv: datasets/shapes/made.json
	$(call heading,"2/5 the table: sizes and lengths and frame rates of all files")
	python scripts/cnv/meta.py --input datasets/shapes.csv --output datasets/shapes_nec.csv --num_workers 0

# Two processes share a CPU, each with its half of the cores; on GPUs it is one process each.
$(RUN)/.trained: | datasets/shapes_nec.csv
	$(call heading,"3/5 training (Ctrl-C and then make demo again: it continues)")
	@processes=$$(python -c 'import torch; print(torch.cuda.device_count() or 2)'); \
	cores=$$(python -c 'import os; print(len(os.sched_getaffinity(0)))'); \
	resume=$$(python -c 'from opensora.checkpoint_folder import list_checkpoints as found; print("--load $(RUN)" if found("$(RUN)") else "")'); \
	threads=$$(( cores > processes ? cores / processes : 1 )); \
	export OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$threads}; \
	set -x; \
	torchrun --standalone --nproc_per_node $$processes scripts/diffusion/train.py configs/diffusion/train/shapes.py --dataset.data-path datasets/shapes_nec.csv --exp-name shapes $$resume
	@python -c 'import sys; from mmengine.config import Config; \
	from opensora.checkpoint_folder import list_checkpoints, parse_folder_name; \
	step = parse_folder_name(list_checkpoints("$(RUN)")[-1])[1]; \
	wanted = Config.fromfile("configs/diffusion/train/shapes.py").max_steps; \
	sys.exit(None if step >= wanted else f"stopped after {step} of {wanted} updates, as asked: make demo goes on")'
	@rm -rf $(SAMPLES)
	@touch $@

$(SAMPLES)/.sampled: $(RUN)/.trained
	$(call heading,"4/5 sampling: one video for each of the 48 prompts")
	torchrun --nproc_per_node 1 --standalone scripts/diffusion/inference.py configs/diffusion/inference/shapes.py --save-dir $(SAMPLES) --dataset.data-path datasets/shapes_prompts.csv --model.from_pretrained $(RUN)
	@touch $@

$(SAMPLES)/score.json: $(SAMPLES)/.sampled
	$(call heading,"5/5 the score: what the samples show by their pixels")
	python scripts/demo/score.py $(SAMPLES) --train-metrics $(RUN)/metrics.jsonl

demo-clean:  ## remove the demo's data, run and samples, to start it anew
	rm -rf datasets/shapes datasets/shapes*.csv ckpts/shapes $(RUN) $(SAMPLES)

# ---- tests ---------------------------------------------------------------------------------------------------------

.PHONY: test test-slow test-gpu chaos lint
# The tests of a file stay together: they share what is slow to make.
test: $(DEV_STAMP)  ## the default test suite, on the CPU
	$(call heading,"tests")
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} python -m pytest --numprocesses $(JOBS) --dist loadfile $(ARGS)

test-slow: $(DEV_STAMP)  ## the long tests
	$(call heading,"slow tests")
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} python -m pytest -m "slow and not gpu" --ignore tests/chaos --numprocesses $(JOBS) --dist loadfile $(ARGS)

chaos: $(DEV_STAMP)  ## a run that is killed 30 times ends as one that nobody disturbed; outputs/chaos.json
	$(call heading,"chaos")
	python -m pytest -m slow -s tests/chaos $(ARGS)

test-gpu: $(DEV_STAMP)  ## the tests that need a CUDA device
	$(call heading,"GPU tests")
	@python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "make test-gpu needs a CUDA device: PyTorch sees none here")'
	python -m pytest -m gpu $(ARGS)

lint: $(DEV_STAMP)  ## ruff, and the direction of imports
	$(call heading,"lint")
	ruff check .
	ruff format --check .
	python -m pytest -q tests/test_layers.py

# ---- tidy ----------------------------------------------------------------------------------------------------------

.PHONY: clean
clean:  ## remove the environment and caches; data, weights, runs and samples stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find opensora scripts tests benchmarks configs -name __pycache__ -type d -prune -exec rm -rf {} +
