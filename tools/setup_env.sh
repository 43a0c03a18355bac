#!/usr/bin/env bash
# Makes a virtual environment with a pinned, tested set of packages, for training and for the tests.
#
# Usage: bash tools/setup_env.sh [--stack onedl|openmmlab] [--quiet]
#
#   --stack onedl       the maintained forks onedl-mmengine, -mmcv, -mmdetection, -mmpretrain
#   --stack openmmlab   the originals mmengine, mmcv, mmdet, mmpretrain
#                       (default: the stack that the environment holds, onedl for a new one)
#   --quiet             print nothing when all is in place already
#
# The two stacks share import names, so one environment holds one of them. Keep both side by side with
#   MMPRECOND_VENV=.venv-openmmlab bash tools/setup_env.sh --stack openmmlab
#
# mmcv is compiled from its source archive: 11 to 17 minutes on 2 cores. The wheel is kept in the
# cache folder, so the next set-up takes about two minutes. A second run ends within seconds.
#
# Environment variables:
#   MMPRECOND_VENV       folder of the environment (default .venv; relative to the project's root)
#   MMPRECOND_PYTHON     the Python to make it with (default: python3.11, then any from 3.10 to 3.13)
#   MMPRECOND_MMCV_CUDA  0: compile mmcv's CPU operators only, also where a GPU is seen
#   XDG_CACHE_HOME       where the cache folder lies (default ~/.cache)
#   MAX_JOBS             compiler processes at a time (default: one a core, bounded by the memory)
#
# For an environment that has an OpenMMLab stack already: `pip install -e .`, and nothing of this.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
for piece in state report machine mmcv; do
  # shellcheck source=/dev/null
  source "$root/tools/setup/$piece.sh"
done

# ---- arguments and places ------------------------------------------------------------------------
usage() { sed -n '2,/^set -euo/{/^set -euo/!s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"; }

stack=''
quiet=''
while [ $# -gt 0 ]; do
  case $1 in
    --stack) [ $# -ge 2 ] || die "--stack needs a name: onedl or openmmlab"; stack=$2; shift 2 ;;
    --stack=*) stack=${1#--stack=}; shift ;;
    --quiet) quiet=yes; shift ;;
    -h | --help) usage; exit 0 ;;
    *) die "unknown argument '$1': see bash tools/setup_env.sh --help" ;;
  esac
done
exec </dev/null
cd -- "$root"
venv=${MMPRECOND_VENV:-.venv}
case $venv in /*) ;; *) venv=$root/$venv ;; esac
venv=${venv%/}
if [ -z "$stack" ]; then
  stack=onedl
  for found in "$venv"/lib/python3*/site-packages/mmengine-[0-9]*.dist-info; do
    if [ -d "$found" ]; then stack=openmmlab; fi
  done
fi
pins_of "$stack" || die "unknown stack '$stack': choose --stack onedl or --stack openmmlab"
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

# ---- questions to the machine --------------------------------------------------------------------
# ---- all there already? --------------------------------------------------------------------------
gpu=$(gpu_seen)
if [ -e "$venv" ]; then
  if [ -x "$py" ]; then
    "$py" -I -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null \
      || die "the Python in $(shown "$venv") is not of 3.10 to 3.13 or does not run: remove that\
 folder and run this again"
    refuse_other_family
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(state_text)" ] && all_in_place; then
      [ -n "$quiet" ] || say "All in place: $(shown "$venv") ($stack stack)." \
        "Activate it with: source $(printf '%q' "$venv/bin/activate")"
      exit 0
    fi
  elif [ ! -d "$venv" ] || [ -n "$(ls -A -- "$venv" 2>/dev/null)" ]; then
    die "$(shown "$venv") exists and is no virtual environment: remove it, or name another folder in\
 MMPRECOND_VENV"
  fi
fi

# ---- can it be done here? ------------------------------------------------------------------------
case $(uname -s) in
  Linux) ;;
  *) die "this script is for Linux: elsewhere install torch, mmengine, mmcv and mmdet by hand, then\
 run pip install -e ." ;;
esac

if [ -x "$py" ]; then
  base_python=$py
else
  base_python=$(find_python) || die "no Python from 3.10 to 3.13 found: install python3.11 (Debian, Ubuntu:\
 apt-get install python3.11 python3.11-venv python3.11-dev) or name one in MMPRECOND_PYTHON"
  "$base_python" -I -c 'import ensurepip, venv' 2>/dev/null \
    || die "$base_python cannot make virtual environments: install its venv package (Debian, Ubuntu:\
 apt-get install python3-venv)"
fi

torch_there=''
if [ -x "$py" ]; then
  torch_version=$(installed torch)
  [ "${torch_version%%+*}" != "$TORCH" ] || torch_there=yes
fi
need=12
[ -z "$torch_there" ] || need=3
free=$(free_gb "$venv")
[ "$free" -ge "$need" ] || die "$free GB free on the disk of $(shown "$venv"), about $need GB are\
 needed: free some space, or name a folder on a larger disk in MMPRECOND_VENV"
if [ -z "$torch_there" ]; then
  free=$(free_gb "${TMPDIR:-/tmp}")
  [ "$free" -ge 4 ] || die "$free GB free in ${TMPDIR:-/tmp}, pip needs about 4 GB there: set TMPDIR\
 to a folder on a larger disk"
fi
mkdir -p -- "$wheels" 2>/dev/null && [ -w "$wheels" ] \
  || die "cannot write to the cache folder $cache: set XDG_CACHE_HOME to a folder of yours"
