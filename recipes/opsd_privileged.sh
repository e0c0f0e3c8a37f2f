#!/usr/bin/env bash
# On-policy self-distillation: the teacher is the student itself (its initial or averaged weights) with a prompt that shows
# the answer; on all tokens and on half of them by Soft-OR. For comparison, the plain teacher.
#
# OPSD (arXiv 2601.18734) and SDFT (arXiv 2601.19897) do this at scale; results of the pocket runs: docs/teachers.md.
# At pocket scale the student is a model that can use an answer (scripts/pocket/reader.py), made first in a minute or two.
# Hardware: 8×H200 a pair (4 for qwen25); hours not known: this scale has not been run. SCALE=pocket: 2 CPU cores, 5 cells.
# Try it:      SCALE=pocket SEEDS=0 STEPS=20 RUNS=runs/try recipes/opsd_privileged.sh
# Look first:  DRY_RUN=1 recipes/opsd_privileged.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

PAPER_PAIRS=(qwen3 qwen25)             # one GPU holds these twice: the initial teacher is a bf16 copy
CONTEXT=recipes/contexts/answer.txt    # our wording
if [[ $SCALE == pocket ]]; then
    CONTEXT=recipes/contexts/pocket/answer.txt POCKET_STUDENT=${POCKET_STUDENT:-runs/pocket_reader}
    prepare() { [[ -d $POCKET_STUDENT ]] || python scripts/pocket/reader.py --out "$POCKET_STUDENT"; }
fi

cell all
cell all --teacher self --teacher.context $CONTEXT
cell all --teacher self --teacher.context $CONTEXT --teacher.weights ema # 0.99 per step: our choice
cell soft_or 0.5 --select.normalise_over batch
cell soft_or 0.5 --select.normalise_over batch --teacher self --teacher.context $CONTEXT

run_table opsd_privileged "$@"
