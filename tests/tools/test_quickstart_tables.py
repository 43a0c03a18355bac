"""The quickstart's tables, on runs that were not trained."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from analysis_tools.results import at, best_rate, usual
from analysis_tools.results import table as comparison
from common.contestants import MODELS
from common.training import Run
from quickstart import table, verdict
from tests.support.paths import ROOT

BOX = 'coco/bbox_mAP'


def run(optimizer: str, lr: float, seed: int, score: float, seconds: float = 10.0) -> Run:
    return Run(
        optimizer,
        lr,
        seed,
        losses=[(100, seconds, 1.0)],
        scores={BOX: [(100, seconds, score)]},
        memory=5.0,
    )


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in text.splitlines()]


def test_means_and_ranges_over_seeds() -> None:
    text = table(
        [run('SGD', 0.1, 0, 0.1), run('SGD', 0.1, 1, 0.3), run('NKFAC', 0.1, 0, 0.4)],
        {BOX: 'box AP'},
    )
    rows = cells(text)
    assert rows[2][:3] == ['SGD', '0.1', '0.200 (0.100-0.300)']
    assert rows[3][:3] == ['NKFAC', '0.1', '0.400']


def test_the_verdict_compares_with_the_same_and_the_best_rate() -> None:
    said = verdict(
        [run('SGD', 0.1, 0, 0.1), run('SGD', 0.2, 0, 0.2), run('NKFAC', 0.1, 0, 0.4, 20.0)],
        MODELS['r18'],
    ).splitlines()
    assert said == [
        'NKFAC lr 0.1: 4.00 x the box AP of SGD with the same rate (lr 0.1), at 2.00 x its '
        'training time',
        'NKFAC lr 0.1: 2.00 x the box AP of SGD with its best rate (lr 0.2), at 2.00 x its '
        'training time',
    ]


@pytest.mark.parametrize('model', ['r18', 'swin-cls'])
def test_words_add_curvature_to_the_plain_optimizer(model: str) -> None:
    known = MODELS[model]
    attached = known.contestant('FSGD+NKFAC')
    assert attached.arguments == ('--precondition', 'FSGD+NKFAC')
    plain = known.contestants[known.plain]
    assert attached.config == plain.config and attached.adaptive == plain.adaptive
    assert attached.lr == known.rates[plain.adaptive] and not attached.options


@pytest.mark.parametrize(
    ('name', 'text'),
    [
        ('AFOpt+NFKAC', 'did you mean .*NKFAC'),
        ('AFOpt+NKFAC+AdamR', 'AFOpt.NKFAC'),
        ('NFKAC', 'there is no optimizer NFKAC; did you mean .*NKFAC'),
        ('adamr', 'did you mean AdamR'),
    ],
)
def test_unknown_words_name_the_nearest(name: str, text: str) -> None:
    with pytest.raises(SystemExit, match=text) as caught:
        MODELS['r18'].contestant(name)
    assert '\n' not in str(caught.value)


def test_the_verdict_without_the_same_rate_or_without_a_score() -> None:
    (one,) = verdict(
        [run('SGD', 0.1, 0, 0.1), run('NKFAC', 0.3, 0, 0.4)], MODELS['r18']
    ).splitlines()
    assert one.startswith('NKFAC lr 0.3: 4.00 x the box AP of SGD with its best rate (lr 0.1)')
    assert verdict([run('SGD', 0.1, 0, 0.0), run('NKFAC', 0.1, 0, 0.4)], MODELS['r18']) == ''


def test_every_model_can_be_compared_with_its_usual_optimizers() -> None:
    for name, model in MODELS.items():
        names = usual(model)
        assert {'SGD', 'AdamW', 'NKFAC', 'AdamR'} <= set(names) and len(names) == len(set(names))
        assert ('SGDPH' in names) == name.endswith('cls')
        for optimizer in names:
            contestant = model.contestant(optimizer)
            assert (ROOT / 'configs/quickstart' / f'{contestant.config}.py').exists()


def test_the_comparison_has_scores_and_losses_and_those_at_equal_time() -> None:
    args = SimpleNamespace(model=MODELS['swin'], iterations=100, seeds=[0, 1])
    nkfac = [run('NKFAC', 0.1, seed, score) for seed, score in enumerate((0.4, 0.6))]
    lines = cells(
        comparison({'NKFAC': nkfac[:1]}, {'NKFAC': nkfac}, {'SGD': 1.0, 'NKFAC': 2.0}, args)
    )
    assert lines[0][:4] == [
        'optimizer',
        'lr',
        'box AP after 100 iterations',
        'mask AP after 100 iterations',
    ]
    assert lines[2] == [
        'NKFAC',
        '0.1',
        '0.500 (0.400-0.600)',
        '0.000 (0.000-0.000)',
        '1.00 (1.00-1.00)',
        '2.00',
        '0.250 (0.200-0.300)',
        '5',
        '0.1: 0.400',
    ]
    assert len(lines[0]) == len(lines[1]) == len(lines[2])


def test_scores_between_evaluations() -> None:
    one = Run(
        'SGD', 0.1, 0, losses=[(100, 9.0, 1.0)], scores={BOX: [(50, 5.0, 0.2), (100, 9.0, 0.3)]}
    )
    assert [round(at(one, k, BOX), 3) for k in (0, 25, 50, 60, 100, 400)] == [
        0.0,
        0.1,
        0.2,
        0.22,
        0.3,
        0.3,
    ]
    assert best_rate([one, run('SGD', 0.2, 0, 0.4), run('SGD', 0.3, 0, 0.4)], BOX) == 0.2


def test_help_comes_at_once_and_without_an_environment(tmp_path: Path) -> None:
    bare = tmp_path / 'python3'
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # no package is seen
    bare.chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ['PATH']])
    done = subprocess.run(
        ['bash', 'tools/quickstart.sh', '--help'],
        cwd=ROOT,
        env=dict(os.environ, PATH=path, MMPRECOND_VENV=str(tmp_path / 'none')),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('usage:') and '--optimizers' in done.stdout
    assert not (tmp_path / 'none').exists()
