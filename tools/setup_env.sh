#!/usr/bin/env bash
# Makes a virtual environment with a pinned, tested set of packages, for training and for the tests.
#
# Usage: bash tools/setup_env.sh [--stack onedl|openmmlab] [--classification] [--quiet]
#
#   --stack onedl       the maintained forks onedl-mmengine, -mmcv, -mmdetection, -mmpretrain
#   --stack openmmlab   the originals mmengine, mmcv, mmdet, mmpretrain
#                       (default: the stack that the environment holds, onedl for a new one)
#   --classification    MMPretrain without MMDetection and the test tools: nothing is compiled
#   --quiet             print nothing when all is in place already
#
# The two stacks share import names, so one environment holds one of them. Keep both side by side with
#   MMPRECOND_VENV=.venv-openmmlab bash tools/setup_env.sh --stack openmmlab
#
# mmcv is compiled from its source archive: 4 to 8 minutes on 2 cores. The wheel is kept in the
# cache folder, so the next set-up takes about two minutes. A second run ends within seconds.
#
# Environment variables:
#   MMPRECOND_VENV       folder of the environment (default .venv; relative to the project's root)
#   MMPRECOND_PYTHON     the Python to make it with (default: python3.11, then any from 3.10 to 3.13)
#   MMPRECOND_MMCV_CUDA  0: compile mmcv's CPU operators only, also where a GPU is seen
#   XDG_CACHE_HOME       where the cache folder lies (default ~/.cache)
#   MAX_JOBS             compiler processes at a time (default: one a core, bounded by the memory)
#
# For an environment that has an OpenMMLab stack already: `pip install --no-deps -e .`, and nothing of this.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
for piece in venv state report machine mmcv; do
  # shellcheck source=/dev/null
  source "$root/tools/setup/$piece.sh"
done

# ---- arguments and places ------------------------------------------------------------------------
usage() { sed -n '2,/^set -euo/{/^set -euo/!s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"; }

stack='' quiet='' part=all
while [ $# -gt 0 ]; do
  case $1 in
    --stack) [ $# -ge 2 ] || die "--stack needs a name: onedl or openmmlab"; stack=$2; shift 2 ;;
    --stack=*) stack=${1#--stack=}; shift ;;
    --classification) part=classification; shift ;;
    --quiet) quiet=yes; shift ;;
    -h | --help) usage; exit 0 ;;
    *) die "unknown argument '$1': see bash tools/setup_env.sh --help" ;;
  esac
done
exec </dev/null
cd -- "$root"
if [ -z "$stack" ]; then
  stack=onedl
  for found in "$venv"/lib/python3*/site-packages/mmengine-[0-9]*.dist-info; do
    if [ -d "$found" ]; then stack=openmmlab; fi
  done
fi
pins_of "$stack" || die "unknown stack '$stack': choose --stack onedl or --stack openmmlab"
if [ "$part" = classification ] && [ "$stack" = openmmlab ]; then
  die "--classification is for the onedl stack: leave it out to build the openmmlab stack"
fi
choose_part "$part"
py=$venv/bin/python
stamp=$venv/mmprecond-setup.stamp
mmcv_stamp=$venv/mmprecond-mmcv.stamp
constraints=$venv/mmprecond-constraints.txt
cache=${XDG_CACHE_HOME:-${HOME:-$root/work_dirs}/.cache}/mmprecond
wheels=$cache/wheels

# A user's own Python and pip settings must not lead packages past the environment.
unset PYTHONPATH PYTHONHOME PIP_TARGET PIP_PREFIX PIP_ROOT
export PYTHONNOUSERSITE=1 PIP_USER=0 PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1
export PIP_PROGRESS_BAR=off PIP_ROOT_USER_ACTION=ignore

# ---- all there already? --------------------------------------------------------------------------
gpu=$(gpu_seen)
check_environment

# ---- can it be done here? ------------------------------------------------------------------------
check_machine

# ---- from here on things change ------------------------------------------------------------------
trap on_exit EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

if command -v flock >/dev/null; then
  exec 9>>"$cache/setup.lock"
  if ! flock -n 9; then
    say 'Another set-up is running; waiting for it to end.'
    flock 9
  fi
  rm -rf -- "$wheels"/.build.*  # left by a build that was killed
fi

