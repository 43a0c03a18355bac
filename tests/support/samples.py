"""KFAC's statistics by a slow loop over samples."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def loss_of(out: Tensor) -> Tensor:
    """A loss whose gradient differs at every position."""
    weights = torch.arange(1, out.numel() + 1, dtype=out.dtype).reshape(out.shape).cos()
    return (out**2 * weights).sum() / 7 + (out * weights).sum()


def positions(module: nn.Module, x: Tensor, g: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    """Each sample's input rows (blocks, positions, i) and gradient rows (blocks, positions, o)."""
    if isinstance(module, nn.Conv2d):
        x, g = (t if t.dim() == 4 else t[None] for t in (x, g))
        padding = module.padding if isinstance(module.padding, tuple) else (0, 0)
        if padding == (0, 0) and module.padding == 'same':
            extra = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
            x = F.pad(
                x,
                (extra[1] // 2, extra[1] - extra[1] // 2, extra[0] // 2, extra[0] - extra[0] // 2),
            )
        for one, slope in zip(x, g, strict=True):
            patches = F.unfold(
                one[None].contiguous(), module.kernel_size, module.dilation, padding, module.stride
            )[0]
            yield (
                torch.stack(patches.chunk(module.groups)).mT,
                torch.stack(slope.flatten(1).chunk(module.groups)).mT,
            )
    elif x.dim() == 1:
        yield x[None, None], g[None, None]
    else:
        for one, slope in zip(x, g, strict=True):
            yield one.reshape(1, -1, one.shape[-1]), slope.reshape(1, -1, slope.shape[-1])


def slow(module: nn.Module, reduction: str, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """R and L after `loss_of` of each input: mean of inputs, sum of gradients of a sample."""
    plain = copy.deepcopy(module)
    for hooks in (plain._forward_hooks, plain._forward_pre_hooks):
        hooks.clear()
    right: Any
    left: Any
    right, left, rows = 0.0, 0.0, 0
    for x in inputs:
        out = plain(x)
        (g,) = torch.autograd.grad(loss_of(out), out)
        for a, b in positions(module, x, g):
            if module.bias is not None:
                a = torch.cat([a, torch.ones_like(a[..., :1])], 2)
            if reduction == 'reduce':
                a, b = a.mean(1, keepdim=True), b.sum(1, keepdim=True)
            right, left = right + a.mT @ a, left + b.mT @ b
            rows += a.shape[1]
    return right / rows, left * rows


CONVS: dict[str, dict[str, Any]] = {
    'plain': dict(kernel_size=3),
    'pointwise': dict(kernel_size=1),
    'stride': dict(kernel_size=3, stride=2),
    'stride over kernel': dict(kernel_size=1, stride=3),
    'padding': dict(kernel_size=3, padding=1),
    'valid': dict(kernel_size=3, padding='valid'),
    'same even': dict(kernel_size=(2, 4), padding='same'),
    'dilation': dict(kernel_size=2, dilation=2),
    'not square': dict(kernel_size=(2, 3), stride=(2, 1), padding=(0, 2), dilation=(1, 2)),
    'groups': dict(kernel_size=3, groups=2, padding=1, stride=(1, 2)),
    'depthwise multiplied': dict(kernel_size=2, groups=4, out_channels=8),
}


class Scaler:
    """What `torch.amp.GradScaler` shows of its scale."""

    def is_enabled(self) -> bool:
        return True

    def get_scale(self) -> float:
        return 256.0
