"""`Preconditioned` on a small Swin with several methods."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from mmprecond.optimizers import Preconditioned, PreconditionedOptimizer

KRONECKER = dict(type='NewtonKronecker', settings='published', stat_interval=1, refresh_interval=2)
FEATURE = dict(type='InputFeature', settings='published', stat_interval=2, refresh_interval=4)
ATTENTION = dict(
    type='AttentionFeature',
    settings='published',
    count_from=0,
    convolutions=True,
    stat_interval=3,
    refresh_interval=3,
)
RULE = dict(type='AdamW', lr=0.01, weight_decay=0.1)


class WindowMSA(nn.Module):
    """Attention as Swin's."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.softmax = nn.Softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        out = self.softmax(q @ k.mT / 2) @ v
        return self.proj(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn, self.ffn = nn.LayerNorm(8), WindowMSA(), FFN()

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(x + self.attn(self.norm(x)))


class FFN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """A small Swin: patches, two blocks, a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch = nn.Conv2d(3, 8, 2, stride=2)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).mT
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def net() -> Net:
    return Net().double()


PARTS = ('attn.qkv', 'attn.proj', 'ffn.up', 'ffn.down')
NAMES = ('patch', *(f'blocks.{k}.{part}' for k in (0, 1) for part in PARTS), 'head')


def entry(preconditioner: dict[str, Any] | None, **match: Any) -> dict[str, Any]:
    return (
        dict(match=match, preconditioner=preconditioner)
        if match
        else dict(preconditioner=preconditioner)
    )


#: AFOpt on the attention of the first block, nothing on the head, and two other methods.
MIXED = [
    entry(None, name='head'),
    entry(ATTENTION, module_type='WindowMSA', name='blocks.0'),
    entry(FEATURE, name='blocks.*'),
    entry(KRONECKER),
]


def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(4, 3, 6, 4, generator=torch.Generator().manual_seed(step)).double()
        optimizer.zero_grad()
        (model(x) - torch.arange(3)).square().mean().backward()
        optimizer.step()


def methods(optimizer: PreconditionedOptimizer) -> dict[str, str]:
    """The method of each layer by its module's name; those without are left out."""
    found = {
        layer.name: type(stack.method).__name__
        for layer, stack in optimizer.curvature.layers.items()
    }
    return {name.removesuffix('.weight'): kind for name, kind in found.items()}


def curvature(optimizer: PreconditionedOptimizer) -> dict[str, Any]:
    return copy.deepcopy(optimizer.state_dict()['precond']['layers'])


ALL = [entry(KRONECKER)]


def build(
    layers: Any = ALL, rule: Any = RULE, model: nn.Module | None = None, **more: Any
) -> PreconditionedOptimizer:
    return Preconditioned(net() if model is None else model, rule=rule, layers=layers, **more)
