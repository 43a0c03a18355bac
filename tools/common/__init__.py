"""Code that several tools share: tables, logs, timing, models and training runs."""

from pathlib import Path

#: Folder of configs/ and tools/: a clone, or `.mim` in an installed package.
ROOT = Path(__file__).resolve().parents[2]
#: Folder for data/ and work_dirs/.
WORK = Path.cwd() if ROOT.name == '.mim' else ROOT
