"""Commands of the package in processes of their own."""

from __future__ import annotations

import subprocess
import sys

from .paths import ROOT


def run_python(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs Python with some arguments in the top folder; the output is kept."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
