"""The torch that is needed: said once, and checked at import."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmprecond.version import MIN_TORCH, check_torch
from tests.support.paths import ROOT


@pytest.mark.parametrize('version', ['2.5.1', '2.5.1+cu121', '1.13.0', '2.4.0a0+git123'])
def test_an_older_torch_is_refused_in_one_line(version: str) -> None:
    with pytest.raises(ImportError) as caught:
        check_torch(version)
    assert MIN_TORCH in str(caught.value) and '\n' not in str(caught.value)


@pytest.mark.parametrize('version', ['2.6.0', '2.11.0+cu130', '3.0.0', torch.__version__])
def test_a_newer_one_is_taken(version: str) -> None:
    check_torch(version)


def test_it_is_what_makes_the_floor() -> None:
    """Compiled models need it."""
    assert hasattr(torch.compiler, 'set_stance')
    assert hasattr(torch._C._autograd, '_get_current_graph_task_keep_graph')


def test_the_readme_and_the_package_say_the_same(tmp_path: Path) -> None:
    (said,) = set(re.findall(r'torch (\d\.\d+) or later', (ROOT / 'README.md').read_text()))
    assert said == MIN_TORCH
    done = subprocess.run(
        [sys.executable, 'setup.py', '--quiet', 'egg_info', '--egg-base', str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (requires,) = tmp_path.glob('*.egg-info/requires.txt')
    assert f'torch>={MIN_TORCH}' in requires.read_text()
