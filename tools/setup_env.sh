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

# ---- the pinned set ------------------------------------------------------------------------------
TORCH=2.11.0
TORCHVISION=0.26.0
BUILD_TOOLS=('pip>=25' 'setuptools>=80,<81' wheel 'packaging>=24.2' ninja psutil numpy click)
# setuptools < 81 still has pkg_resources, which mmengine 0.10.7 and mmcv 2.1.0 import.
# imaug, which the onedl stack needs, wants OpenCV < 4.13; this OpenCV wants numpy < 2.3.
OPENCV=4.12.0.88
CONSTRAINTS=("torch==$TORCH" "torchvision==$TORCHVISION" 'setuptools>=80,<81' numpy==2.2.6
  "opencv-python==$OPENCV" "opencv-contrib-python==$OPENCV" "opencv-python-headless==$OPENCV")

pins_of() {  # pins_of STACK: sets MMENGINE, MMCV, MMDET, MMPRETRAIN
  case $1 in
    onedl)
      MMENGINE=onedl-mmengine==0.10.12 MMCV=onedl-mmcv==2.3.6
      MMDET=onedl-mmdetection==3.5.1 MMPRETRAIN=onedl-mmpretrain==1.3.6 ;;
    openmmlab)
      MMENGINE=mmengine==0.10.7 MMCV=mmcv==2.1.0
      MMDET=mmdet==3.3.0 MMPRETRAIN=mmpretrain==1.2.0 ;;
    *) return 1 ;;
  esac
}

# ---- what is said --------------------------------------------------------------------------------
TOTAL_STAGES=6
stage_number=0
child='' build_tmp='' log='' log_shown='' ended=''

die() {  # one line that says what to do
  printf 'setup_env: %s\n' "$1" >&2
  ended=yes
  exit 1
}

say() { printf '%s\n' "$*"; }

stage() {
  stage_number=$((stage_number + 1))
  say "[$stage_number/$TOTAL_STAGES] $*"
}

minutes() { printf '%d min %02d s' $(($1 / 60)) $(($1 % 60)); }