log=$root/work_dirs/setup_env/$(date +%Y%m%d-%H%M%S)-$$.log
log_shown=$(shown "$log")
: >"$log"
say "Setting up $(shown "$venv") with the $stack stack; everything pip says goes to $log_shown"

# ---- 1 the environment ---------------------------------------------------------------------------
stage "the environment: $("$base_python" -I -c 'import platform; print("Python", platform.python_version())')"
if [ ! -x "$py" ]; then
  run_logged 'the environment' "$base_python" -m venv "$venv"
fi
rm -f -- "$stamp"
export PATH="$venv/bin:$PATH"  # ninja is found here by torch
if ! "$py" -m pip --version >/dev/null 2>&1; then
  run_logged pip "$py" -m ensurepip --upgrade
fi
printf '%s\n' "${CONSTRAINTS[@]}" >"$constraints"
pip_install 'the build tools' "${BUILD_TOOLS[@]}"

# ---- 2 torch -------------------------------------------------------------------------------------
if [ -n "$torch_there" ]; then
  stage "torch $TORCH, torchvision $TORCHVISION"
else
  stage "torch $TORCH, torchvision $TORCHVISION (2.5 GB to download the first time)"
fi
pip_install torch "torch==$TORCH" "torchvision==$TORCHVISION"

# ---- 3 mmcv --------------------------------------------------------------------------------------
if [ "$part" = all ]; then install_mmcv; else install_mmcv_without_operators; fi

# ---- 4 the stack ---------------------------------------------------------------------------------
names=("${PACKAGES[@]/==/ }")
stage "$(printf '%s, ' "${names[@]}" | sed 's/, $//')"
if ! stack_complete; then
  # The forks come as source archives: first themselves, with the setuptools that is here, then what
  # they need, in the usual way.
  pip_install "the $stack stack" --no-deps --no-build-isolation \
    $(printf '%s\n' "${PACKAGES[@]}" | grep -v mmcv)
  pip_install "the $stack stack" "${PACKAGES[@]}"
  # opencv-python and opencv-python-headless own the same files and the former needs libGL. Removing
  # one breaks the other, so both go and the latter comes back.
  run_logged OpenCV "$py" -m pip uninstall --yes opencv-python opencv-contrib-python \
    opencv-python-headless
  pip_install OpenCV --no-deps opencv-python-headless
fi

# ---- 5 mmprecond ---------------------------------------------------------------------------------
if [ "$part" = all ]; then extras=dev; else extras=digits,tools; fi
stage "mmprecond itself (editable) and its extra $extras"
pip_install mmprecond --no-build-isolation --editable ".[$extras]"
pip_install setuptools 'setuptools>=80,<81'

# ---- 6 does it work? -----------------------------------------------------------------------------
stage 'checking'
if [ "$part" = all ] && ! "$py" -I -c 'import torch, mmcv._ext; from mmcv.ops import nms, roi_align' >>"$log" 2>&1; then
  rm -f -- "$mmcv_stamp"
  die "mmcv's compiled operators (mmcv._ext) do not load: rm -r $(printf '%q' "$wheels/$key") and run\
 this again to compile them anew (log: $log_shown)"
fi
versions=$("$py" -I - "${PACKAGES[@]}" 2>>"$log" <<'PY'
import platform, sys, warnings
from importlib import metadata
warnings.simplefilter('ignore')
import cv2, mmcv, mmengine, mmpretrain, torch, torchvision  # all must import
if any('mmdet' in pin for pin in sys.argv[1:]):
    import mmdet
stack = [pin.split('==')[0] for pin in sys.argv[1:]]
print('  Python %s, torch %s, torchvision %s, numpy %s, opencv-python-headless %s' % (
    platform.python_version(), torch.__version__, torchvision.__version__,
    metadata.version('numpy'), metadata.version('opencv-python-headless')))
print('  ' + ', '.join('%s %s' % (name, metadata.version(name)) for name in [*stack, 'mmprecond']))
PY
) || die "the environment is complete but does not import: see the end of $log_shown"
state_text "$part" >"$stamp"

say "Ready after $(minutes $SECONDS): $(shown "$venv") ($stack stack, mmcv with $accelerator operators)"
say "$versions"
if [ "$stack" = openmmlab ]; then
  say "To resume a run with this stack, set TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1."
fi
say "Activate it with: source $(printf '%q' "$venv/bin/activate")"
ended=yes
