#!/usr/bin/env bash
# Several teachers: each prompt's record names the one that scores it (column `domain`: math or code at paper scale).
#
# NeMo-RL and verl route teachers the same way. MATH_TEACHER and CODE_TEACHER are model folders with the student's
# vocabulary; DATA_DIR/dapo_train.jsonl has the column. They stay in host memory, and only one at a time is on the GPU.
# At pocket scale both are the pocket teacher, chosen by the first sign of a sum: the result is that of one teacher.
# Hardware: 8×H200 a pair (4 for qwen25); hours not known: this scale has not been run. SCALE=pocket: 2 CPU cores, 1 cell.
# Try it:      SCALE=pocket SEEDS=0 STEPS=20 RUNS=runs/try recipes/multi_teacher.sh
# Look first:  DRY_RUN=1 recipes/multi_teacher.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

PAPER_PAIRS=(qwen3 qwen25)
TEACHERS="math=${MATH_TEACHER:-\$MATH_TEACHER} code=${CODE_TEACHER:-\$CODE_TEACHER}"
if [[ $SCALE == pocket ]]; then
    RUNS=${RUNS:-runs/multi_teacher} TEACHERS="plus=assets/pocket/teacher minus=assets/pocket/teacher"
    POCKET_PROMPTS=$RUNS-prompts.jsonl
    prepare() {
        mkdir -p "$(dirname "$RUNS")"
        # The first sign follows the first term: two digits, or a product of two factors.
        sed -E 's/("prompt": "(..|.\*.)\+.*)}$/\1, "domain": "plus"}/; s/("prompt": "(..|.\*.)-.*)}$/\1, "domain": "minus"}/' \
            assets/pocket/train.jsonl >"$POCKET_PROMPTS"
    }
fi

cell all --teachers $TEACHERS --teacher.offload True --eval.teacher False

run_table multi_teacher "$@"
