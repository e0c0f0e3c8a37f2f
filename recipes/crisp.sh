#!/usr/bin/env bash
# Iterative compression (CRISP, arXiv 2603.05433): the student learns to answer as if it had been told to be brief. The
# teacher is the student itself, prompted with that instruction and updated every 50 steps: no answers, no other model.
#
# The paper (Qwen3-8B and 14B, MATH-500): 57 to 59 % fewer tokens at 9 to 16 points more. Wording and interval are ours.
# The pocket model follows no instructions: there the context is the plain prompt, and a run only shows that it works.
# Hardware: 8×H200 a pair (4 for qwen25); hours not known: this scale has not been run. SCALE=pocket: 2 CPU cores, 1 cell.
# Try it:      SCALE=pocket SEEDS=0 STEPS=20 RUNS=runs/try recipes/crisp.sh
# Look first:  DRY_RUN=1 recipes/crisp.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

PAPER_PAIRS=(qwen3 qwen25)
CONTEXT=recipes/contexts/brief.txt
[[ $SCALE == paper ]] || CONTEXT=recipes/contexts/pocket/brief.txt

cell all --teacher self --teacher.context $CONTEXT --teacher.weights current --teacher.every 50

run_table crisp "$@"
