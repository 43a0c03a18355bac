#!/usr/bin/env bash
# Evaluates a checkpoint with several processes: one a GPU, or on a machine without
# a GPU that many on the CPU.
#
# Usage: bash tools/dist_test.sh CONFIG CHECKPOINT GPUS [arguments of tools/test.py ...]
#
# Several machines: start it on each, with the same NNODES, MASTER_ADDR and PORT, and its own NODE_RANK.
#   NNODES       number of machines (default 1)
#   NODE_RANK    number of this machine, from 0 (default 0)
#   MASTER_ADDR  address of machine 0 (default 127.0.0.1)
#   PORT         a free port there (default 29500; with one machine another one when that is taken)
#   PYTHON       the Python to use (default: that of the active environment, or of .venv)
set -euo pipefail

if [ $# -lt 3 ]; then
  printf 'usage: bash tools/dist_test.sh CONFIG CHECKPOINT GPUS [arguments of tools/test.py ...]\n' >&2
  exit 2
fi
config=$1 checkpoint=$2 gpus=$3
shift 3
case $gpus in
  '' | *[!0-9]* | 0)
    printf 'dist_test: GPUS is the number of processes, a whole number from 1: got %s\n' "$gpus" >&2
    exit 2 ;;
esac

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)

# An active environment wins (conda's base, which is often active unasked, does not count).
venv=${MMPRECOND_VENV:-.venv}
case $venv in /*) ;; *) venv=$root/$venv ;; esac
active=${VIRTUAL_ENV:-}
if [ -z "$active" ] && [ "${CONDA_DEFAULT_ENV:-base}" != base ]; then active=$CONDA_DEFAULT_ENV; fi
if [ -n "${PYTHON:-}" ]; then
  python=$PYTHON
elif [ -z "$active" ] && [ -x "$venv/bin/python" ]; then
  python=$venv/bin/python
else
  python=python
fi

nnodes=${NNODES:-1} port=${PORT:-}
if [ -z "$port" ]; then
  port=29500
  if [ "$nnodes" = 1 ]; then
    port=$("$python" - <<'PY'
import socket
for port in (29500, 0):
    with socket.socket() as probe:
        try:
            probe.bind(('', port))
        except OSError:
            continue
        print(probe.getsockname()[1])
        break
PY
    )
  fi
fi

# Without a GPU the processes share the cores: one thread each, if nothing else is asked for.
if [ "${CUDA_VISIBLE_DEVICES-all}" = '' ] || [ "${CUDA_VISIBLE_DEVICES-all}" = -1 ] \
  || ! nvidia-smi -L >/dev/null 2>&1; then
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
fi

export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m torch.distributed.run \
  --nnodes="$nnodes" \
  --node_rank="${NODE_RANK:-0}" \
  --master_addr="${MASTER_ADDR:-127.0.0.1}" \
  --master_port="$port" \
  --nproc_per_node="$gpus" \
  "$root/tools/test.py" "$config" "$checkpoint" --launcher pytorch "$@"
