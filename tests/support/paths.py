"""Folders of the project."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / 'mmprecond'
TOOLS = ROOT / 'tools'
GOLDEN = ROOT / 'tests/golden'
