#!/usr/bin/env bash
# Where Soft-OR takes min and max: over the micro-batch, each rollout, the batch (the paper's word) or a running estimate, at
# 50 and at 20 % of the tokens; then ways to limit outliers of the divergence, over the batch.
#
# The paper takes the batch; its numbers: assets/paper/tables.csv.
# Hardware: 8×H200 a pair (4 for qwen25); hours not known: this scale has not been run. SCALE=pocket: 2 CPU cores, 13 cells.
# Try it:      SCALE=pocket SEEDS=0 STEPS=20 RUNS=runs/try recipes/sweep_normalise.sh
# Look first:  DRY_RUN=1 recipes/sweep_normalise.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

cell all
for retention in 0.5 0.2; do
    for scope in batch micro_batch rollout running; do
        cell soft_or $retention --select.normalise_over $scope
    done
    cell soft_or $retention --select.normalise_over batch --select.options divergence_clip_quantile 0.98
    cell soft_or $retention --select.normalise_over batch --select.options ranks true
done

run_table sweep_normalise "$@"
