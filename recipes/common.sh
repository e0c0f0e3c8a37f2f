# shellcheck shell=bash
# Shared by all recipes: settings with their sources, the choice of cells, and how they run. Source it, do not run it.
# Works in bash 3.2.
#
# A recipe lists its cells (`cell SELECTOR [RETENTION] [FLAGS…]`), then calls `run_table NAME "$@"`.
#
#   SCALE=paper|pocket   8×H200 with the paper's models (default), or minutes on a CPU with our own tiny models
#   DRY_RUN=1            print the commands and, as comments, each pair's plan (memory, rough time); start nothing; needs
#                        only Python: no models, no data, no GPU
#   PAIRS, CELLS, SEEDS  run only these, e.g. PAIRS="qwen3 llama" CELLS=all,soft_or-50 SEEDS="0 1 2"
#   RUNS                 folder of the run folders (default runs/NAME)
#   STEPS                optimiser steps
#   LANES                cells that run at a time (default: at pocket scale the number of cores; at paper scale 1)
# Flags after the recipe's name are passed to every `opsd train` unchanged.
#
# SCALE=paper also reads the base repository's variables (docs/recipes.md, "Environment variables") and the models' paths:
#   QWEN3_STUDENT QWEN3_TEACHER LLAMA_STUDENT LLAMA_TEACHER QWEN25_STUDENT QWEN25_TEACHER
#   (or MODEL_PATH and TEACHER_MODEL_PATH if PAIRS names one pair)
# DATA_DIR holds the files that scripts/prepare_data.py makes. CUDA_VISIBLE_DEVICES: the GPUs, e.g. 4,5,6,7 (default: the
# first NUM_GPUS). MASTER_PORT: the ranks' rendezvous port (default 29500). With both, two recipes can share a machine.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ ! -d .venv ]] || export PATH="$PWD/.venv/bin:$PATH"
SCALE=${SCALE:-paper}
CELL_NAMES=() CELL_FLAGS=()
PAPER_PAIRS=(qwen3 llama qwen25)
# At paper scale evaluate_teacher evaluates teachers; a recipe whose teacher `opsd train` evaluates sets this to empty.
TEACHERS_APART=yes

fail() {
    echo "$(basename "$0"): $1" >&2
    exit 2
}

# Counts are checked before anything is written; `opsd train` checks the rest.
for name in STEPS LANES NUM_GPUS TRAIN_BATCH_SIZE TOTAL_EPOCHS ROLLOUT_N VAL_N \
    MAX_PROMPT_LENGTH MAX_RESPONSE_LENGTH OPD_CHUNK_SIZE OPD_MAX_LENGTH; do
    [[ -z ${!name:-} || ${!name} =~ ^[1-9][0-9]*$ ]] || fail "$name=${!name}: give a whole number above 0"
done

# Runs before the cells, after the variables are checked; a recipe may define its own.
prepare() { :; }

# cell SELECTOR [RETENTION] [FLAGS…]: adds a cell. CELLS, run folders and the report use the same name for it.
cell() {
    local flags="--select.by $1"
    if [[ $1 != all ]]; then
        flags+=" --select.retention $2"
        shift
    fi
    shift
    CELL_FLAGS+=("$flags${*:+ $*}")
}

# setting FLAG VALUE [OVERRIDE]: adds the flag; an overriding value becomes part of the run's name.
setting() {
    local value=${3:-$2} name=${1##*.}
    FLAGS+=("$1" "$value")
    [[ $value == "$2" ]] || CHANGED+="-${name#--}_$value"
}

on_off() {
    case $1 in
        1 | [Tt]rue | on) echo on ;;
        0 | [Ff]alse | off) echo off ;;
        *) fail "$2=$1: give True or False" ;;
    esac
}

# The base repository writes "no limit" as -1, we as 0.
top_k() { if [[ ${1:-} == -1 ]]; then echo 0; else echo "${1:-}"; fi; }

