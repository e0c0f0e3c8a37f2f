#!/usr/bin/env bash
# Every rule that `opsd selectors` lists, from the paper and from other work, at 50 and at 20 % of the tokens, against all
# tokens; and other methods that train on all tokens: prompts weighted by their pass rate, forward KL at tokens where the
# teacher is unsure, forward KL in the first steps, answers up to a growing horizon. The report ranks them (leaderboard).
# `make bench-selectors` runs this at 50, 20, 10 and 5 %, pocket scale, three seeds.
#
#   RETENTIONS   fractions of the tokens (default "0.5 0.2")
#   RULES        which rules (default every). every stands for all of ours, so RULES="every mypackage.mod:MyRule" adds a rule
#                that is in this folder or installed; finished cells are not run again
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
            verify) ;; # keeps the tokens that the teacher accepts, so it has no retention
            *) cell "$rule" "$retention" ;;
        esac
    done
done
for rule in $rules; do
    case $rule in
        # As published: weights on all tokens, or all tokens except those the rule drops.
        iw_opd | rock_bypass | verify) cell "$rule" 1.0 ;;
    esac
done
if [[ $every != "$rules" ]]; then
    cell all --loss.prompt_weights paced
    cell all --loss.divergence eopd
    # Forward KL for a tenth of the steps; a growing horizon for half of the steps: our choices.
    steps=1740
    [[ $SCALE != pocket ]] || steps=240
    steps=${STEPS:-$steps}
    cell all --loss.divergence forward_then_reverse --loss.warmup_steps $(((steps + 9) / 10))
    ((steps < 4)) || cell all --rollout.horizon 0.25 --rollout.horizon_steps $((steps / 2))
fi

run_table sweep_selector "$@"
