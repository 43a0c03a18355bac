# What dist_train.sh and dist_test.sh share: sourced by both.

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)

launch() {  # launch TOOL GPUS [arguments of the tool ...]: never returns
  local tool=$1 gpus=$2
  shift 2
  case $gpus in
    '' | *[!0-9]* | 0)
      printf 'GPUS is the number of processes, a whole number from 1: got %s\n' "$gpus" >&2
      exit 2 ;;
  esac
  find_python
  find_port
  # Without a GPU the processes share the cores: one thread each, if nothing else is asked for.
  if [ "${CUDA_VISIBLE_DEVICES-all}" = '' ] || [ "${CUDA_VISIBLE_DEVICES-all}" = -1 ] \
    || ! nvidia-smi -L >/dev/null 2>&1; then
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  fi
  export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
  exec "$python" "$root/tools/common/torchrun.py" \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="$port" \
    --nproc_per_node="$gpus" \
    "$root/tools/$tool" "$@" --launcher pytorch
}

find_python() {
  # An active environment wins (conda's base, which is often active unasked, does not count).
  local venv active=${VIRTUAL_ENV:-}
  # shellcheck source=/dev/null
  source "$root/tools/setup/venv.sh"
  if [ -z "$active" ] && [ "${CONDA_DEFAULT_ENV:-base}" != base ]; then active=$CONDA_DEFAULT_ENV; fi
  if [ -n "${PYTHON:-}" ]; then
    python=$PYTHON
  elif [ -z "$active" ] && [ -x "$venv/bin/python" ]; then
    python=$venv/bin/python
  else
    python=python
  fi
}

find_port() {
  port=${PORT:-29500}
  if [ -z "${PORT:-}" ] && [ "${NNODES:-1}" = 1 ]; then
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
}
