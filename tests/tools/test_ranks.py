"""tools/analysis_tools/ranks.py: a simulation of many ranks from the pieces of one."""

from __future__ import annotations

import subprocess
import sys

import pytest

from analysis_tools import ranks
from mmprecond.core.traffic import Messages
from mmprecond.optimizers import NKFAC, AdamR
from tests.support.mixed import Net
from tests.support.paths import ROOT

FAST = ranks.Network(bandwidth=1e12, latency=0.0)
PIECES = ranks.Pieces(iteration=1.0, capture=0.2, refresh=2.0, apply=0.1)


def test_messages_take_their_time() -> None:
    network = ranks.Network(bandwidth=1000.0, latency=1e-3)
    assert network.sum_seconds(Messages(1, 100.0), 2) == pytest.approx(0.1 + 2e-3)
    assert network.broadcast_seconds(Messages(2, 100.0), 8) == pytest.approx(0.1 + 6e-3)


def test_shares_and_memory() -> None:
    curvature = NKFAC(Net(), lr=0.1, solver='cholesky').curvature
    found = {
        mode: ranks.simulate(curvature, PIECES, FAST, 4, mode, (10, 100))
        for mode in ('none', 'refresh', 'apply')
    }
    assert found['none'][0] == pytest.approx(0.1 + 0.02 + 0.02)
    assert 0.125 <= found['refresh'][0] < found['none'][0]  # at best a quarter of the refresh
    assert found['apply'][0] < found['refresh'][0] and found['apply'][1] < found['none'][1]
    slow = ranks.Network(bandwidth=1e-3, latency=0.0)
    assert ranks.simulate(curvature, PIECES, slow, 4, 'apply', (10, 100))[0] > 1


def test_methods_that_act_after_the_rule_have_no_apply() -> None:
    assert ranks.modes_of(AdamR(Net(), lr=0.1).curvature) == ['none', 'refresh']


@pytest.mark.slow
def test_tables() -> None:
    command = [sys.executable, 'tools/analysis_tools/ranks.py', 'resnet18', '--size', '32', '32']
    done = subprocess.run(
        [*command, '--batch', '2', '--ranks', '2,8', '--iteration', '0.1'],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert 'least time' in done.stdout and '| apply ' in done.stdout


@pytest.mark.parametrize(
    'words, message',
    [
        (['--optimizer', 'SOAP'], 'measures at every step'),
        (['--intervals', '20/200,5/25'], 'takes one pair'),
        (['--intervals', '20'], 'is not like 20/200'),
        (['--latency', '0'], 'out of range'),
    ],
)
def test_what_cannot_be_simulated(
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, 'argv', ['ranks.py', 'resnet18', *words])
    with pytest.raises(SystemExit):
        ranks.parse_args()
    assert message in capsys.readouterr().err
