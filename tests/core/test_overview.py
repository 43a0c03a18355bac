"""The overview in the log: refusals on top, stages with folded layers, norms in one line."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from torch import nn

from mmprecond.core.overview import stage_of
from mmprecond.optimizers import NKFAC


class Net(nn.Module):
    """Two stages, a head, and a convolution that cannot be read."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict(
            {
                f'layer{k}': nn.Sequential(
                    nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)
                )
                for k in (1, 2)
            }
        )
        self.embed = nn.Embedding(4, 3)
        self.head = nn.ModuleDict({'fc': nn.Linear(3, 300)})


def test_an_overview() -> None:
    model = Net()
    model.backbone['layer1'].requires_grad_(False)
    optimizer = NKFAC(model, lr=0.1, max_dim=200, oversize='one_sided')
    lines = optimizer.report().splitlines()
    assert lines[0].startswith('mmprecond attached NKFAC to 5 layers of Net')
    assert lines[1] == 'plain rule: 1 x Embedding, type is not supported (embed)'
    assert lines[2].split() == ['stage', 'preconditioner', 'parameters', 'MB']
    rows = {line.split()[0]: line for line in lines[3:-1]}
    assert '2 x NKFAC (frozen, costs nothing)' in rows['backbone.layer1']
    assert '2 x NKFAC ' in rows['backbone.layer2'] and ' 21 ' in rows['backbone.layer2']
    assert '1 x NKFAC (one side: the other is over max_dim=200)' in rows['head.fc']
    assert lines[-1] == 'plain rule: 2 BatchNorm2d'
    assert 'embed' in optimizer.table() and optimizer.table() not in optimizer.report()


def test_equal_refusals_are_one_line() -> None:
    model = nn.Sequential(nn.Linear(2, 2), *(nn.Embedding(2, 2) for _ in range(4)))
    text = NKFAC(model, lr=0.1).report()
    assert 'plain rule: 4 x Embedding, type is not supported (1, 2 and 2 more)' in text


@pytest.mark.parametrize(
    ('name', 'stage'),
    [
        ('backbone.layer4.0.conv1.weight', 'backbone.layer4'),
        ('backbone.stages.3.blocks.0.ffn.weight', 'backbone.stages.3'),
        ('neck.fpn_convs.0.conv.weight', 'neck.fpn_convs'),
        ('0.weight', '0'),
    ],
)
def test_stages(name: str, stage: str) -> None:
    assert stage_of(name) == stage


def test_the_whole_table_is_beside_the_log(tmp_path: Path) -> None:
    pytest.importorskip('mmengine')
    from mmengine.logging import MMLogger
    from mmengine.optim import build_optim_wrapper

    from mmprecond import engine

    assert engine is not None  # registers the constructor
    known = copy.copy(MMLogger._instance_dict)
    try:
        MMLogger.get_instance('overview', log_file=str(tmp_path / 'run.log'))
        optimizer = dict(type='NKFAC', lr=0.1)
        cfg = dict(constructor='PrecondOptimWrapperConstructor', optimizer=optimizer)
        wrapper = build_optim_wrapper(Net(), copy.deepcopy(cfg))
        second = build_optim_wrapper(Net(), cfg)
    finally:
        MMLogger._instance_dict.clear()
        MMLogger._instance_dict.update(known)
    tables = [built.optimizer.table() + '\n' for built in (wrapper, second)]
    assert (tmp_path / 'layers.txt').read_text() == ''.join(tables)
    log = (tmp_path / 'run.log').read_text()
    assert 'every module: ' in log and '2 BatchNorm2d' in log and 'embed  ' not in log


def test_a_model_whose_layers_are_all_frozen_has_a_report() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    model[0].requires_grad_(False), model[2].requires_grad_(False)
    assert 'which hold 0.0 % of' in NKFAC(model, lr=0.1).report()
