# The pinned set, and what of it the environment holds. Sourced by setup_env.sh.
# shellcheck shell=bash

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

all_in_place() {  # the pinned versions are there and mmcv loads, with its operators in a whole set-up
  "$py" -I - "$part" "torch==$TORCH" "torchvision==$TORCHVISION" "${PACKAGES[@]}" 2>/dev/null <<'PY'
import sys
from importlib import metadata
for pin in sys.argv[2:]:
    name, version = pin.split('==')
    assert metadata.version(name).split('+')[0] == version
metadata.version('mmprecond')
import torch
import mmcv
if sys.argv[1] == 'all':
    import mmcv._ext
PY
}

state_text() {  # state_text PART: what this set-up depends on; the stamp holds it
  printf 'stack=%s\npart=%s\nroot=%s\ngpu=%s\ncuda_ops=%s\npins=%s\n' "$stack" "$1" "$root" "$gpu" \
    "${MMPRECOND_MMCV_CUDA:-auto}" "$(
      {
        printf '%s\n' "$TORCH" "$TORCHVISION" "${BUILD_TOOLS[@]}" "${CONSTRAINTS[@]}" \
          "$MMENGINE" "$MMCV" "$MMDET" "$MMPRETRAIN"
        sed -n "/^\[project\]/,/^\[tool/p" pyproject.toml
      } | cksum
    )"
}

choose_part() {  # choose_part all|classification: sets part, and PACKAGES, the stack's pins
  part=$1
  PACKAGES=("$MMENGINE" "$MMCV" "$MMPRETRAIN")
  [ "$part" = classification ] || PACKAGES+=("$MMDET")
}

stack_complete() {  # the pinned versions, and nothing that they need is missing but opencv-python
  local pin
  for pin in "${PACKAGES[@]}" "opencv-python-headless==$OPENCV"; do
    [ "$(installed "${pin%%==*}")" = "${pin##*==}" ] || return 1
  done
  [ -z "$(installed opencv-python)$(installed opencv-contrib-python)" ] || return 1
  ! { "$py" -m pip check 2>/dev/null || true; } \
    | grep -vqE 'requires opencv-python, which is not installed|^No broken requirements'
}

check_environment() {  # ends where all is in place; refuses a folder that is no environment of ours
  if [ -e "$venv" ]; then
    if [ -x "$py" ]; then
      "$py" -I -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null \
        || die "the Python in $(shown "$venv") is not of 3.10 to 3.13 or does not run: remove that\
 folder and run this again"
      refuse_other_family
      # A whole environment has all that classification needs.
      if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(state_text all)" ]; then choose_part all; fi
      if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(state_text "$part")" ] && all_in_place; then
        [ -n "$quiet" ] || say "All in place: $(shown "$venv") ($stack stack)." \
          "Activate it with: source $(printf '%q' "$venv/bin/activate")"
        exit 0
      fi
    elif [ ! -d "$venv" ] || [ -n "$(ls -A -- "$venv" 2>/dev/null)" ]; then
      die "$(shown "$venv") exists and is no virtual environment: remove it, or name another folder in\
 MMPRECOND_VENV"
    fi
  fi
}
