"""Puts configs and tools into the package; all else about it is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class BuildWithConfigs(build_py):
    """Puts configs and tools where OpenMMLab looks for those of a package: its `.mim` folder."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / 'mmprecond' / '.mim'
        shutil.rmtree(target, ignore_errors=True)
        ignored = shutil.ignore_patterns('__pycache__', '*.pyc')
        for folder in ('configs', 'tools'):
            shutil.copytree(ROOT / folder, target / folder, ignore=ignored)
        shutil.copy(ROOT / 'model-index.yml', target)


setup(cmdclass={'build_py': BuildWithConfigs}, zip_safe=False)
