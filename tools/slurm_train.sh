#!/usr/bin/env bash
# Trains on a SLURM cluster: one torchrun a node, one process a GPU. The project's folder has to lie
# on a disk that the nodes share.
#
# Usage: bash tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [arguments of tools/train.py ...]
#
#   GPUS           GPUs in total (default 8)
#   GPUS_PER_NODE  GPUs of a node (default 8, or GPUS when that is less)
#   CPUS_PER_TASK  cores for each GPU (default 5)
#   SRUN_ARGS      further arguments of srun, separated by blanks
#   PORT           the port the nodes meet at (default: derived from the job's number)
#   PYTHON         the Python to use (default: that of the active environment, or of .venv)
set -euo pipefail

if [ $# -lt 4 ]; then
  printf 'usage: bash tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR %s\n' \
    '[arguments of tools/train.py ...]' >&2
  exit 2
fi
partition=$1 job_name=$2 config=$3 work_dir=$4
shift 4

command -v srun >/dev/null || {
  printf 'slurm_train: no srun here: run this on a node of the cluster, or use tools/dist_train.sh\n' >&2
  exit 1
}

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
gpus=${GPUS:-8}
per_node=${GPUS_PER_NODE:-8}
for number in "$gpus" "$per_node"; do
  case $number in
    '' | *[!0-9]* | 0)
      printf 'slurm_train: GPUS and GPUS_PER_NODE are whole numbers from 1: got %s\n' "$number" >&2
      exit 2 ;;
  esac
done
if [ "$gpus" -lt "$per_node" ]; then per_node=$gpus; fi
if [ $((gpus % per_node)) -ne 0 ]; then
  printf 'slurm_train: GPUS=%s is no multiple of GPUS_PER_NODE=%s\n' "$gpus" "$per_node" >&2
  exit 2
fi
export NNODES=$((gpus / per_node))
read -r -a srun_args <<<"${SRUN_ARGS:-}" || true

# Runs once on each node; SLURM tells it which one it is.
# shellcheck disable=SC2016
on_node='
set -euo pipefail
dist_train=$1
shift
nodes=$(scontrol show hostnames "${SLURM_STEP_NODELIST:-$SLURM_JOB_NODELIST}")
export MASTER_ADDR=${nodes%%[[:space:]]*}
export NODE_RANK=$SLURM_NODEID
export PORT=${PORT:-$((20000 + SLURM_JOB_ID % 20000))}
exec bash "$dist_train" "$@"
'

exec srun \
  --partition="$partition" \
  --job-name="$job_name" \
  --nodes="$NNODES" \
  --ntasks="$NNODES" \
  --ntasks-per-node=1 \
  --gres="gpu:$per_node" \
  --cpus-per-task=$((${CPUS_PER_TASK:-5} * per_node)) \
  --kill-on-bad-exit=1 \
  ${srun_args[@]+"${srun_args[@]}"} \
  bash -c "$on_node" slurm_train \
  "$root/tools/dist_train.sh" "$config" "$per_node" --work-dir "$work_dir" "$@"