# Values from the paper's Table 9; if it gives none, from the base repository's launcher, or our choice.
paper_flags() {
    local lr=1e-6 epochs=${TOTAL_EPOCHS:-1} batch=${TRAIN_BATCH_SIZE:-8} steps thinking at_start
    [[ $1 != llama ]] || lr=3e-7
    thinking=$(on_off "${ENABLE_THINKING:-False}" ENABLE_THINKING)
    at_start=$(on_off "${VAL_BEFORE_TRAIN:-True}" VAL_BEFORE_TRAIN)
    # One epoch of the base repository's 80 % split of DAPO-Math-17k (13,918 prompts): 1,740 steps. The paper gives no count.
    steps=$(((13918 * epochs + batch - 1) / batch))
    setting --steps 1740 "${STEPS:-$steps}"
    setting --prompts_per_step 8 "${TRAIN_BATCH_SIZE:-}"                    # Table 9, "batch size (rollouts)": our reading
    setting --rollout.samples_per_prompt 16 "${ROLLOUT_N:-}"                # Table 9
    setting --rollout.max_prompt_tokens 2048 "${MAX_PROMPT_LENGTH:-}"       # Table 9
    setting --rollout.max_new_tokens 8192 "${MAX_RESPONSE_LENGTH:-}"        # Table 9
    setting --rollout.overlong_prompts drop                                 # base repository: filter_overlong_prompts
    setting --rollout.temperature 1.0 "${TEMPERATURE:-}"                    # Table 9
    setting --rollout.top_p 1.0 "${TOP_P:-}"                                # Table 9
    setting --rollout.top_k 0 "$(top_k "${TOP_K:-}")"                       # base repository: off
    setting --thinking off "$thinking"                                      # base repository: what its launcher passes
    setting --loss.divergence reverse_kl "${OPD_LOSS_TYPE:-}"               # Eq. 1
    setting --loss.reward_beta 0 "${OPD_REWARD_BETA:-}"                     # base repository: off
    # Table 9, "OPD chunk": 512. How many logits exist at once: affects memory, not results.
    setting --loss.chunk_tokens auto "${OPD_CHUNK_SIZE:-}"                  # ours: as many as memory allows
    setting --engine.micro_batch_tokens 16384 "${OPD_MAX_LENGTH:-}"         # Table 9, "OPD max length"
    setting --engine.dtype bfloat16                                         # our choice: master weights are fp32
    setting --optim.lr $lr "${LEARNING_RATE:-}"                             # Table 9: 1e-6 Qwen, 3e-7 Llama
    setting --optim.schedule cosine                                         # Table 9
    setting --optim.weight_decay 0.1                                        # base repository
    setting --optim.max_grad_norm 1.0                                       # base repository
    setting --checkpoint.every 50 "${SAVE_FREQ:-}"                          # our choice
    FLAGS+=(--telemetry.options entropy_split median divergence_split mean) # our choice: the paper gives no thresholds
    setting --eval.every 0 "${TEST_FREQ:-}"                                 # our choice: start and end
    setting --eval.samples 16 "${VAL_N:-}"                                  # paper: mean@16
    setting --eval.generate_batch 256                                       # ours: for vLLM; fixes the order of draws
    setting --eval.temperature 1.0 "${VAL_TEMPERATURE:-}"                   # paper; the base repository has 0.6 or 0.7
    setting --eval.top_p 1.0 "${VAL_TOP_P:-}"                               # paper
    setting --eval.top_k 0 "$(top_k "${VAL_TOP_K:-}")"                      # paper
    [[ $at_start == on ]] || setting --eval.at_start True False             # paper: also before training
    FLAGS+=(--eval.teacher False)                                           # evaluate_teacher does it, with vLLM
    # 70 billion parameters do not fit on one GPU next to a student.
    [[ $1 != llama ]] || FLAGS+=(--teacher.shard True)
    FLAGS+=(--engine.kind deepspeed --engine.zero_stage 3 --rollout.engine vllm)
    # By `opsd plan`, without it 16,384 tokens need 129 (qwen3) and 147 GiB (llama) of 131; with sdpa 154 and 169.
    FLAGS+=(--engine.gradient_checkpointing True)
    FLAGS+=(--eval.suite "math500=$DATA/math500.jsonl" "aime24=$DATA/aime24.jsonl" "aime25=$DATA/aime25.jsonl")
}

# The pocket protocol, fixed before any comparison was run. Every cell shares it.
pocket_flags() {
    local warmup=4
    # If a try-out has fewer steps, all of them are warm-up.
    ((${STEPS:-240} >= warmup)) || warmup=$STEPS
    FLAGS+=(--prompt_format raw)
    setting --steps 240 "${STEPS:-}"
    FLAGS+=(--prompts_per_step 16 --rollout.samples_per_prompt 4 --rollout.max_prompt_tokens 16 --rollout.max_new_tokens 40
        --optim.lr 1e-3 --optim.warmup_steps $warmup --optim.max_grad_norm 1.0 --engine.micro_batch_tokens 4096
        --engine.dtype float32 --eval.suite pocket=assets/pocket/eval.jsonl --eval.grader suffix --eval.samples 16 --eval.temperature 1.0
        --eval.generate_batch 1024
        --checkpoint.every 60 --telemetry.every 10 --telemetry.save_tokens True --telemetry.top_tokens 5
        --telemetry.options entropy_split 0.3 divergence_split 0.3) # nats; half the tokens have almost no entropy
}

