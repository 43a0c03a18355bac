"""Captured sums of single layers, and the geometries of convolutions."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from mmprecond.curvature import RunningAverage
from mmprecond.optimizers import PreconditionedOptimizer
from mmprecond.preconditioners import NewtonKronecker


def staged(optimizer: PreconditionedOptimizer, name: str = 'weight') -> tuple[Tensor, Tensor, int]:
    """R = sum x'x / rows, L = sum g'g and the rows that a layer captured since the last step."""
    found = [s for layer, s in optimizer.curvature.capture.staged.items() if layer.name == name]
    if not found:
        raise KeyError(f'nothing was captured of {name}')
    sums, rows = found[0].sums, found[0].rows
    return sums['input_moment'] / max(1, rows), sums['gradient_moment'], rows


def loss_of(out: Tensor) -> Tensor:
    """A loss whose gradient differs at every position."""
    weights = torch.arange(1, out.numel() + 1, dtype=out.dtype).reshape(out.shape).cos()
    return (out**2 * weights).sum() / 7 + (out * weights).sum()


def compare(
    found: tuple[Tensor, Tensor, int], expected: tuple[Tensor, Tensor, int], rtol: float = 1e-10
) -> None:
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).norm() <= rtol * theirs.norm() + 1e-300
    assert found[2] == expected[2]


class RawKronecker(NewtonKronecker):
    """Keeps the last capture as it is, where NKFAC keeps an average of normalised ones."""

    def average(self) -> RunningAverage:
        return RunningAverage(decay=0.0)


CONVS: dict[str, dict[str, Any]] = {
    'plain': dict(kernel_size=3),
    'pointwise': dict(kernel_size=1),
    'stride': dict(kernel_size=3, stride=2),
    'stride over kernel': dict(kernel_size=1, stride=3),
    'padding': dict(kernel_size=3, padding=1),
    'padding over kernel': dict(kernel_size=1, padding=2),
    'valid': dict(kernel_size=3, padding='valid'),
    'same': dict(kernel_size=3, padding='same'),
    'same even': dict(kernel_size=(2, 4), padding='same'),
    'same even dilated': dict(kernel_size=2, dilation=3, padding='same'),
    'reflect': dict(kernel_size=3, padding=(2, 1), padding_mode='reflect'),
    'replicate': dict(kernel_size=3, padding=(1, 2), padding_mode='replicate'),
    'circular': dict(kernel_size=3, padding=(2, 1), padding_mode='circular'),
    'same even reflect': dict(kernel_size=(4, 2), padding='same', padding_mode='reflect'),
    'same even circular': dict(kernel_size=(2, 4), padding='same', padding_mode='circular'),
    'dilation': dict(kernel_size=2, dilation=2),
    'not square': dict(kernel_size=(2, 3), stride=(2, 1), padding=(0, 2), dilation=(1, 2)),
    'groups': dict(kernel_size=3, groups=2, padding=1),
    'groups not square': dict(kernel_size=(1, 2), groups=2, stride=(1, 2), padding=(1, 0)),
    'depthwise': dict(kernel_size=3, groups=4, padding=1),
    'depthwise multiplied': dict(kernel_size=2, groups=4, out_channels=8),
}


@st.composite
def geometries(draw: st.DrawFn) -> tuple[dict[str, Any], tuple[int, ...], float]:
    """A convolution, an input that fits it, and a limit of memory."""
    pair = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(2))
    groups = draw(st.integers(1, 3))
    padding = draw(st.sampled_from(['same', 'valid', pair(0, 2)]))
    conv: dict[str, Any] = dict(
        in_channels=groups * draw(st.integers(1, 2)),
        out_channels=groups * draw(st.integers(1, 2)),
        groups=groups,
        kernel_size=pair(1, 3),
        dilation=pair(1, 2),
        padding=padding,
        stride=1 if padding == 'same' else pair(1, 3),
        padding_mode=draw(st.sampled_from(['zeros', 'reflect', 'replicate', 'circular'])),
        bias=draw(st.booleans()),
    )
    needed = [d * (k - 1) + 1 for k, d in zip(conv['kernel_size'], conv['dilation'], strict=True)]
    height, width = (max(3, n) + draw(st.integers(0, 2)) for n in needed)
    shape = (draw(st.integers(1, 2)), conv['in_channels'], height, width)
    return conv, shape, draw(st.sampled_from([1e-9, 1e-3, 64.0]))


EMPTY = [
    (lambda: nn.Linear(4, 3), (0, 4)),
    (lambda: nn.Linear(4, 3, bias=False), (0, 7, 4)),
    (lambda: nn.Conv2d(4, 3, 3), (0, 4, 5, 5)),
    (lambda: nn.Conv2d(4, 4, 3, groups=2, padding=1), (0, 4, 5, 5)),
    (lambda: nn.Conv2d(4, 3, 3, padding=1, padding_mode='reflect'), (0, 4, 5, 5)),
]
