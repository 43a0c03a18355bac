"""Configs of installed toolboxes: found by name, and nothing is ever installed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from mmengine.config import Config

from mmprecond.engine import launch
from mmprecond.engine.toolboxes import find_config, installed

CONFIG = 'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'


@pytest.fixture(autouse=True)
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting a process, such as pip, is an error."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError(f'a process was started: {args}')

    monkeypatch.setattr(subprocess, 'Popen', refuse)


@pytest.fixture
def toolbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package mmfake with one config, whose distribution has another name."""
    file = tmp_path / 'mmfake/.mim/configs/small/model_one.py'
    file.parent.mkdir(parents=True)
    file.write_text('answer = 42\n')
    (tmp_path / 'mmfake/__init__.py').write_text('raise AssertionError("imported")\n')
    info = tmp_path / 'other_mmfake-1.0.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text('Metadata-Version: 2.1\nName: other-mmfake\nVersion: 1.0\n')
    (info / 'top_level.txt').write_text('mmfake\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    return file


@pytest.mark.parametrize('name', ['small/model_one.py', 'small/model_one'])
def test_a_config_of_a_package_of_any_stack(toolbox: Path, name: str) -> None:
    assert find_config(f'mmfake::{name}') == toolbox
    assert launch.load_config(f'mmfake::{name}').answer == 42
    assert 'mmfake' in installed()


def test_our_own_configs_have_names() -> None:
    file = find_config('mmprecond::mask_rcnn/mask-rcnn_r50_fpn_1x_coco_nkfac')
    assert file.is_file() and 'mmprecond' in installed()


def test_the_config_is_that_of_the_toolbox() -> None:
    pytest.importorskip('mmdet')
    assert launch.load_config(f'mmdet::{CONFIG}').model.type == 'FasterRCNN'
    assert isinstance(launch.load_config(f'mmdet::{CONFIG[:-3]}'), Config)
    assert {'mmdet', 'mmpretrain'} <= set(installed())


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('mmfakes::small/model_one.py', r"no toolbox 'mmfakes' .*did you mean mmfake.*installed: "),
        ('mmfake::small/model_on.py', 'no config small/model_on.py; did you mean small/model_one.'),
        ('mmfake::', 'mmfake has no config'),
        ('json::x.py', "no toolbox 'json' is installed"),
        ('a b::x.py', "no toolbox 'a b' is installed"),
        ('nowhere.py', r'no config nowhere.py; give a file, or TOOLBOX::.* for one of .*mmfake'),
    ],
)
def test_what_is_missing_is_said_in_one_line(toolbox: Path, name: str, message: str) -> None:
    with pytest.raises(FileNotFoundError, match=message) as caught:
        launch.load_config(name)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    'text', ["_base_ = 'mmprecond::nothing/there.py'\n", 'model = dict(type=undefined)\n']
)
def test_a_config_that_cannot_be_read_is_named(text: str, tmp_path: Path) -> None:
    file = tmp_path / 'broken.py'
    file.write_text(text)
    with pytest.raises(ValueError, match='broken.py cannot be read: ') as caught:
        launch.load_config(str(file))
    assert '\n' not in str(caught.value)
