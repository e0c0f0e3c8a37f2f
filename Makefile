# The text after ## describes a target; `make` prints it.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PY := .venv/bin/python
TABLE ?= table5
RUNS ?= runs/$(TABLE)
FROM ?= runs
comma := ,
# Setup that a recipe needs: none to print its commands, the demo's at pocket scale, else all of it.
NEEDS := $(if $(DRY_RUN),,$(if $(filter pocket,$(SCALE)),setup-demo,setup))
# A test file runs on one worker, because its tests share what is slow to start; slow files come first. One thread per
# worker: spinning idle OpenMP threads would slow the other worker down. Tests start many processes, so bytecode is
# written: each module is compiled only once.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive PYTHONDONTWRITEBYTECODE= $(PY) -m pytest -n 2 --dist loadfile \
	--no-loadscope-reorder

.PHONY: help setup setup-demo demo test test-slow faults check table3 table4 table5 table6 table7 table8 \
	sweep-retention sweep-selector bench-selectors sweep-divergence sweep-quadrants sweep-normalise sweep-seeds figures grpo-teacher report bench gpu-check clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## make .venv with all packages (PYTHON=, ACCELERATOR=cpu|gpu, TORCH_INDEX_URL= override)
	@scripts/setup.sh

setup-demo: ## the same, with only the packages that make demo, pocket recipes and reports need
	@scripts/setup.sh demo

demo: setup-demo ## Table 5 at pocket scale, one seed, on this CPU: runs, table, figure (about 4 minutes on two cores with AVX-512)
	@SCALE=pocket SEEDS=0 recipes/table5_soft_or.sh

table3: $(NEEDS) ## entropy sampling (all tables: SCALE=paper|pocket, PAIRS=, CELLS=, SEEDS=, RUNS=, DRY_RUN=1)
	@recipes/table3_entropy_sampling.sh

table4: $(NEEDS) ## overconfident tokens only (Q3)
	@recipes/table4_q3.sh

table5: $(NEEDS) ## the main result: all tokens, entropy sampling, Soft-OR
	@recipes/table5_soft_or.sh

table6: $(NEEDS) ## the top half by Soft-OR against the bottom half
	@recipes/table6_top_vs_bottom.sh

table7: $(NEEDS) ## planning with tools
	@recipes/table7_agentic.sh

table8: $(NEEDS) ## adaptive KL (version 1 of the paper), then divergence alone (version 4)
	@recipes/table8_adaptive_kl.sh
	@recipes/table8_divergence_only.sh

sweep-retention: $(NEEDS) ## accuracy against retention, five rules (all sweeps: the tables' variables; Figure 3)
	@recipes/sweep_retention.sh

sweep-selector: $(NEEDS) ## every selection rule at 50 and 20 % (RETENTIONS=, RULES=)
	@recipes/sweep_selector.sh

bench-selectors: $(if $(DRY_RUN),,setup-demo) ## sweep-selector at 50, 20, 10 and 5 %, pocket scale, three seeds; RULES="every mypackage.mod:MyRule" adds one
	@SCALE=pocket SEEDS="$(or $(SEEDS),0 1 2)" RETENTIONS="$(or $(RETENTIONS),0.5 0.2 0.1 0.05)" recipes/sweep_selector.sh

sweep-divergence: $(NEEDS) ## reverse KL, forward KL and JSD, on all tokens and by Soft-OR
	@recipes/sweep_divergence.sh

sweep-quadrants: $(NEEDS) ## rules that favour different quadrants, under each divergence, at 20 %
	@recipes/sweep_quadrants.sh

sweep-normalise: $(NEEDS) ## the tokens over which Soft-OR takes min and max, and how it limits outliers
	@recipes/sweep_normalise.sh

sweep-seeds: $(NEEDS) ## Table 5 with seeds 0 to 4
	@recipes/sweep_seeds.sh

grpo-teacher: $(if $(DRY_RUN),,setup) ## the teacher of the pair qwen3: GRPO by TRL with our grader as the reward
	@recipes/grpo_teacher.sh

figures: $(if $(DRY_RUN),,setup-demo) ## Figures 1 to 4 from the run folders under runs/ (FROM=): a page and PNGs
	@$(if $(DRY_RUN),echo )$(PY) scripts/figures.py $(FROM) --out $(FROM)/figures

report: setup-demo ## make the report again from the run folders of TABLE= (a table or sweep_…) under RUNS=: table and figure (CELLS=: only these)
	@$(PY) scripts/report.py $(RUNS) --table $(TABLE) --out $(RUNS)/report $(if $(CELLS),--cells $(subst $(comma), ,$(CELLS)))

test: setup ## all tests except the slow ones
	@$(PYTEST) -m "not slow and not gpu"

test-slow: setup ## the slow tests, which take minutes each
	@$(PYTEST) -m slow

faults: setup ## the fault suite: kills, full disks, damaged files, hostile input; its table in docs/reliability.md (10 minutes)
	@$(PY) scripts/faults.py

check: setup ## lint, format, types and the fast tests, 90 seconds on two cores
	@$(PY) -m ruff check --quiet .
	@$(PY) -m ruff format --check --quiet . || { echo 'run: $(PY) -m ruff format .' >&2; exit 1; }
	@.venv/bin/pyrefly check --min-severity error --summary=none
	@$(PYTEST) -m "not slow and not gpu and not vllm and not e2e"

gpu-check: setup ## on a machine with one NVIDIA GPU: check results, accuracy and speed; writes docs/gpu.md (8 minutes)
	@$(PY) scripts/gpu_check.py --docs docs

bench: setup-demo ## time and memory of the loss core
	@$(PY) scripts/bench_loss.py

clean: ## remove caches and builds; run folders and .venv stay
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