# models_of PAIR: sets STUDENT, TEACHER, PROMPTS, DATA and GPUS, and SHAPES, the names that `opsd plan` has for models that
# are not set. A path that is not set is shown as its variable's name.
models_of() {
    local upper
    DATA=${DATA_DIR:-\$DATA_DIR} PROMPTS=${DATA_DIR:-\$DATA_DIR}/dapo_train.jsonl GPUS=${NUM_GPUS:-8}
    case $1 in
        pocket)
            STUDENT=${POCKET_STUDENT:-assets/pocket/student} TEACHER=assets/pocket/teacher GPUS=0
            PROMPTS=${POCKET_PROMPTS:-assets/pocket/train.jsonl}
            return
            ;;
        # Qwen3-8B after GRPO → Qwen3-4B
        qwen3) upper=QWEN3 SHAPES=(qwen3-4b qwen3-8b) ;;
        # Llama-3.3-70B-Instruct → Llama-3.1-8B-Instruct
        llama) upper=LLAMA SHAPES=(llama-3.1-8b llama-3.3-70b) ;;
        # Qwen2.5-14B-Instruct-thinking → Qwen2.5-1.5B-Instruct, 4×H200
        qwen25) upper=QWEN25 SHAPES=(qwen2.5-1.5b qwen2.5-14b) GPUS=${NUM_GPUS:-4} ;;
    esac
    paths_of "$upper"
    if [[ ${#PAIR_LIST[@]} == 1 ]]; then
        STUDENT=${MODEL_PATH:-$STUDENT} TEACHER=${TEACHER_MODEL_PATH:-$TEACHER}
    fi
}

# paths_of NAME: sets STUDENT and TEACHER.
paths_of() {
    local student=$1_STUDENT teacher=$1_TEACHER
    STUDENT=${!student:-\$$student} TEACHER=${!teacher:-\$$teacher}
}

# chosen WHAT "VALUES" KNOWN…: fills CHOSEN with VALUES (default: all KNOWN); fails if a value is not known.
chosen() {
    local what=$1 values=${2//,/ } value
    shift 2
    CHOSEN=()
    for value in ${values:-$*}; do
        case " $* " in
            *" $value "*) CHOSEN+=("$value") ;;
            *) fail "$what has $value; at SCALE=$SCALE it can hold: $*" ;;
        esac
    done
}

choose() {
    local seed names
    case $SCALE in
        paper) chosen PAIRS "${PAIRS:-}" "${PAPER_PAIRS[@]}" ;;
        pocket) chosen PAIRS "${PAIRS:-}" pocket ;;
        *) fail "SCALE=$SCALE is unknown; give paper or pocket" ;;
    esac
    PAIR_LIST=("${CHOSEN[@]}")
    command -v python3 >/dev/null || fail "python3, which names the cells, is not found; install Python"
    names=$(printf '%s\n' "${CELL_FLAGS[@]}" | python3 scripts/reporting/cells.py) || exit 2
    read -r -d '' -a CELL_NAMES <<<"$names" || true
    chosen CELLS "${CELLS:-}" "${CELL_NAMES[@]}"
    CELL_LIST=("${CHOSEN[@]}")
    SEED_LIST=()
    for seed in $(tr , ' ' <<<"${SEEDS:-0}"); do
        [[ $seed =~ ^[0-9]+$ ]] || fail "SEEDS has $seed; give whole numbers, e.g. SEEDS=\"0 1 2\""
        SEED_LIST+=("$seed")
    done
}

# Fails with one line that names everything SCALE=paper lacks.
require() {
    local pair most=0 paths=()
    for pair in "${PAIR_LIST[@]}"; do
        models_of "$pair"
        paths+=("$STUDENT" "$TEACHER")
        ((GPUS <= most)) || most=$GPUS
    done
    [[ $SCALE == pocket ]] || paths+=("${DATA_DIR:-\$DATA_DIR}")
    require_all "$most" "${paths[@]}"
    command -v opsd >/dev/null || fail "opsd is not installed; run: make setup"
}

# require_all GPUS PATHS…: fails if there are fewer GPUs, or if a path is still its variable's name.
require_all() {
    local lacks='' path found
    found=$(nvidia-smi --list-gpus 2>/dev/null | grep -c . || true)
    ((found >= $1)) || lacks=", $1 GPUs (found $found; NUM_GPUS=N takes fewer)"
    shift
    for path in "$@"; do
        [[ $path != \$* ]] || lacks+=", ${path#\$}"
    done
    [[ -z $lacks ]] || fail "missing: ${lacks#, }. SCALE=pocket runs on a CPU, DRY_RUN=1 prints the commands"
}

