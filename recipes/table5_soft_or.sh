#!/usr/bin/env bash
# Table 5, the main result: all tokens against entropy sampling and Soft-OR, at 50 % and 20 % of the tokens.
#
# The paper (Qwen3-8B → Qwen3-4B, MATH-500, mean@16): all tokens 76.7 ± 0.7, Soft-OR 50 % 79.1 ± 0.8, entropy 50 % 78.6 ± 0.6;
# all its numbers: assets/paper/tables.csv.
# Hardware: 8×H200 a pair (4 for qwen25); hours not known: this scale has not been run. SCALE=pocket: 2 CPU cores.
# Try it:      SCALE=pocket SEEDS=0 recipes/table5_soft_or.sh
# Look first:  DRY_RUN=1 recipes/table5_soft_or.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# The paper's "entropy" is sampling in proportion to entropy. Min and max of Soft-OR are taken over the batch (its word).
cell all
cell entropy_sample 0.5
cell entropy_sample 0.2
cell soft_or 0.5 --select.normalise_over batch
cell soft_or 0.2 --select.normalise_over batch

run_table table5 "$@"
