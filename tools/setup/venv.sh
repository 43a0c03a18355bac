# Sets venv, the environment's folder: MMPRECOND_VENV, or .venv; relative to the project's root.
# Sourced by setup_env.sh, test.sh, quickstart.sh, distributed.sh and gpu_check.sh, after `root` is set.
# shellcheck shell=bash

venv=${MMPRECOND_VENV:-.venv}
case $venv in /*) ;; *) venv=$root/$venv ;; esac
venv=${venv%/}
