"""Configs of installed toolboxes. Nothing here installs a package."""

from __future__ import annotations

from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path

from ..checks import did_you_mean
from ..resources import find_root

#: Folder of a toolbox's package that holds its configs.
CONFIGS = Path('.mim/configs')


def find_config(name: str) -> Path:
    """Finds the file of a toolbox's config.

    MMEngine's `get_config` is not used: it installs missing packages, and knows the package names
    of only one of the two OpenMMLab distributions.

    Args:
        name: TOOLBOX::PATH, such as ``mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py``; the
            suffix .py is optional.

    Returns:
        The path of the file.

    Raises:
        FileNotFoundError: If the toolbox or the config is not there; the message has the nearest
            names.
    """
    toolbox, _, path = name.partition('::')
    folder = _configs_of(toolbox)
    if folder is None:
        raise FileNotFoundError(
            f'no toolbox {toolbox!r} is installed for the config {name}; '
            f'{did_you_mean(toolbox, installed())}installed: {", ".join(installed()) or "none"}'
        )
    file = folder / (path if Path(path).suffix else f'{path}.py')
    if not file.is_file():
        files = [str(known.relative_to(folder)) for known in sorted(folder.rglob('*.py'))]
        text = f'{toolbox} has no config {path}; {did_you_mean(path, files)}'
        raise FileNotFoundError(text.rstrip('; '))
    return file


def installed() -> list[str]:
    """Names of the installed packages that have configs."""
    names = {name for name in packages_distributions() if name.isidentifier()}
    return sorted(name for name in names if name[:2] == 'mm' and _configs_of(name) is not None)


def _configs_of(toolbox: str) -> Path | None:
    """Folder with the configs of a package, or None."""
    spec = find_spec(toolbox) if toolbox.isidentifier() else None
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / CONFIGS
    if toolbox == 'mmprecond' and not folder.is_dir():  # a clone
        folder = find_root() / 'configs'
    return folder if folder.is_dir() else None
