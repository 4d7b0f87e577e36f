# One command each. The environment is made on first use and again when a requirement changes.
#
#   PYTHON   the interpreter to build on, 3.11 or newer           make demo PYTHON=python3.12
#   TORCH    what to install in place of the tested torch         make demo TORCH=torch==2.11.0
#            (a version, or the path of a wheel: another CUDA)    make demo TORCH=/path/to/torch.whl
#   VENV     where the environment goes                           make test VENV=/tmp/venv
#   TESTS    which tests, and any option of pytest                make test TESTS="tests/kernels -x"
#   JOBS     processes that share the tests, 8 at most; 0: none   make test JOBS=0 TESTS="--pdb -k rope"
#   BENCH    options of the benchmark                             make bench BENCH="--quick"
# `pip` reads its own settings (index, proxy, cache) from PIP_* variables and pip.conf, as always.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
TORCH ?=
TESTS ?=
JOBS ?= auto
BENCH ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PINS := $(VENV)/constraints.txt

.PHONY: help demo test check format bench clean
.DEFAULT_GOAL := help

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/demo.stamp  ## set up, then run examples/quickstart.py: a model before and after INT4
	$(BIN)/python examples/quickstart.py

test: $(VENV)/dev.stamp  ## set up, then run the tests
	$(BIN)/python -m pytest -n $(JOBS) --maxprocesses 8 --dist loadfile $(TESTS)

check: $(VENV)/dev.stamp  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/dev.stamp  ## sort imports and lay the code out
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .

bench: $(VENV)/demo.stamp  ## time fused against unfused operators
	$(BIN)/atom-compile bench $(BENCH)

clean:  ## remove the environment and everything built or cached
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(PINS): constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is $$($(PYTHON) --version 2>&1); this needs 3.11 or newer: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH),grep -vE '^(torch|triton)==' $<,cat $<) > $@

$(VENV)/demo.stamp: pyproject.toml $(PINS)
	@echo "Installing into $(VENV): a few minutes the first time"
	$(PIP) install -q -c $(PINS) setuptools $(TORCH)
	$(PIP) install -q -c $(PINS) --no-build-isolation -e .
	@touch $@

$(VENV)/dev.stamp: $(VENV)/demo.stamp
	$(PIP) install -q -c $(PINS) --no-build-isolation -e '.[dev]'
	@touch $@
