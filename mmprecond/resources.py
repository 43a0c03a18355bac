"""Place of the configs and tools that belong to the package."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def find_root() -> Path:
    """Finds the folder with configs/ and tools/.

    Returns:
        The `.mim` folder of an installed package, else the top folder of a clone.

    Raises:
        FileNotFoundError: If neither is there.
    """
    for folder in (PACKAGE / '.mim', PACKAGE.parent):
        if (folder / 'configs').is_dir() and (folder / 'tools/train.py').is_file():
            return folder
    raise FileNotFoundError(
        f'{PACKAGE} has no configs and tools; install mmprecond with pip, or from a whole clone'
    )
