"""Forecasts of memory and operations against what training then takes."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

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
    done = run(config, '--precondition', 'AFOpt+NKFAC', '--size', '96', '128', '--batch', '2')
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    start = next(k for k, line in enumerate(lines) if 'step GFLOP' in line)
    rows = {line.split()[0]: line.split()[1:] for line in lines[start + 1 : -1]}
    assert rows['rpn_head.rpn_conv'][1] == '5'  # levels
    assert float(rows['all'][-3]) == pytest.approx(
        sum(float(row[-3]) for name, row in rows.items() if name != 'all'), abs=0.05
    )
    assert 'preconditioning adds' in lines[-1]
    done = run(config)
    assert done.returncode == 2 and 'trains with SGD, which has no preconditioner' in done.stderr
