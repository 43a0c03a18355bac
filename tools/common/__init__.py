"""Code that several tools share: tables, logs, timing, models and training runs."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
