"""tools/analysis_tools/model_report.py: the picture, and the numbers behind it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from mmengine.logging import MMLogger

from analysis_tools import model_report
from analysis_tools.model_report import Stage, by_stage, draw, fold
from mmprecond import diagnostics
from mmprecond.engine import attach, launch
from mmprecond.engine.forecast_inputs import build_model
from tests.support.paths import ROOT

CONFIG = str(ROOT / 'configs/quickstart/faster-rcnn_r18_fpn_shapes_narrow.py')
SMALL = (CONFIG, '--precondition', 'NKFAC', '--size', '64', '96')


@pytest.fixture(autouse=True)
def log_as_before() -> Iterator[None]:
    """The tool hides the log's lines about parameters."""
    logger = MMLogger.get_current_instance()
    level, filters = logger.level, list(logger.filters)
    yield
    logger.setLevel(level)
    logger.filters[:] = filters


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, 'argv', ['model_report.py', *arguments])
    model_report.main()


def test_rows_sum_to_the_forecast() -> None:
    torch.manual_seed(0)
    cfg = launch.load_config(CONFIG)
    attach(cfg, 'NKFAC')
    cfg.merge_from_dict({'model.backbone.frozen_stages': 1})
    model, optimizer = build_model(cfg)
    layers, capture = optimizer.curvature.layers, optimizer.curvature.capture
    _, costs, _ = diagnostics.forecast_on_noise(model, layers, capture, 2, (96, 128))
    stages = by_stage(model, layers, costs)
    names = [stage.name for stage in stages]
    assert names.index('backbone.layer1') < names.index('backbone.layer4') < len(names) < 25

    def total(*keys: str) -> Any:
        return sum(getattr(stage, key) for stage in stages for key in keys)

    cost = diagnostics.amortised(layers, costs)
    assert total('step', 'capture', 'refresh') == pytest.approx(cost)
    assert total('megabytes') == pytest.approx(sum(cost.megabytes for cost in costs.values()))
    parameters = list(model.parameters())
    assert total('covered', 'plain', 'frozen') == sum(p.numel() for p in parameters)
    assert total('frozen') == sum(p.numel() for p in parameters if not p.requires_grad) > 0
    trained = [layer for layer in layers if layer.weight.requires_grad]
    assert total('covered') == sum(p.numel() for layer in trained for p in layer.parameters)
    rows = diagnostics.table(layers, costs)[1]
    shares = {stage.name: 100 * (stage.step + stage.capture + stage.refresh) for stage in stages}
    for name, *_, share in rows:
        assert shares[name] / cost == pytest.approx(float(share), abs=0.06)


def test_the_smallest_of_many_stages_are_summed() -> None:
    stages = [Stage(f'stage{k}', covered=k, step=1.0, megabytes=2.0) for k in range(40)]
    shown = fold(stages)
    assert len(shown) == model_report.SHOWN and fold(shown) == shown
    assert [stage.name for stage in shown[:-1]] == [f'stage{k}' for k in range(16, 40)]
    rest = shown[-1]
    assert rest.name == '16 smaller stages' and rest.covered == sum(range(16))
    assert rest.step == 16 and rest.megabytes == 32


@pytest.mark.parametrize('count', [1, 25])
def test_a_picture_of_few_and_of_many_stages(count: int, tmp_path: Path) -> None:
    stages = [Stage(f'backbone.layer{k}', 10**k % 997, k, 3, 1.0, 2.0, 3.0) for k in range(count)]
    draw(stages, 100.0, ['a model', 'words ' * 60], tmp_path / 'picture.png')
    height, width, _ = imread(tmp_path / 'picture.png').shape
    assert width > height > 300


def test_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, *SMALL)
    *_, path, line = capsys.readouterr().out.splitlines()
    assert path == 'work_dirs/model_report/faster-rcnn_r18_fpn_shapes_narrow.png'
    assert Path(path).read_bytes().startswith(b'\x89PNG')
    assert re.match(r'forward and backward pass: .* preconditioning adds .* MB of statistics', line)


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['nothing.py'], 'there is no config nothing.py'),
        ([CONFIG, '--optimizer', 'SGD'], 'trains with SGD, which has no preconditioner'),
        ([CONFIG, '--optimizer', 'NKFACC'], "unknown optimizer 'NKFACC'"),
        ([CONFIG, '--optimizer', 'NKFAC', '--precondition', 'NKFAC'], 'not to NKFAC'),
        ([CONFIG, '--size', '0', '5'], "'0' is not a whole number"),
        ([CONFIG, '--out', 'report.pdf'], '--out report.pdf is no PNG file'),
        ([*SMALL, '--out', '/proc/a.png'], 'cannot write /proc/a.png'),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, *arguments)
    errors = capsys.readouterr().err
    assert caught.value.code == 2 and message in errors and 'Traceback' not in errors
