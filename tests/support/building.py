"""The package as a wheel would have it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from .paths import ROOT


def build_package(library: Path) -> Path:
    """Builds the package into a folder; returns its `.mim` folder, with configs and tools."""
    command = [sys.executable, 'setup.py', '-q', 'build_py', '--build-lib', str(library)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return library / 'mmprecond/.mim'
