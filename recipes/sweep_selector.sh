#!/usr/bin/env bash
# Every rule that `opsd selectors` lists, the paper's and their rivals, at 50 and at 20 % of the tokens, against all tokens.
#
# The paper's numbers: assets/paper/tables.csv.
# Hardware: 8×H200 a pair (4 for qwen25); hours not known: this scale has not been run. SCALE=pocket: 2 CPU cores, 22 cells.
# Try it:      SCALE=pocket SEEDS=0 STEPS=20 RUNS=runs/try recipes/sweep_selector.sh
# Look first:  DRY_RUN=1 recipes/sweep_selector.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

cell all
for retention in 0.5 0.2; do
    for rule in soft_or soft_or_bottom q3; do
        cell $rule $retention --select.normalise_over batch
    done
    for rule in entropy_sample entropy divergence random adaptive_kl first_fraction position_weighted; do
        cell $rule $retention
    done
done
cell verify 1.0 # keeps what the teacher accepts, whatever that share is

run_table sweep_selector "$@"
