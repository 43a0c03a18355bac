"""Pieces that several tools share: tables, logs, timing, models and what is trained on them."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
