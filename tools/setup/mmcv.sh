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
