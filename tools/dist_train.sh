#!/usr/bin/env bash
# Trains with several processes: one a GPU, or without a GPU that many on the CPU.
#
# Usage: bash tools/dist_train.sh CONFIG GPUS [arguments of tools/train.py ...]
#
# Several machines: start it on each, with the same NNODES, MASTER_ADDR and PORT, and its own NODE_RANK.
#   NNODES       number of machines (default 1)
#   NODE_RANK    number of this machine, from 0 (default 0)
#   MASTER_ADDR  address of machine 0 (default 127.0.0.1)
#   PORT         a free port there (default 29500; with one machine another one when that is taken)
#   PYTHON       the Python to use (default: that of the active environment, or of .venv)
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/distributed.sh"

if [ $# -lt 2 ]; then
  printf 'usage: bash tools/dist_train.sh CONFIG GPUS [arguments of tools/train.py ...]\n' >&2
  exit 2
fi
config=$1 gpus=$2
shift 2
launch train.py "$gpus" "$config" "$@"