shown() {  # a path, relative to the project's root where it lies inside
  case $1 in
    "$root"/*) printf '%s' "${1#"$root"/}" ;;
    *) printf '%s' "$1" ;;
  esac
}

stop_child() {
  [ -n "$child" ] || return 0
  # The child leads its own process group (setsid), so its compilers end with it.
  kill -TERM -- "-$child" 2>/dev/null || kill -TERM "$child" 2>/dev/null || true
  wait "$child" 2>/dev/null || true
  child=''
}

on_exit() {
  local code=$?
  trap - EXIT
  stop_child
  [ -z "$build_tmp" ] || rm -rf -- "$build_tmp"
  if [ "$code" -ne 0 ] && [ -z "$ended" ]; then
    printf 'setup_env: stopped before the end%s; run it again to go on from there\n' \
      "${log_shown:+ (log: $log_shown)}" >&2
  fi
  exit "$code"
}

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
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
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
gpu_seen() {  # prints the GPUs and the driver; empty without a GPU
  command -v nvidia-smi >/dev/null || return 0
  local seen
  seen=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null) || return 0
  printf '%s' "$seen" | sort -u | tr '\n' ';'
}

free_gb() {  # free_gb FOLDER: whole GB free on its disk, for a folder that need not exist yet
  local dir=$1
  while [ ! -d "$dir" ]; do dir=$(dirname -- "$dir"); done
  df -Pk -- "$dir" 2>/dev/null | awk 'NR == 2 { print int($4 / 1048576); n = 1 }
                                      END { if (!n) print 9999 }' || printf '9999\n'
}

cuda_home() {  # prints the folder of a CUDA toolkit that can compile
  local nvcc home
  nvcc=$(command -v nvcc) && nvcc=$(readlink -f -- "$nvcc") || nvcc=''
  for home in "${CUDA_HOME:-}" "${nvcc%/bin/nvcc}" /usr/local/cuda; do
    if [ -n "$home" ] && [ -x "$home/bin/nvcc" ] && [ -f "$home/include/cuda_runtime.h" ]; then
      printf '%s' "$home"
      return 0
    fi
  done
  return 1
}

find_python() {  # prints the path of the first usable Python
  local candidate found
  for candidate in ${MMPRECOND_PYTHON:+"$MMPRECOND_PYTHON"} \
    python3.11 python3 python3.12 python3.10 python3.13 python; do
    found=$("$candidate" -c 'import sys
if (3, 10) <= sys.version_info < (3, 14): print(sys.executable)' 2>/dev/null) || found=''
    if [ -n "$found" ]; then
      printf '%s' "$found"
      return 0
    fi
    if [ -n "${MMPRECOND_PYTHON:-}" ]; then return 1; fi
  done
  return 1
}

python_tag() { "$1" -c 'import sys; print("cp%d%d" % sys.version_info[:2])'; }

wheel_key() {  # wheel_key PYTHON_TAG ACCELERATOR
  printf '%s' "${MMCV/==/-}-$1-torch$TORCH-$2-$(uname -m)"
}

has_ops() {  # has_ops PYTHON WHEEL: an intact wheel with compiled operators
  "$1" -I - "$2" 2>/dev/null <<'PY'
import sys, zipfile
with zipfile.ZipFile(sys.argv[1]) as wheel:
    names = wheel.namelist()
sys.exit(not any(n.startswith('mmcv/_ext') and n.endswith('.so') for n in names))
PY
}

is_there() { [ -e "$1" ]; }  # called with a pattern: something matches it

cached_wheel() {  # cached_wheel PYTHON KEY: prints the wheel's path
  local wheel
  for wheel in "$wheels/$2"/*.whl; do
    if [ -f "$wheel" ] && has_ops "$1" "$wheel"; then
      printf '%s' "$wheel"
      return 0
    fi
  done
  return 1
}

installed() {  # prints the version of a distribution in the environment, or nothing
  "$py" -I - "$1" 2>/dev/null <<'PY' || true
import sys
from importlib import metadata
try:
    print(metadata.version(sys.argv[1]))
except metadata.PackageNotFoundError:
    pass
PY
}

refuse_other_family() {
  local other
  other=$("$py" -I - "$stack" <<'PY'
import re, sys
from importlib import metadata
families = {
    'onedl': {'onedl-mmengine', 'onedl-mmcv', 'onedl-mmdetection', 'onedl-mmpretrain'},
    'openmmlab': {'mmengine', 'mmengine-lite', 'mmcv', 'mmcv-lite', 'mmcv-full', 'mmdet', 'mmpretrain'},
}
found = {re.sub(r'[-_.]+', '-', d.metadata['Name'] or '').lower() for d in metadata.distributions()}
other = 'openmmlab' if sys.argv[1] == 'onedl' else 'onedl'
clash = sorted(found & families[other])
if clash:
    print(other, ', '.join(clash))
PY
  ) || die "the Python in $(shown "$venv") does not run: remove that folder and run this again"
  [ -z "$other" ] || die "$(shown "$venv") holds the ${other%% *} stack (${other#* }), which shares\
 import names with $stack: set MMPRECOND_VENV=.venv-$stack to make a second environment, or remove\
 $(shown "$venv") first"
}

all_in_place() {  # the pinned versions are there and mmcv's operators load
  "$py" -I - "torch==$TORCH" "torchvision==$TORCHVISION" "$MMENGINE" "$MMCV" "$MMDET" "$MMPRETRAIN" \
    2>/dev/null <<'PY'
import sys
from importlib import metadata
for pin in sys.argv[1:]:
    name, version = pin.split('==')
    assert metadata.version(name).split('+')[0] == version
metadata.version('mmprecond')
import torch
import mmcv._ext
PY
}

state_text() {  # what this set-up depends on; the stamp holds it
  printf 'stack=%s\nroot=%s\ngpu=%s\ncuda_ops=%s\npins=%s\n' "$stack" "$root" "$gpu" \
    "${MMPRECOND_MMCV_CUDA:-auto}" "$(
      {
        printf '%s\n' "$TORCH" "$TORCHVISION" "${BUILD_TOOLS[@]}" "${CONSTRAINTS[@]}" \
          "$MMENGINE" "$MMCV" "$MMDET" "$MMPRETRAIN"
        sed -n "/^\[project\]/,/^\[tool/p" pyproject.toml
      } | cksum
    )"
}

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

check_compiler() {  # mmcv will be compiled: with what?
  local cxx=${CXX:-g++} cc=${CC:-gcc} include
  # CXX and CC may hold a launcher or flags: "ccache g++".
  { command -v "${cxx%% *}" && command -v "${cc%% *}"; } >/dev/null \
    || die "no C++ compiler (gcc, g++) found, which mmcv needs: install one (Debian, Ubuntu: apt-get\
 install g++; Fedora: dnf install gcc-c++) and run this again"
  include=$("$base_python" -I -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
  [ -f "$include/Python.h" ] || die "Python.h is missing, which mmcv is compiled against: install the\
 headers of this Python (Debian, Ubuntu: apt-get install\
 $("$base_python" -I -c 'import sys; print("python%d.%d-dev" % sys.version_info[:2])'))"
  if [ -n "$want_cuda" ]; then
    cuda_home >/dev/null || die "a GPU is seen, but no nvcc to compile mmcv's CUDA operators: install\
 the CUDA toolkit (nvcc on PATH, or CUDA_HOME set), or set MMPRECOND_MMCV_CUDA=0 to train on the CPU"
  fi
}

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

pip_progress() {  # the last [n/m] of ninja, if there is one
  tail -n "+$log_mark" -- "$log" | tail -c 300000 | grep -aoE '^ *\[[0-9]+/[0-9]+\]' | tail -n 1 \
    | tr -d ' []' || true
}

explain_failure() {  # explain_failure WHAT: why the last command in the log failed, in one line
  local what=$1 part last
  part=$(tail -n "+$log_mark" -- "$log" | tail -c 2000000)
  if grep -qaiE 'No space left on device|Disk quota exceeded' <<<"$part"; then
    die "the disk ran full while installing $what: free about 12 GB and run this again"
  elif grep -qaE 'NewConnectionError|NameResolutionError|ConnectTimeout|ReadTimeout|ProxyError|SSLError|Max retries exceeded|Temporary failure in name resolution|Network is unreachable|Connection (reset|aborted|refused)|IncompleteRead|Failed to establish a new connection' <<<"$part"; then
    die "no network while installing $what: check the connection and the proxy (HTTPS_PROXY, pip\
 config list), then run this again; it goes on from there (log: $log_shown)"
  elif grep -qaE 'No matching distribution found' <<<"$part"; then
    last=$(grep -aE 'No matching distribution found' <<<"$part" | tail -n 1)
    die "${last#ERROR: }: the package index that pip uses has none for this Python and system; check\
 pip config list (log: $log_shown)"
  elif grep -qaE 'Killed signal|fatal error: Killed|internal compiler error: Killed|out of memory' <<<"$part"; then
    die "the memory ran out while installing $what: run this again with MAX_JOBS=1 (log: $log_shown)"
  fi
  last=$({ grep -aE '(^|[^a-z])error: ' <<<"$part" || grep -aE '^ *ERROR: ' <<<"$part"; } | head -n 1 \
    | cut -c1-200 | sed 's/^ *//') || true
  die "installing $what failed${last:+ ($last)}: see the end of $log_shown"
}

