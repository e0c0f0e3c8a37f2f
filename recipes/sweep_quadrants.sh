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
unset OPD_LOSS_TYPE # each cell names its own

for divergence in reverse_kl forward_kl jsd; do
    cell all --loss.divergence $divergence
    cell entropy 0.2 --loss.divergence $divergence
    for rule in soft_or soft_or_bottom q3; do
        cell $rule 0.2 --select.normalise_over batch --loss.divergence $divergence
    done
done

run_table sweep_quadrants "$@"
