#!/usr/bin/env bash
# Accuracy against retention: five rules at 70, 50, 30, 20, 10 and 5 % of the tokens, and all of them. The paper's Figure 3
# has points at 50, 20 and 10 % of some of these.
#
# The paper's numbers: assets/paper/tables.csv.
# Hardware: 8×H200 a pair (4 for qwen25); hours not known: this scale has not been run. SCALE=pocket: 2 CPU cores, 31 cells.
# Try it:      SCALE=pocket SEEDS=0 STEPS=20 RUNS=runs/try recipes/sweep_retention.sh
# Look first:  DRY_RUN=1 recipes/sweep_retention.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

cell all
for retention in 0.7 0.5 0.3 0.2 0.1 0.05; do
    cell entropy_sample $retention
    cell soft_or $retention --select.normalise_over batch
    cell q3 $retention --select.normalise_over batch
    cell divergence $retention
    cell random $retention
done

run_table sweep_retention "$@"
