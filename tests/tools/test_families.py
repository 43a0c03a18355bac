"""tools/analysis_tools/families.py: a toolbox's own script, one option, and what its log says."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from analysis_tools import families
from common.families import FAMILIES, USUAL, make_config, make_data
from mmprecond import engine
from mmprecond.engine.toolboxes import installed

LOG = """\
11/29 10:00:00 - mmengine - WARNING - Preconditioned does not read 2 x OwnAttention as attention: \
it has no linear layers qkv and proj. Their linear layers are taken one by one.
11/29 10:00:00 - mmengine - INFO - mmprecond attached NKFAC to 71 and AFOpt to 18 layers of DETR, \
which hold 97.0 % of 41.30 M trained parameters; forecast cost: 20.4 GFLOP a step without captures
layer    treatment                                       factors  MB
a.norm   plain rule: LayerNorm, type is not supported
b.norm   plain rule: BatchNorm2d, type is not supported
a.query  plain rule: Embedding, type is not supported
b.query  plain rule: Embedding, type is not supported
"""


def test_what_a_log_says() -> None:
    assert families.attached(LOG) == ('NKFAC 71 and AFOpt 18', '97.0')
    assert families.left_to_the_rule(LOG) == (
        '2 norms; 2 Embedding (type is not supported); '
        '2 x OwnAttention as attention: it has no linear layers qkv and proj'
    )
    assert families.attached('a run that failed') == ('', '')


def test_five_families_of_each_toolbox() -> None:
    boxes = [family.toolbox for family in FAMILIES.values()]
    assert {box: boxes.count(box) for box in boxes} == dict.fromkeys(
        ('mmdet', 'mmpretrain', 'mmseg', 'mmrotate', 'mmpose'), 5
    )
    assert set(families.COMPARED) <= set(FAMILIES | USUAL)


@pytest.mark.parametrize('name', ['DETR R50', 'Mask R-CNN ConvNeXt-T', 'BEiT-B (fine-tuned)'])
def test_a_config_keeps_all_but_its_data(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    if family.toolbox not in installed():
        pytest.skip(f'{family.toolbox} is not installed')
    own = engine.launch.load_config(family.config)
    cfg = make_config(family, tmp_path, 4, 2, 0)
    kept = {key: value for key, value in own.optim_wrapper.items() if key not in ('type', 'dtype')}
    kept.pop('loss_scale', None)
    assert {**cfg.optim_wrapper.to_dict(), 'type': 0} == {**kept, 'type': 0}
    assert 'Pretrained' not in str(cfg.model) and cfg.model.type == own.model.type


@pytest.mark.slow
def test_a_family_is_proven_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if 'mmpretrain' not in installed():
        pytest.skip('mmpretrain is not installed')
    data = make_data(tmp_path / 'data', images=8)
    args: Any = argparse.Namespace(work_dir=tmp_path, iterations=2, seeds=[0], precondition=None)
    name, config, layers, share, plain, loss, resumed = families.prove('DeiT-T', args, data)
    assert resumed == 'to the bit' and 'AFOpt 24' in layers and float(share) > 95
    assert 'norms' in plain and loss.startswith('6.9')
    monkeypatch.setattr(families, 'TAIL', 1)
    row = families.compare('DeiT-T', args, data)
    assert row[1].startswith('AdamW, ') and 0.9 < float(row[-1]) < 1.1
    args.precondition = 'AdamR'
    families.compare('DeiT-T', args, data)
    (record,) = (tmp_path / 'compare/DeiT_T').glob('*AdamR/record.json')
    assert json.loads(record.read_text())['attached'][0].startswith('AdamR ')
