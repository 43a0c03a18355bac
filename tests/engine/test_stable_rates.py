"""Largest stable rates in the first steps: on a small model, and by the command."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch
from mmengine.optim import OptimWrapper

from mmprecond import datasets
from mmprecond.engine import stable_rates
from tests.support.classifier import Classifier, batch, build
from tests.support.commands import run_python
from tests.support.paths import ROOT

CONFIG = ROOT / 'configs/quickstart/resnet18_shapes-cls.py'


def test_steps_follow_the_rates_that_were_found() -> None:
    """At a share of the last one, with the groups' relations kept."""
    torch.manual_seed(0)
    model = Classifier()
    groups = [
        dict(params=list(model.conv.parameters()), lr=0.01),
        dict(params=[*model.norm.parameters(), *model.fc.parameters()], lr=0.1),
    ]
    wrapper = OptimWrapper(torch.optim.SGD(groups, momentum=0.9))
    found = stable_rates.measure_stable_rates(
        model, wrapper, iter(batch(seed=k) for k in range(100))
    )
    assert len(found) == stable_rates.ROUNDS
    assert all(one.bound == pytest.approx(3.8) and one.rate > 0 for one in found)
    last = stable_rates.SHARE * found[-2].rate
    rates = [group['lr'] for group in wrapper.optimizer.param_groups]
    assert rates == pytest.approx([last / 10, last])


def test_a_preconditioned_optimizer_has_a_rate_too() -> None:
    torch.manual_seed(0)
    model = Classifier()
    wrapper = build(model)
    found = stable_rates.measure_stable_rates(
        model, wrapper, iter(batch(seed=k) for k in range(100))
    )
    assert all(0 < one.rate < float('inf') for one in found)


def diagnose(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_python('-m', 'mmprecond.diagnostics', *arguments, '--suggest-lr')


@pytest.fixture
def data(tmp_path: Path) -> str:
    """The option for a few images to train on."""
    pytest.importorskip('mmpretrain')
    datasets.make_shape_folders(tmp_path, images=40, split='train', progress=False)
    return f'train_dataloader.dataset.data_root={tmp_path}/'


@pytest.mark.slow
def test_the_command_suggests_a_rate(data: str) -> None:
    done = diagnose(CONFIG, '--optimizer', 'FAdam', '--cfg-options', data)
    assert done.returncode == 0, done.stderr[-1500:]
    line = done.stdout.splitlines()[-1]
    assert re.match(r'FAdam: the largest stable learning rate is [\d.e-]+ after 10 steps', line)
    assert 0 < float(line.rsplit(' ', 1)[-1]) < 1


@pytest.mark.slow
def test_accumulation_and_a_rate_of_zero(data: str) -> None:
    wrapper = 'optim_wrapper.accumulative_counts=16'
    done = diagnose(CONFIG, '--optimizer', 'FAdam', '--cfg-options', data, wrapper)
    assert done.returncode == 0, done.stderr[-1500:]
    done = diagnose(CONFIG, '--cfg-options', data, 'optim_wrapper.optimizer.lr=0')
    assert done.returncode == 2 and 'all learning rates of the config are 0' in done.stderr


@pytest.mark.slow
def test_what_has_no_rate_is_one_line(data: str) -> None:
    done = diagnose(CONFIG, '--optimizer', 'ARO', '--cfg-options', data)
    assert done.returncode == 2
    assert 'the stable rate of ARO is not known' in done.stderr
    done = diagnose(CONFIG, '--cfg-options', 'train_dataloader=None')
    assert done.returncode == 2 and 'no train_dataloader' in done.stderr
