# Questions to the machine, and refusals of what cannot work. Sourced by setup_env.sh.
# shellcheck shell=bash

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

is_there() { [ -e "$1" ]; }  # called with a pattern: something matches it

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

check_machine() {  # refuses what cannot work; sets base_python, torch_there, want_cuda, tag
  local torch_version need free
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
  tag=$(python_tag "$base_python")
  [ "$part" = all ] || return 0  # nothing to compile
  if [ -n "$gpu" ] && [ "${MMPRECOND_MMCV_CUDA:-1}" != 0 ]; then want_cuda=yes; fi

  if [ -n "$want_cuda" ]; then
    # Which CUDA torch is for shows once it is installed; here any wheel for a GPU counts as one.
    is_there "$wheels/${MMCV/==/-}-$tag-torch$TORCH-cu"*/*.whl || check_compiler
  else
    cached_wheel "$base_python" "$(wheel_key "$tag" cpu)" >/dev/null || check_compiler
  fi
}
