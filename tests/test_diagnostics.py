"""Forecasts of memory and operations against what training then takes."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmprecond import diagnostics
from mmprecond.curvature.conv import Conv2dLayer
from mmprecond.optimizers import (
    FSGD,
    KFAC,
    MAC,
    NKFAC,
    AdaAFOpt,
    AdamR,
    NysAct,
    PreconditionedOptimizer,
)
from tests.support.attention import feature_map, shift_window
from tests.support.forecasts import compare
from tests.support.paths import ROOT


class Net(nn.Module):
    """Convolutions by shifted products and by patches, linear layers on rows and tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.body = nn.Conv2d(16, 24, 3, padding=1, bias=False)
        self.wide = nn.Conv2d(24, 64, 1)
        self.tokens = nn.Linear(64, 48)
        self.head = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(torch.relu(self.body(torch.relu(self.stem(x)))))
        return self.head(torch.relu(self.tokens(x.flatten(2).mT)).mean(1))


@pytest.mark.parametrize(
    'kind, options',
    [
        (NKFAC, {}),
        (FSGD, {}),
        (AdamR, {}),
        (NKFAC, dict(max_dim=50, oversize='block')),
        (NKFAC, dict(max_dim=50, oversize='lowrank', max_rank=20)),
        (KFAC, dict(reduction='sample', stat_decay=0.5)),
        (NysAct, dict(rank=12)),
    ],
    ids=str,
)
@pytest.mark.parametrize('few_rows', [1, 10**9])
def test_forecasts_are_within_a_fifth(
    kind: type[PreconditionedOptimizer],
    options: dict[str, Any],
    few_rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Conv2dLayer, 'few_rows', few_rows)
    torch.manual_seed(0)
    compare(kind, Net(), (torch.randn(4, 3, 24, 24),), **options)


@pytest.mark.parametrize('variant', ['thesis', 'gauss_newton'])
def test_forecasts_of_attention(variant: str) -> None:
    block = shift_window()
    compare(AdaAFOpt, block, (feature_map((9, 9)), (9, 9)), variant=variant)


class Attending(nn.Module):
    """A fused attention, which has to be read again."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


@pytest.mark.parametrize('kind', [MAC, AdaAFOpt])
def test_forecasts_of_fused_attention(kind: type[PreconditionedOptimizer]) -> None:
    compare(kind, Attending(), (torch.randn(3, 20, 32),))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, '-m', 'mmprecond.diagnostics', *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_the_command() -> None:
    config = 'configs/quickstart/faster-rcnn_r18_fpn_shapes_narrow.py'
    options = ['--precondition', 'AFOpt+NKFAC', '--size', '96', '128', '--batch', '2']
    done = run(config, *options)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    start = next(k for k, line in enumerate(lines) if 'step GFLOP' in line)
    assert lines[start - 3].startswith('FasterRCNN, batch 2 of 96 x 128 px, on cpu: NKFAC on')
    assert 'captures every 20 steps, refreshes every 200' in lines[start - 3]
    assert 'preconditioning adds' in lines[start - 2]
    rows = [line.split() for line in lines[start + 1 :]]
    assert {row[0] for row in rows} >= {'backbone.layer1', 'rpn_head.rpn_conv'}
    shares = [float(row[-1]) for row in rows]
    assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(100, abs=1)
    whole = run(config, *options, '--layers', '--suggest')
    table, _, advice = whole.stdout.partition('with other settings')
    by_name = {line.split()[0]: line.split() for line in table.splitlines() if line.strip()}
    assert by_name['rpn_head.rpn_conv'][2] == '5'  # levels
    shares = [float(line.split(': ')[1].split()[0]) for line in advice.strip().splitlines()[1:]]
    assert len(shares) >= 3 and shares == sorted(shares)
    # Settings are compared on the same batch: the best costs no more than the config's own.
    assert shares[0] < float(lines[start - 2].split('adds ')[1].split()[0])
    usual = run(config)
    assert usual.returncode == 0 and 'NKFAC on ' in usual.stdout  # as the constructor does
    done = run(config, '--optimizer', 'SGD')
    assert done.returncode == 2 and 'trains with SGD, which has no preconditioner' in done.stderr


@pytest.mark.parametrize('option', ['--work-dir', '--launcher'])
def test_the_command_refuses_what_it_does_not_use(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, 'argv', ['diagnostics', 'config.py', option, 'none'])
    with pytest.raises(SystemExit):
        diagnostics.parse_args()
    assert f'unrecognized arguments: {option}' in capsys.readouterr().err


def test_without_mmengine_one_line_says_what_to_install() -> None:
    script = (
        "import runpy, sys; sys.modules['mmengine'] = None; "
        "runpy.run_module('mmprecond.diagnostics', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode and not done.stdout
    (line,) = done.stderr.splitlines()
    assert '`pip install onedl-mmengine`' in line and 'print(optimizer.report())' in line


def test_rows_are_stages_or_layers() -> None:
    model = Task(Net())
    curvature = NKFAC(model, lr=0.1).curvature
    batch = dict(x=torch.randn(2, 3, 24, 24), mode='loss')
    costs, _ = diagnostics.forecast(model, curvature.layers, curvature.capture, batch)
    headers, rows = diagnostics.table(curvature.layers, costs, whole=True)
    assert headers[0] == 'layer' and {len(row) for row in rows} == {len(headers)}
    assert {row[0] for row in rows} == {layer.name.removesuffix('.weight') for layer in costs}
    assert diagnostics.table(curvature.layers, costs)[0][0] == 'stage'


def test_frozen_layers_cost_nothing() -> None:
    model = Task(Net())
    model.network.wide.requires_grad_(False)
    optimizer = NKFAC(model, lr=0.1)
    layers, capture = optimizer.curvature.layers, optimizer.curvature.capture
    batch = dict(x=torch.randn(2, 3, 24, 24), mode='loss')
    costs, own = diagnostics.forecast(model, layers, capture, batch)
    assert 'network.wide.weight' not in {layer.name for layer in costs} and own > 0
    assert sorted(layer.name for layer in costs) == sorted(
        layer.name for layer in layers if layer.weight.requires_grad
    )


class Task(nn.Module):
    """A network that is called with a mode."""

    def __init__(self, network: Net) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, mode: str) -> Tensor:
        return self.network(x)