mkdir -p -- "$root/work_dirs/setup_env" 2>/dev/null && [ -w "$root/work_dirs/setup_env" ] \
  || die "cannot write to work_dirs/ in the project's root: give yourself the right to write there"

want_cuda=''
if [ -n "$gpu" ] && [ "${MMPRECOND_MMCV_CUDA:-1}" != 0 ]; then want_cuda=yes; fi

tag=$(python_tag "$base_python")
if [ -n "$want_cuda" ]; then
  # Which CUDA torch is for shows once it is installed; here any wheel for a GPU counts as one.
  is_there "$wheels/${MMCV/==/-}-$tag-torch$TORCH-cu"*/*.whl || check_compiler
else
  cached_wheel "$base_python" "$(wheel_key "$tag" cpu)" >/dev/null || check_compiler
fi

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
accelerator=cpu
if [ -n "$want_cuda" ]; then
  # Operators are compiled for the GPUs that are seen, so their kind is a part of the key.
  accelerator=$("$py" -I - <<'PY' 2>>"$log" || true
import os, re, torch
if torch.version.cuda and torch.cuda.is_available():
    arch = os.environ.get('TORCH_CUDA_ARCH_LIST')
    if not arch:
        seen = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        arch = '-'.join('%d%d' % pair for pair in sorted(seen))
    arch = re.sub(r'[^0-9A-Za-z+]+', '-', arch.replace('.', ''))
    print('cu%s-sm%s' % (torch.version.cuda.replace('.', ''), arch))
PY
  )
  if [ -z "$accelerator" ]; then
    accelerator=cpu
    say '      nvidia-smi sees a GPU, torch cannot use it (a driver too old?): CPU operators only'
  fi
fi
key=$(wheel_key "$tag" "$accelerator")
wheel=$(cached_wheel "$py" "$key") || wheel=''

if [ -n "$wheel" ]; then
  stage "${MMCV/==/ } (wheel from the cache, $accelerator operators)"
else
  stage "${MMCV/==/ }: compiling it with $accelerator operators, 11 to 17 minutes on 2 cores"
  build_mmcv
fi
# An mmcv that pip brought in by itself has the same version and no operators: put ours in its place.
if [ "$(installed "${MMCV%%==*}")" != "${MMCV##*==}" ] || [ ! -f "$mmcv_stamp" ] \
  || [ "$(cat "$mmcv_stamp")" != "$key" ] \
  || ! is_there "$venv"/lib/python3*/site-packages/mmcv/_ext*.so; then
  rm -f -- "$mmcv_stamp"
  pip_install mmcv --force-reinstall --no-deps "$wheel"
  printf '%s\n' "$key" >"$mmcv_stamp"
fi

# ---- 4 the stack ---------------------------------------------------------------------------------
stage "${MMENGINE/==/ }, ${MMDET/==/ }, ${MMPRETRAIN/==/ }"
if ! stack_complete; then
  # The forks come as source archives: first themselves, with the setuptools that is here, then what
  # they need, in the usual way.
  pip_install "the $stack stack" --no-deps --no-build-isolation "$MMENGINE" "$MMDET" "$MMPRETRAIN"
  pip_install "the $stack stack" "$MMENGINE" "$MMCV" "$MMDET" "$MMPRETRAIN"
  # opencv-python and opencv-python-headless own the same files and the former needs libGL. Removing
  # one breaks the other, so both go and the latter comes back.
  run_logged OpenCV "$py" -m pip uninstall --yes opencv-python opencv-contrib-python \
    opencv-python-headless
  pip_install OpenCV --no-deps opencv-python-headless
fi

# ---- 5 mmprecond ---------------------------------------------------------------------------------
stage 'mmprecond itself (editable) and the tools for its tests'
pip_install mmprecond --no-build-isolation --editable '.[dev]'
pip_install setuptools 'setuptools>=80,<81'

# ---- 6 does it work? -----------------------------------------------------------------------------
stage 'checking'
if ! "$py" -I -c 'import torch, mmcv._ext; from mmcv.ops import nms, roi_align' >>"$log" 2>&1; then
  rm -f -- "$mmcv_stamp"
  die "mmcv's compiled operators (mmcv._ext) do not load: rm -r $(printf '%q' "$wheels/$key") and run\
 this again to compile them anew (log: $log_shown)"
fi
versions=$("$py" -I - "$MMENGINE" "$MMCV" "$MMDET" "$MMPRETRAIN" 2>>"$log" <<'PY'
import platform, sys, warnings
from importlib import metadata
warnings.simplefilter('ignore')
import cv2, mmcv, mmdet, mmengine, mmpretrain, torch, torchvision  # all must import
stack = [pin.split('==')[0] for pin in sys.argv[1:]]
print('  Python %s, torch %s, torchvision %s, numpy %s, opencv-python-headless %s' % (
    platform.python_version(), torch.__version__, torchvision.__version__,
    metadata.version('numpy'), metadata.version('opencv-python-headless')))
print('  ' + ', '.join('%s %s' % (name, metadata.version(name)) for name in [*stack, 'mmprecond']))
PY
) || die "the environment is complete but does not import: see the end of $log_shown"
state_text >"$stamp"

say "Ready after $(minutes $SECONDS): $(shown "$venv") ($stack stack, mmcv with $accelerator operators)"
say "$versions"
if [ "$stack" = openmmlab ]; then
  say "To resume a run with this stack, set TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1."
fi
say "Activate it with: source $(printf '%q' "$venv/bin/activate")"
ended=yes
