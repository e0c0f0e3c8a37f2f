#!/usr/bin/env bash
# The teacher of the pair qwen3: Qwen3-8B after GRPO, by TRL's trainer with this project's grader as the reward.
#
# The paper says no more about it; values without a source next to them are our choice. The other pairs' teachers are
# published models. SCALE=pocket trains the pocket student instead: 100 steps take it from 17.5 ± 1.7 to 27.7 ± 1.8 %
# (mean@16 on 256 sums, seed 0, ± over problems), measured with
#   opsd eval --model runs/grpo_teacher/pocket-grpo/model --suite pocket=assets/pocket/eval.jsonl --samples 16 \
#       --out grpo.json --prompt_format raw --grader suffix --max_new_tokens 40 --generate_batch 1024
# Hardware: 8×H200; hours not known: this scale has not been run. SCALE=pocket: 2 CPU cores, a few minutes.
# Try it:      SCALE=pocket STEPS=20 RUNS=runs/try recipes/grpo_teacher.sh
# Look first:  DRY_RUN=1 recipes/grpo_teacher.sh
#
# SCALE=paper reads QWEN3_TEACHER_BASE (Qwen3-8B), DATA_DIR, NUM_GPUS, STEPS, LEARNING_RATE, ROLLOUT_N, TRAIN_BATCH_SIZE,
# MAX_PROMPT_LENGTH, MAX_RESPONSE_LENGTH, ENABLE_THINKING. Needs the extra trl: pip install -e '.[trl]'.
# TRL 1.16 warns that it was made for vLLM up to 0.31, while this project has 0.32: not tested together. --vllm off runs
# without vLLM, slowly; --vllm server needs a `trl vllm-serve`, which may run in a separate environment.
# Flags after the recipe's name are passed to scripts/grpo_teacher.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

RUNS=${RUNS:-runs/grpo_teacher}
GPUS=${NUM_GPUS:-8}
case $SCALE in
    paper)
        NAME=qwen3-grpo
        BASE=${QWEN3_TEACHER_BASE:-\$QWEN3_TEACHER_BASE} PROMPTS=${DATA_DIR:-\$DATA_DIR}/dapo_train.jsonl
        # Launched as in TRL's documentation: DeepSpeed ZeRO-3, vLLM in the training processes.
        LAUNCH=(accelerate launch --num_processes "$GPUS" --mixed_precision bf16 --use_deepspeed --zero_stage 3
            --zero3_init_flag true --zero3_save_16bit_model true)
        FLAGS=(--steps "${STEPS:-200}" --prompts_per_step "${TRAIN_BATCH_SIZE:-32}" --samples_per_prompt "${ROLLOUT_N:-16}"
            --max_prompt_tokens "${MAX_PROMPT_LENGTH:-2048}" --max_new_tokens "${MAX_RESPONSE_LENGTH:-8192}" # Table 9
            --thinking "$(on_off "${ENABLE_THINKING:-False}" ENABLE_THINKING)"                       # as the pairs' runs
            --lr "${LEARNING_RATE:-1e-6}" --dtype bfloat16 --vllm colocate)
        ;;
    pocket)
        NAME=pocket-grpo
        BASE=assets/pocket/student PROMPTS=assets/pocket/train.jsonl LAUNCH=(python)
        FLAGS=(--steps "${STEPS:-100}" --prompts_per_step 16 --samples_per_prompt 16 --max_prompt_tokens 16
            --max_new_tokens 40 --prompt_format raw --grader suffix --lr 3e-4 --micro_batch 256)
        ;;
    *) fail "SCALE=$SCALE is unknown; give paper or pocket" ;;
esac
RUN=$RUNS/$NAME
COMMAND=("${LAUNCH[@]}" scripts/grpo_teacher.py --model "$BASE" --prompts "$PROMPTS" --out "$RUN" "${FLAGS[@]}" "$@")

if [[ -n ${DRY_RUN:-} ]]; then
    line_of "${COMMAND[@]}"
elif [[ -e $RUN/DONE ]]; then
    echo "$NAME: finished already"
else
    if [[ $SCALE == paper ]]; then
        require_all "$GPUS" "$BASE" "${DATA_DIR:-\$DATA_DIR}"
    else
        export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    fi
    "${COMMAND[@]}"
fi
[[ $SCALE == pocket ]] || echo "# then: export QWEN3_TEACHER=$RUN/model"
