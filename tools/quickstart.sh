#!/usr/bin/env bash
# One command from a fresh clone to a comparison of NKFAC and SGD on a small Faster R-CNN.
#
# Usage: bash tools/quickstart.sh [options of tools/quickstart.py]   (--help lists them)
#
# Sets the environment up if need be (tools/setup_env.sh), makes the data, trains, draws.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
cd -- "$root"
# shellcheck source=/dev/null
source "$root/tools/setup/venv.sh"
python=$venv/bin/python
[ -x "$python" ] || python=python3
# Prints the help, or complains about the options, before anything is built.
"$python" tools/quickstart.py --parse-only "$@"
part=() before=''
for argument in "$@"; do
  case "$before $argument" in
    *' -h' | *' --help') exit 0 ;;
    '--m'*' '*-cls | *' --m'*=*-cls) part=(--classification) ;;  # no compiled operators needed
  esac
  before=$argument
done
bash tools/setup_env.sh --quiet ${part[@]+"${part[@]}"}
exec "$venv/bin/python" tools/quickstart.py "$@"
