#!/usr/bin/env bash
# Serves a teacher for `opsd train --teacher MODEL --teacher.kind vllm`: vLLM's pooling engine, final hidden states.
#
#   scripts/serve_teacher.sh MODEL [PORT] [vLLM flags, e.g. --tensor-parallel-size 4 --max-model-len 12288]
#
# It listens on this machine only; HOST=ADDRESS opens it to others, then set VLLM_API_KEY here and name the variable
# that holds the key to the trainer (--teacher.api_key_env VLLM_API_KEY). Several replicas: start it on several ports.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "serve_teacher.sh: $1" >&2
    exit 2
}

[[ $# -ge 1 ]] || fail "usage: serve_teacher.sh MODEL [PORT] [vLLM flags]"
MODEL=$1 PORT=8000
shift
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
    PORT=$1
    shift
fi
for word in "$@"; do
    case $word in
        --api-key* | --api_key*) fail "give the key as VLLM_API_KEY; a flag is in the list of processes and in vLLM's log" ;;
    esac
done
if [[ -n ${VLLM_API_KEY:-} ]]; then
    # vLLM's own check does not cover /pooling, the only path used here.
    set -- --middleware opsd.utils.served_key.KeyOnEveryPath "$@"
elif [[ -n ${HOST:-} && $HOST != 127.* && $HOST != localhost ]]; then
    echo "serve_teacher.sh: HOST=$HOST and no VLLM_API_KEY: anyone who can reach this machine can use the teacher" >&2
fi
# Without a GPU: bound threads would take the trainer's cores, and by default the cache takes half the memory.
export VLLM_CPU_OMP_THREADS_BIND=${VLLM_CPU_OMP_THREADS_BIND:-nobind} VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
PYTHON=python
[[ ! -x .venv/bin/python ]] || PYTHON=.venv/bin/python
exec "$PYTHON" -m vllm.entrypoints.openai.api_server --model "$MODEL" --host "${HOST:-127.0.0.1}" --port "$PORT" \
    --runner pooling --pooler-config '{"task": "token_embed", "use_activation": false}' "$@"
