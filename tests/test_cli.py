"""The command `mmprecond`, and the place of configs and tools in a clone and in a wheel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmprecond import cli
from mmprecond.resources import find_root
from tests.support.building import build_package
from tests.support.paths import ROOT


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Exit status of a command."""
    monkeypatch.setattr(sys, 'argv', ['mmprecond', *words])
    monkeypatch.setattr(sys, 'path', list(sys.path))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize('command', cli.COMMANDS)
def test_every_command_is_a_script(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip('mmengine')
    assert call(monkeypatch, command, '--help') == 0
    text = capsys.readouterr().out
    assert text.startswith(f'usage: mmprecond {command} ')


def test_mistakes_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, 'trian') == 2
    assert "invalid choice: 'trian'" in capsys.readouterr().err
    code = (
        'import sys; sys.modules["mmengine"] = None; sys.argv = ["mmprecond", "train", "x.py"];'
        'from mmprecond.cli import main; main()'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == 'mmprecond train needs the package mmengine, which is not installed\n'


def test_a_module_that_a_running_training_lacks_is_no_missing_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv('MMPRECOND_TRACEBACK', raising=False)
    tools = tmp_path / 'tools'
    tools.mkdir()
    code = "def main():\n    raise ModuleNotFoundError('no', name='theirs')\n\nmain()\n"
    (tools / 'train.py').write_text(code)
    monkeypatch.setattr(cli, 'find_root', lambda: tmp_path)
    monkeypatch.setattr(sys, 'argv', ['mmprecond', 'train'])
    monkeypatch.setattr(sys, 'path', list(sys.path))
    with pytest.raises(ModuleNotFoundError):
        cli.main()
    (tools / 'analysis_tools').mkdir()
    (tools / 'analysis_tools/compare_runs.py').write_text(code)
    assert call(monkeypatch, 'compare') == 2  # it imports matplotlib when it draws
    (tools / 'train.py').write_text('import theirs_that_is_missing\n')
    assert call(monkeypatch, 'train') == 2
    monkeypatch.setenv('MMPRECOND_TRACEBACK', '1')
    monkeypatch.setattr(sys, 'argv', ['mmprecond', 'train'])
    with pytest.raises(ModuleNotFoundError):
        cli.main()


def test_a_clone_has_them_on_top() -> None:
    assert find_root() == ROOT


def test_a_package_without_its_configs_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr('mmprecond.resources.PACKAGE', tmp_path / 'mmprecond')
    with pytest.raises(FileNotFoundError, match='has no configs and tools; install mmprecond'):
        find_root()


def test_configs_and_tools_travel_with_the_package(tmp_path: Path) -> None:
    """In a wheel they are in `.mim`; data and results go to the current folder then."""
    pytest.importorskip('mmengine')
    library, here = tmp_path / 'library', tmp_path / 'here'
    here.mkdir()
    shipped = build_package(library)
    for path in ('configs/mask_rcnn', 'tools/train.py', 'tools/analysis_tools', 'model-index.yml'):
        assert (shipped / path).exists(), path
    code = (
        'import sys; from mmprecond.resources import find_root; root = find_root();'
        'sys.path.insert(0, str(root / "tools")); from common import ROOT, WORK;'
        'from mmprecond.engine.launch import load_config;'
        'load_config("mmprecond::mask_rcnn/mask-rcnn_r50_fpn_1x_coco_nkfac.py");'
        'print(root, ROOT, WORK)'
    )
    done = subprocess.run(
        [sys.executable, '-c', code],
        cwd=here,
        env={**os.environ, 'PYTHONPATH': str(library)},
        capture_output=True,
        text=True,
        check=False,
    )
    if 'mmdet' in done.stderr:
        pytest.skip('MMDetection is not installed')
    assert done.stdout.split() == [str(shipped), str(shipped), str(here)], done.stderr


def test_the_import_stays_cheap() -> None:
    """Beside torch: no compiler of torch, no Triton, no toolbox."""
    code = (
        'import sys, torch; sys.modules["mmengine"] = None; before = set(sys.modules);'
        'import mmprecond, mmprecond.optimizers;'
        'print(*(name for name in set(sys.modules) - before if name.split(".")[0] != "mmprecond"))'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    tops = {'.'.join(name.split('.')[:2]) for name in done.stdout.split()}
    assert not tops & {'torch._dynamo', 'torch._inductor', 'triton', 'sympy', 'mmengine'}