# launch_of WHAT: sets LAUNCH, the words before the flags of `opsd WHAT`.
launch_of() {
    LAUNCH=(opsd "$1")
    if [[ $SCALE == paper ]]; then
        LAUNCH=(deepspeed --num_gpus "$GPUS")
        # Given a number, DeepSpeed's launcher takes the first GPUs and ignores this variable.
        [[ -z ${CUDA_VISIBLE_DEVICES:-} ]] || LAUNCH=(deepspeed --include "localhost:$CUDA_VISIBLE_DEVICES")
        # The launcher has --module instead of -m, and would add its own --local_rank.
        LAUNCH+=(${MASTER_PORT:+--master_port "$MASTER_PORT"} --no_local_rank --module opsd "$1")
    fi
}

# evaluate_teacher PAIR FLAGS…: evaluates the teacher with vLLM on all GPUs, once for all cells, with the cells' evaluation
# settings, unless the recipe is given --eval.teacher False. With transformers, as in `opsd train`, MATH-500 alone would
# take hours. The report finds the result.
evaluate_teacher() {
    local pair=$1 flags=() words i file
    shift
    [[ " $* " != *" --eval.teacher False "* ]] || return 0
    command_of "$pair" "${CELL_LIST[0]}" "${SEED_LIST[0]}" "$@"
    words=("${FLAGS[@]}" "$@")
    for i in "${!words[@]}"; do
        case ${words[i]} in
            --eval.samples | --eval.temperature | --eval.top_p | --eval.top_k | --eval.seed | --eval.limit | --eval.generate_batch | \
                --eval.max_new_tokens | --eval.grader | --rollout.max_new_tokens | --rollout.max_prompt_tokens | \
                --prompt_format | --thinking | --prompt_field | --answer_field | --trust_remote_code)
                flags+=("--${words[i]##*[.-]}" "${words[i + 1]}")
                ;;
        esac
    done
    flags+=(--suite "math500=$DATA/math500.jsonl" "aime24=$DATA/aime24.jsonl" "aime25=$DATA/aime25.jsonl")
    flags+=(--engine vllm --dtype bfloat16)
    # A teacher of 70 billion parameters needs all of the GPUs.
    [[ $pair != llama ]] || flags+=(--tensor_parallel "$GPUS")
    file=$RUNS/teachers/$pair-$(cksum <<<"$TEACHER ${flags[*]}" | cut -d ' ' -f 1).json
    launch_of eval
    words=("${LAUNCH[@]}" --model "$TEACHER" --out "$file" "${flags[@]}")
    if [[ -n ${DRY_RUN:-} ]]; then
        line_of "${words[@]}"
    elif [[ ! -e $file ]]; then
        WORDS=('')
        run_in_reach "${words[@]}" || exit $?
    fi
}