run_logged() {  # run_logged WHAT COMMAND...: output to the log, a sign of life every 30 seconds
  local what=$1 began=$SECONDS next done_of code=0
  shift
  printf '\n### %s\n' "$*" >>"$log"
  log_mark=$(wc -l <"$log")
  log_mark=$((log_mark + 1))
  if command -v setsid >/dev/null; then setsid "$@" >>"$log" 2>&1 & else "$@" >>"$log" 2>&1 & fi
  child=$!
  next=$((began + 30))
  while kill -0 "$child" 2>/dev/null; do
    sleep 0.5
    if [ "$SECONDS" -ge "$next" ]; then
      done_of=$(pip_progress)
      say "      $what: $(minutes $((SECONDS - began)))${done_of:+, file ${done_of/\// of }}"
      next=$((next + 30))
    fi
  done
  wait "$child" || code=$?
  child=''
  [ "$code" -eq 0 ] || explain_failure "$what"
}

pip_install() {  # pip_install WHAT ARGS...
  local what=$1
  shift
  run_logged "$what" "$py" -m pip install -c "$constraints" "$@"
}

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

build_mmcv() {
  local jobs=${MAX_JOBS:-} memory_gb force_cuda=0 began=$SECONDS home cuda_major
  local -a cuda
  check_compiler
  if [ -z "$jobs" ]; then
    jobs=$(nproc 2>/dev/null || echo 1)
    # One compiler process takes up to 2 GB.
    memory_gb=$(awk '/^MemAvailable:/ { print int($2 / 1048576) }' /proc/meminfo 2>/dev/null || true)
    if [ -n "$memory_gb" ] && [ "$jobs" -gt $((memory_gb / 2)) ]; then jobs=$((memory_gb / 2)); fi
    [ "$jobs" -ge 1 ] || jobs=1
  fi
  if [ "$accelerator" = cpu ]; then
    cuda=(CUDA_VISIBLE_DEVICES=)  # mmcv compiles CUDA operators wherever torch sees a GPU
  else
    force_cuda=1
    home=$(cuda_home)
    cuda_major=$("$home/bin/nvcc" --version | sed -n 's/.*release \([0-9]*\)\..*/\1/p')
    case $accelerator in
      cu"$cuda_major"[0-9]*) ;;
      *) die "nvcc is of CUDA ${cuda_major:-?}, torch $TORCH of ${accelerator%%-*}: install the CUDA\
 toolkit of that major version and set CUDA_HOME, or set MMPRECOND_MMCV_CUDA=0 to train on the CPU" ;;
    esac
    cuda=("CUDA_HOME=$home")
  fi
  build_tmp=$(mktemp -d "$wheels/.build.XXXXXX")
  # --no-cache-dir: pip's own cache of built wheels does not know for which torch a wheel was built.
  run_logged mmcv env MAX_JOBS="$jobs" MMCV_WITH_OPS=1 FORCE_CUDA="$force_cuda" \
    NINJA_STATUS='[%f/%t] ' "${cuda[@]}" \
    "$py" -m pip -v wheel --no-deps --no-build-isolation --no-cache-dir --no-binary :all: \
    --wheel-dir "$build_tmp" "$MMCV"
  if ! is_there "$build_tmp"/*.whl || ! has_ops "$py" "$build_tmp"/*.whl; then
    die "mmcv was built without its compiled operators: see the end of $log_shown"
  fi
  rm -rf -- "${wheels:?}/$key"
  mv -- "$build_tmp" "$wheels/$key"
  build_tmp=''
  wheel=$(cached_wheel "$py" "$key") || die "the new wheel in $(shown "$wheels/$key") cannot be read:\
 check that disk"
  say "      mmcv: built in $(minutes $((SECONDS - began))), kept in $(shown "$wheels/$key")"
}

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
stack_complete() {  # the pinned versions, and nothing that they need is missing but opencv-python
  local pin
  for pin in "$MMENGINE" "$MMCV" "$MMDET" "$MMPRETRAIN" "opencv-python-headless==$OPENCV"; do
    [ "$(installed "${pin%%==*}")" = "${pin##*==}" ] || return 1
  done
  [ -z "$(installed opencv-python)$(installed opencv-contrib-python)" ] || return 1
  ! { "$py" -m pip check 2>/dev/null || true; } \
    | grep -vqE 'requires opencv-python, which is not installed|^No broken requirements'
}

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
