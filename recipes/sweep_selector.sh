#!/usr/bin/env bash
# Every rule that `opsd selectors` lists, the paper's and their rivals, at 50 and at 20 % of the tokens, against all tokens; and
# what else has been proposed for all tokens: prompts weighed by their pass rate, forward KL where the teacher is unsure, forward
# KL first, answers written to a growing horizon. The report ranks them (leaderboard). `make bench-selectors` is this at 50, 20,
# 10 and 5 %, pocket scale, three seeds.
#
#   RETENTIONS   fractions of the tokens (default "0.5 0.2")
#   RULES        which rules (default every). every stands for all of ours, so RULES="every mypackage.mod:MyRule" adds one that
#                lies in this folder or is installed; cells that are finished are not run again
#
# The paper's numbers: assets/paper/tables.csv.
# Hardware: 8×H200 a pair (4 for qwen25); hours not known: this scale has not been run. SCALE=pocket: 2 CPU cores, 34 cells.
# Try it:      SCALE=pocket SEEDS=0 STEPS=20 RUNS=runs/try recipes/sweep_selector.sh
# Look first:  DRY_RUN=1 recipes/sweep_selector.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
unset OPD_LOSS_TYPE # some cells name their own

OURS="soft_or soft_or_bottom q3 teachability entropy_sample entropy divergence random adaptive_kl first_fraction"
OURS+=" position_weighted iw_opd rock_bypass verify"
rules=" $(tr , ' ' <<<"${RULES:-every}") "
every=${rules/ every / }
rules=${rules/ every / $OURS }

cell all
for retention in ${RETENTIONS:-0.5 0.2}; do
    for rule in $rules; do
        case $rule in
            soft_or | soft_or_bottom | q3 | teachability) cell "$rule" "$retention" --select.normalise_over batch ;;
            verify) ;; # keeps what the teacher accepts, whatever that share is
            *) cell "$rule" "$retention" ;;
        esac
    done
done
for rule in $rules; do
    case $rule in
        # As published: weights on all tokens, or all tokens but some.
        iw_opd | rock_bypass | verify) cell "$rule" 1.0 ;;
    esac
done
if [[ $every != "$rules" ]]; then
    cell all --loss.prompt_weights paced
    cell all --loss.divergence eopd
    # A tenth of the steps under forward KL; half of the steps until answers are whole: our readings.
    steps=1740
    [[ $SCALE != pocket ]] || steps=240
    steps=${STEPS:-$steps}
    cell all --loss.divergence forward_then_reverse --loss.warmup_steps $(((steps + 9) / 10))
    ((steps < 4)) || cell all --rollout.horizon 0.25 --rollout.horizon_steps $((steps / 2))
fi

run_table sweep_selector "$@"
