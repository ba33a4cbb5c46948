# Everything runs in .venv, which the first target that needs it makes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ARGS ?=

.PHONY: help train test test-fast check docs bench bench-head gpu-check lock clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:[^#]*## /\t/' | expand -t 12

$(READY): pyproject.toml requirements.lock
	@echo "setting up $(VENV) (once, one to a few minutes)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $(READY)

train: $(READY)  ## run the main job; settings in ARGS="loss.beta=5 ..."
	$(BIN)/python -m simpo.train $(ARGS)

test: check  ## linters, types and all tests
	$(BIN)/python -m pytest

test-fast: $(READY)  ## the tests that take seconds
	$(BIN)/python -m pytest -m "not slow"

check: $(READY)  ## linters and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)  ## write docs/config.md anew from the dataclasses
	$(BIN)/python docs/build_config_docs.py

bench: $(READY)  ## a step against the padded one, TRL's and Liger's: time, memory, picture
	$(BIN)/python -m pip install --quiet --constraint requirements.lock --editable ".[bench]"
	$(BIN)/python benchmarks/bench.py $(ARGS)

bench-head: $(READY)  ## the vocabulary alone: ours against Liger and cut-cross-entropy
	$(BIN)/python -m pip install --quiet --constraint requirements.lock --editable ".[bench]"
	$(BIN)/python benchmarks/head.py $(ARGS)

gpu-check: $(READY)  ## on a CUDA GPU: backends, kernels against float64, then speed and memory
	$(BIN)/python benchmarks/gpu_backends.py
	$(BIN)/python benchmarks/gpu_check.py $(ARGS)

lock:  ## write requirements.lock anew from what pyproject.toml admits today
	rm -rf $(VENV)-lock
	$(PYTHON) -m venv $(VENV)-lock
	# torch first and alone: a range would fetch the newest build with its CUDA packages.
	$(VENV)-lock/bin/python -m pip install --quiet torch==2.13.0
	$(VENV)-lock/bin/python -m pip install --quiet ".[dev]"
	$(VENV)-lock/bin/python -m pip freeze --exclude simpo | sed 's/^torch==.*/torch==2.13.0/' > requirements.lock
	rm -rf $(VENV)-lock

clean:  ## remove what the other targets made
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache
