# Each target's line after ## is its description: `make` shows them.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PY := .venv/bin/python
RUNS ?= runs/table5
export RUNS
# One thread a test worker; idle OpenMP threads that spin would slow the other worker down.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(PY) -m pytest -n 2

.PHONY: help setup demo test test-slow check table5 report bench clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## make .venv with all packages (PYTHON=, ACCELERATOR=cpu|gpu, TORCH_INDEX_URL= override)
	@scripts/setup.sh

demo: setup ## Table 5 at pocket scale, one seed, on this CPU: runs, table, picture (about 10 minutes)
	@SCALE=pocket SEEDS=0 recipes/table5_soft_or.sh

table5: $(if $(DRY_RUN),,setup) ## Table 5 (SCALE=paper|pocket, PAIRS=, CELLS=, SEEDS=, RUNS=, DRY_RUN=1)
	@recipes/table5_soft_or.sh

report: setup ## read the run folders under RUNS again: table and picture
	@$(PY) scripts/report.py $(RUNS) --table table5 --out $(RUNS)/report

test: setup ## all tests but the slow ones
	@$(PYTEST) -m "not slow and not gpu and not vllm"

test-slow: setup ## the tests that take minutes each
	@$(PYTEST) -m slow

check: setup ## lint, format, types and the fast tests, under 90 seconds
	@$(PY) -m ruff check --quiet .
	@$(PY) -m ruff format --check --quiet . || { echo 'run: $(PY) -m ruff format .' >&2; exit 1; }
	@.venv/bin/basedpyright --level error
	@$(PYTEST) -m "not slow and not gpu and not vllm and not e2e"

bench: setup ## time and memory of the loss core
	@$(PY) scripts/bench_loss.py

clean: ## remove caches and builds; run folders and .venv stay
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
