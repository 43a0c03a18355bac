# Wheels of mmcv: those in the cache, and a new one. Sourced by setup_env.sh.
# shellcheck shell=bash

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

choose_flags() {  # sets flags for the compiler: no debug information, torch's headers parsed once
  local cxx=${CXX:-c++} headers=$build_tmp/headers includes
  # A CFLAGS replaces Python's own flags: the user's, else those.
  flags="$("$py" -I -c 'import sysconfig; print(sysconfig.get_config_var("CFLAGS") or "")')"
  flags="${CFLAGS:-$flags} -g0"
  # Most of the time goes into torch's headers, which each of 78 files includes. GCC can read them
  # from a precompiled header; one that does not fit is ignored, and the files include them anew.
  { [ "$accelerator" = cpu ] && $cxx --version | grep -q 'Free Software Foundation'; } || return 0
  case $headers in *[[:space:]]*) return 0 ;; esac  # flags are split at spaces
  mkdir -- "$headers"
  printf '#include <torch/types.h>\n' >"$headers/torch_types.h"
  includes=$("$py" -I -c 'import sysconfig; from torch.utils.cpp_extension import include_paths
print(*("-I" + p for p in [*include_paths(), sysconfig.get_paths()["include"]]))')
  # shellcheck disable=SC2086
  if $cxx $flags -fPIC -std=c++17 -DTORCH_API_INCLUDE_EXTENSION_H -DTORCH_EXTENSION_NAME=_ext \
    $includes -x c++-header "$headers/torch_types.h" -o "$headers/torch_types.h.gch" >>"$log" 2>&1; then
    flags+=" -I$headers -include torch_types.h"
  fi
}

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
  choose_flags
  # --no-cache-dir: pip's own cache of built wheels does not know for which torch a wheel was built.
  run_logged mmcv env MAX_JOBS="$jobs" MMCV_WITH_OPS=1 FORCE_CUDA="$force_cuda" \
    NINJA_STATUS='[%f/%t] ' CFLAGS="$flags" CXXFLAGS="$flags" "${cuda[@]}" \
    "$py" -m pip -v wheel --no-deps --no-build-isolation --no-cache-dir --no-binary :all: \
    --wheel-dir "$build_tmp" "$MMCV"
  rm -rf -- "$build_tmp/headers"
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

choose_accelerator() {  # sets accelerator: cpu, or the CUDA and GPUs that torch can use
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
}

install_mmcv() {  # from the cache, or compiled
  choose_accelerator
  key=$(wheel_key "$tag" "$accelerator")
  wheel=$(cached_wheel "$py" "$key") || wheel=''

  if [ -n "$wheel" ]; then
    stage "${MMCV/==/ } (wheel from the cache, $accelerator operators)"
  else
    stage "${MMCV/==/ }: compiling it with $accelerator operators, 4 to 8 minutes on 2 cores"
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
}

install_mmcv_without_operators() {
  accelerator=no
  stage "${MMCV/==/ }, without its compiled operators"
  if [ "$(installed "${MMCV%%==*}")" != "${MMCV##*==}" ]; then
    # Built in a place of its own, where it finds no torch to compile against.
    pip_install mmcv --no-deps --no-binary "${MMCV%%==*}" "$MMCV"
  fi
  printf 'no operators\n' >"$mmcv_stamp"
}
