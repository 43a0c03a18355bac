"""Data sets of drawn shapes in a folder."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from mmprecond.datasets import make_shape_folders, make_shapes


def make(out: Path, images: int = 4, size: int = 64, **kwargs: Any) -> Path:
    return make_shapes(out, images, size, progress=False, **kwargs)


def make_folders(out: Path, images: int = 4, **kwargs: Any) -> Path:
    return make_shape_folders(out, images, progress=False, **kwargs)


def digests(root: Path) -> dict[str, str]:
    """Relative path of every file below ``root`` -> digest of its bytes."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob('*'))
        if path.is_file()
    }
