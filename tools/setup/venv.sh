# Sets venv, the environment's folder: MMPRECOND_VENV, or .venv; relative to the project's root.

venv=${MMPRECOND_VENV:-.venv}
case $venv in /*) ;; *) venv=$root/$venv ;; esac
venv=${venv%/}
