#!/usr/bin/env bash
# Table 8 of version 4: ranking by divergence alone, at 50 and 10 %, against Q3 at 10 % and all tokens.
#
# The paper (Qwen3-8B → Qwen3-4B, MATH-500, mean@16): all tokens 76.7 ± 0.7, divergence 50 % 76.3 ± 0.8, 10 % 74.3 ± 0.8,
# Q3 10 % 76.1 ± 0.9; all its numbers: assets/paper/tables.csv.
# Hardware: 8×H200; hours not known: this scale has not been run. SCALE=pocket: 2 CPU cores.
# Try it:      SCALE=pocket SEEDS=0 recipes/table8_divergence_only.sh
# Look first:  DRY_RUN=1 recipes/table8_divergence_only.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

cell all
cell divergence 0.5
cell divergence 0.1
cell q3 0.1 --select.normalise_over batch

run_table table8_divergence_only "$@"
