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
