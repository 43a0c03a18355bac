#!/usr/bin/env bash
# Checks mmprecond on this machine's GPU and times it against SGD, AdamW, Muon and SOAP.
#
# Usage: bash tools/analysis_tools/gpu_check.sh [--device cuda|cpu] [--out FOLDER] [--minutes 8]
#
# Needs torch and torchvision, nothing else; with pytorch_optimizer and MMDetection it does more.
# PYTHON names the interpreter (default: that of .venv if it exists, else python3).
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd -P)
# shellcheck source=/dev/null
source "$root/tools/setup/venv.sh"
python=${PYTHON:-$([ -x "$venv/bin/python" ] && printf '%s' "$venv/bin/python" || printf python3)}
if ! "$python" -c 'import torch, torchvision' 2>/dev/null; then
  printf 'gpu_check: %s has no torch or torchvision; name another by PYTHON=...\n' "$python" >&2
  exit 2
fi
exec "$python" "$root/tools/analysis_tools/gpu_check.py" "$@"
