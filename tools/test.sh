#!/usr/bin/env bash
# Runs every check: ruff, mypy, then pytest. Sets the environment up first, if need be.
#
# Usage: bash tools/test.sh                 everything: the fast tests in two processes, then the slow
#                                           ones, up to an hour on two cores
#        bash tools/test.sh --fast          without the tests that are marked as slow, 12 to 18 minutes
#        bash tools/test.sh PYTEST-ARGS...  pytest alone, from the project's root, with these arguments
#
# MMPRECOND_VENV names another environment than .venv; its stack (onedl or openmmlab) is kept.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
cd -- "$root"
# shellcheck source=/dev/null
source "$root/tools/setup/venv.sh"

for found in "$venv"/lib/python3*/site-packages/mmengine-[0-9]*.dist-info; do
  if [ -d "$found" ]; then
    # mmengine 0.10.7 reads its own checkpoints only so, on torch >= 2.6.
    export TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1
  fi
done
bash tools/setup_env.sh --quiet

# What the tests start (torchrun, the scripts in tools/) runs in the same environment.
export VIRTUAL_ENV=$venv PATH="$venv/bin:$PATH"
unset PYTHONHOME
python=$venv/bin/python

fast=(-m 'not slow' -n 2 --dist loadfile)
all=true
if [ "${1-}" = --fast ]; then
  all=false
  shift
fi
if [ $# -gt 0 ]; then
  if $all; then fast=(); fi
  exec "$python" -m pytest ${fast[@]+"${fast[@]}"} "$@"
fi

code=0
check() {
  printf '== %s\n' "$1"
  shift
  "$python" -m "$@" || { code=1; printf 'test.sh: FAILED: %s\n' "$*" >&2; }
}
check 'ruff check' ruff check .
check 'ruff format' ruff format --check .
check mypy mypy
check 'fast tests' pytest "${fast[@]}"
if $all; then  # one at a time: they start processes of their own, and some measure seconds
  check 'slow tests' pytest -m slow --durations 10
fi
exit "$code"
