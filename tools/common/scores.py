"""Scores in the logs of OpenMMLab's toolboxes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

#: Values that MMEngine's hooks log beside the scores. Several optimizers have rates `NAME.lr`.
BOOKKEEPING = re.compile(
    r'step|iter|epoch|time|data_time|memory|eta|grad_norm|(.+\.)?(base_)?lr|curvature/.*'
    r'|landscape/.*|surgery/.*|sparsity|damping_factor'
)
#: Main measures by which the toolboxes' configs choose the best checkpoint, or papers report.
MEASURES = frozenset(
    (
        *('mAP', 'AP', 'PQ'),  # detection, panoptic segmentation, key points
        *('HOTA', 'MOTA', 'IDF1', 'F1'),  # tracking, lanes
        *('mIoU', 'cIoU', 'mDice', 'mFscore', 'rmse'),  # segmentation, depth
        *('PCK', 'PCKh', 'tPCK', 'AUC', 'EPE', 'NME'),  # key points
        *('MPJPE', 'P-MPJPE', 'N-MPJPE', 'MPJPE_all'),  # poses in space, hands
        *('top1', 'f1-score', 'acc', 'ANLS', 'CIDEr'),  # classes, questions, captions
    )
)
#: Number of scores that stand for a run without a main measure.
FIRST = 2


def is_score(name: str, value: Any) -> bool:
    """True for a number that is no bookkeeping."""
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
    return numeric and not BOOKKEEPING.fullmatch(name)


def headlines(scores: Iterable[str]) -> list[str]:
    """Returns a run's main scores, or its first ones if it has no main measure."""
    names = list(scores)
    return [name for name in names if _is_main(name)] or names[:FIRST]


def _is_main(name: str) -> bool:
    """True for `mIoU`, `coco/AP` and `coco/bbox_mAP`, not for `bbox_mAP_50` or `Head PCK`."""
    measure = name.rsplit('/', 1)[-1]
    return not MEASURES.isdisjoint((measure, measure.rsplit('_', 1)[-1]))
