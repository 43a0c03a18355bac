"""Scores and durations in the logs of the toolboxes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common.logs import Curves
from common.scores import headlines
from common.tables import duration

TRAINING = {'lr': 0.1, 'loss': 1.0, 'decode.acc_seg': 9.0, 'time': 0.5, 'iter': 10, 'step': 10}


def read(folder: Path, *lines: dict[str, Any]) -> Curves:
    """Curves of a log with these lines."""
    file = folder / 'scalars.json'
    file.write_text('\n'.join(map(json.dumps, lines)) + '\n')
    curves = Curves()
    curves.read(file)
    return curves


def test_scores_without_a_slash(tmp_path: Path) -> None:
    evaluation = dict(aAcc=81.5, mIoU=40.25, data_time=0.01, time=0.2, step=10)
    assert read(tmp_path, TRAINING, evaluation).scores == {
        'aAcc': [(10, 5.0, 81.5)],
        'mIoU': [(10, 5.0, 40.25)],
    }


def test_an_evaluation_between_two_lines_has_its_own_iteration(tmp_path: Path) -> None:
    """The number of an epoch, which is smaller, is none."""
    for step, expected in ((17, 17), (2, 10)):
        scores = read(tmp_path, TRAINING, dict(mIoU=40.25, step=step)).scores
        assert scores == {'mIoU': [(expected, 5.0, 40.25)]}


@pytest.mark.parametrize(
    'entry',
    [
        {'memory': 900, 'epoch': 3, 'generator.lr': 0.1, 'base_lr': 0.1, 'grad_norm': 2.0},
        {'coco/classes': ['a'], 'coco/bbox_mAP_copypaste': '0.1 0.2', 'format_only': True},
        {'curvature/cosine/mean': 0.5},
        {'landscape/largest': 20.0, 'landscape/preconditioned_mean': 0.1},
    ],
)
def test_bookkeeping_is_no_score(entry: dict[str, Any], tmp_path: Path) -> None:
    assert read(tmp_path, TRAINING, entry).scores == {}


def test_a_log_with_hierarchy_is_read_alike(tmp_path: Path) -> None:
    """LogProcessor(log_with_hierarchy=True) puts the phase before each name."""
    training = {'train/loss': 1.0, 'train/lr': 0.1, 'train/time': 0.5, 'iter': 10, 'step': 10}
    run = read(tmp_path, training, {'val/coco/AP': 0.7, 'val/time': 0.1, 'step': 10})
    assert run.losses == [(10, 5.0, 1.0)] and run.scores == {'coco/AP': [(10, 5.0, 0.7)]}


@pytest.mark.parametrize(
    'names, main',
    [
        (['coco/bbox_mAP', 'coco/bbox_mAP_50', 'coco/bbox_mAP_s'], ['coco/bbox_mAP']),
        (['coco_panoptic/PQ', 'coco_panoptic/SQ', 'coco_panoptic/PQ_th'], ['coco_panoptic/PQ']),
        (['lvis/bbox_AP', 'lvis/bbox_AP50', 'lvis/bbox_APr'], ['lvis/bbox_AP']),
        (['coco/AP', 'coco/AP .5', 'coco/AP (M)', 'coco/AR'], ['coco/AP']),
        (['Head PCK', 'PCK', 'PCK@0.1', 'AUC'], ['PCK', 'AUC']),
        (['MPJPE', 'MPJPE_Eating'], ['MPJPE']),
        (['dota/mAP', 'dota/AP50'], ['dota/mAP']),
        (['accuracy/top1', 'accuracy/top5', 'accuracy/top1_origin'], ['accuracy/top1']),
        (['single-label/precision', 'single-label/f1-score'], ['single-label/f1-score']),
        (['aAcc', 'mDice', 'mAcc'], ['mDice']),
        (['coco/AR@100', 'coco/AR@300', 'coco/AR@1000'], ['coco/AR@100', 'coco/AR@300']),
        ([], []),
    ],
)
def test_main_scores_of_the_toolboxes(names: list[str], main: list[str]) -> None:
    assert headlines(names) == main


@pytest.mark.parametrize(
    'seconds, text',
    [
        (0.0, '-'),
        (4.2, '4.2 s'),
        (42.0, '42 s'),
        (59.6, '1.0 min'),
        (100.0, '1.7 min'),
        (720.0, '12 min'),
        (3590.0, '1.0 h'),
        (12240.0, '3.4 h'),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
