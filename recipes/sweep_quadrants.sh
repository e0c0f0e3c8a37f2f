#!/usr/bin/env bash
# Does the ranking of quadrants hold under other divergences? Rules that favour different quadrants, at 20 % of the tokens,
# each trained by reverse KL (the paper's), forward KL and JSD, against all tokens. Question (a) of docs/questions.md.
#
# The paper's numbers: assets/paper/tables.csv.
# Hardware: 8×H200 a pair (4 for qwen25); hours not known: this scale has not been run. SCALE=pocket: 2 CPU cores, 15 cells.
# Try it:      SCALE=pocket SEEDS=0 STEPS=20 RUNS=runs/try recipes/sweep_quadrants.sh
# Look first:  DRY_RUN=1 recipes/sweep_quadrants.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
unset OPD_LOSS_TYPE # cells name their own

# Without the flag a cell has reverse KL, and is the same command as in the other tables.
# shellcheck disable=SC2086  # flags are words
for flags in "" "--loss.divergence forward_kl" "--loss.divergence jsd"; do
    cell all $flags
    cell entropy 0.2 $flags
    for rule in soft_or soft_or_bottom q3; do
        cell $rule 0.2 --select.normalise_over batch $flags
    done
done

run_table sweep_quadrants "$@"
