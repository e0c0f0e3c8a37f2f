#!/usr/bin/env bash
# Table 5 with seeds 0 to 4: how much runs vary that differ in their seed only. It shares Table 5's run folders, so
# existing seeds are not run again.
#
# Hardware: as recipes/table5_soft_or.sh, five times.
# Try it:      SCALE=pocket SEEDS="0 1" STEPS=20 RUNS=runs/try recipes/sweep_seeds.sh
# Look first:  DRY_RUN=1 recipes/sweep_seeds.sh
set -euo pipefail

SEEDS=${SEEDS:-0 1 2 3 4} exec "$(dirname "${BASH_SOURCE[0]}")/table5_soft_or.sh" "$@"