# command_of PAIR CELL SEED FLAGS…: sets NAME, RUN and COMMAND.
command_of() {
    local pair=$1 cell=$2 seed=$3 i
    shift 3
    local teacher
    FLAGS=() CHANGED=
    models_of "$pair"
    if [[ $SCALE == paper ]]; then paper_flags "$pair"; else pocket_flags; fi
    for i in "${!CELL_NAMES[@]}"; do
        # shellcheck disable=SC2206  # a cell's flags are words
        [[ ${CELL_NAMES[i]} != "$cell" ]] || FLAGS+=(${CELL_FLAGS[i]})
    done
    CHANGED+=$(printf '%s' "${*:+-$*}" | sed 's/--//g' | tr -c 'A-Za-z0-9._-' _)
    # A file name has at most 255 bytes. The run's .command and config.json hold what the checksum replaces.
    ((${#CHANGED} <= 160)) || CHANGED=${CHANGED:0:140}-and_$(cksum <<<"$CHANGED" | cut -d ' ' -f 1)
    NAME=$pair-$cell$CHANGED-seed$seed
    RUN=$RUNS/$NAME
    launch_of train
    # A cell may set its own teacher: the student itself, or several teachers.
    teacher=(--teacher "$TEACHER")
    [[ " ${FLAGS[*]} " != *" --teacher "* && " ${FLAGS[*]} " != *" --teachers "* ]] || teacher=()
    COMMAND=("${LAUNCH[@]}" --student "$STUDENT" ${teacher[@]+"${teacher[@]}"} --prompts "$PROMPTS" --out "$RUN"
        --seed "$seed" --eval.cache "$RUNS/evaluations" "${FLAGS[@]}" "$@")
}

# Prints a command's words as one line that a shell can read back; names of unset $VARIABLES stay readable.
line_of() {
    local word line=
    for word in "$@"; do
        [[ $word =~ ^[A-Za-z0-9_./:=,+@%\$-]+$ ]] || word=$(printf %q "$word")
        line+=" $word"
    done
    echo "${line# }"
}

# Runs a command in the background and passes signals on to it: bash handles no signal while a foreground command runs.
# Its standard input is WORDS, each ended by NUL.
run_in_reach() {
    local job status=0 struck= name
    # Not through a pipe: if the job ended without reading all words, the exit code would be SIGPIPE's.
    "$@" < <(printf '%s\0' "${WORDS[@]}") &
    job=$!
    for name in INT TERM HUP; do
        # shellcheck disable=SC2064  # the job and the signal as they are now
        trap "struck=yes; kill -$name $job 2>/dev/null || true" "$name"
    done
    wait "$job" || status=$?
    # A signal makes `wait` return its number before the job ends.
    while [[ $struck ]]; do
        struck= status=0
        wait "$job" || status=$?
    done
    trap - INT TERM HUP
    return "$status"
}

# plan_of PAIR FLAGS…: prints `opsd plan` of the pair's first chosen cell as comments. Models that are not set have their
# published shapes. If the plan cannot be made, the reason is printed, and nothing fails.
plan_of() {
    local pair=$1 student teacher
    shift
    command_of "$pair" "${CELL_LIST[0]}" "${SEED_LIST[0]}" "$@"
    student=$STUDENT teacher=$TEACHER
    [[ $STUDENT != \$* ]] || student=${SHAPES[0]}
    [[ $TEACHER != \$* ]] || teacher=${SHAPES[1]}
    echo "# plan of $pair: $student <- $teacher on $GPUS GPUs"
    { .venv/bin/opsd plan --student "$student" --teacher "$teacher" --gpus "$GPUS" --hardware h200 --brief True "${FLAGS[@]}" "$@" 2>&1 || true; } |
        sed 's/^/#   /'
}

# run_table NAME FLAGS…: runs every chosen pair, seed and cell, then the report.
run_table() {
    local table=$1 seed pair cell report lanes=${LANES:-}
    shift
    RUNS=${RUNS:-runs/$table}
    choose
    if [[ -z ${DRY_RUN:-} ]]; then
        require
        prepare
    fi
    if [[ $SCALE == paper ]]; then
        ((${lanes:=1} == 1)) || fail "LANES=$lanes: at SCALE=paper a cell has all of its GPUs, so give 1; for more at a time \
start two recipes, each with its own CELLS, CUDA_VISIBLE_DEVICES and MASTER_PORT"
    fi
    # Idle threads must sleep: if anything else runs, spinning ones make a step five times slower. The pocket models are too
    # small for several threads: one takes two thirds of the time of two.
    export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
    [[ $SCALE == paper ]] || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    for pair in "${PAIR_LIST[@]}"; do
        [[ $SCALE != paper || -z $TEACHERS_APART ]] || evaluate_teacher "$pair" "$@"
    done
    WORDS=()
    for seed in "${SEED_LIST[@]}"; do
        for pair in "${PAIR_LIST[@]}"; do
            for cell in "${CELL_LIST[@]}"; do
                command_of "$pair" "$cell" "$seed" "$@"
                if [[ -n ${DRY_RUN:-} ]]; then line_of "${COMMAND[@]}"; fi
                # In the format that scripts/lanes/cell.py reads.
                WORDS+=("$NAME" "$RUN" "$(line_of "${COMMAND[@]}")" "${#LAUNCH[@]}" "${#COMMAND[@]}" "${COMMAND[@]}")
            done
        done
    done
    [[ -n ${DRY_RUN:-} ]] || run_in_reach python scripts/run_cells.py --title "$table" --recipe "$(basename "$0")" \
        ${lanes:+--lanes "$lanes"} || exit $?
    if [[ -n ${DRY_RUN:-} && $SCALE == paper ]]; then
        if [[ -x .venv/bin/opsd ]]; then
            for pair in "${PAIR_LIST[@]}"; do plan_of "$pair" "$@"; done
        else
            echo "# run make setup to see the plan of memory and time here"
        fi
    fi
    report=(python scripts/report.py "$RUNS" --table "$table" --out "$RUNS/report")
    # Several tables may share RUNS, so only this table's cells are shown. The user's own flags can change cells' names: then
    # all cells are shown.
    (($#)) || report+=(--cells "${CELL_NAMES[@]}")
    if [[ -n ${DRY_RUN:-} ]]; then line_of "${report[@]}"; else "${report[@]}"; fi
}
