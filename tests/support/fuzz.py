"""Compact descriptions of random networks and runs, and what they describe.

A description is plain data, which hypothesis prints whole; geometries are made to fit when a
network is built, so that any description is a valid one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.reference.factors import Loss

Options = dict[str, Any]
ACTIVATIONS: dict[str, Callable[[Tensor, bool], Tensor]] = {
    '': lambda x, inplace: x,
    'tanh': lambda x, inplace: torch.tanh_(x) if inplace else torch.tanh(x),
    'relu': lambda x, inplace: F.relu(x, inplace),
    'leaky': lambda x, inplace: F.leaky_relu(x, 0.1, inplace),
    'silu': lambda x, inplace: F.silu(x, inplace),
}

#: 'again': called on a second level of another size; 'twin': so is a module with its weight and
#: bias (a convolution of another stride and dilation); 'own bias': one with its weight alone;
#: 'bias alone': one with its bias alone; 'side': a separate module that some batches skip.
EXTRAS = ('', 'again', 'twin', 'own bias', 'bias alone', 'side')


@dataclass(frozen=True, kw_only=True)
class Part:
    """A linear layer and what surrounds it; `checkpoint` is use_reentrant, or None without."""

    out: int = 3
    bias: bool = True
    act: str = ''
    inplace: bool = False
    dropout: bool = False
    norm: str = ''
    extra: str = ''
    checkpoint: bool | None = None
    frozen: str = ''


@dataclass(frozen=True, kw_only=True)
class Conv(Part):
    """A convolution; `out` counts features of a group."""

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: Any = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    mode: str = 'zeros'
    groups: int = 1

    def fitted(self, features: int, size: tuple[int, int]) -> dict[str, Any]:
        """Arguments for an input of this size."""
        groups = math.gcd(self.groups, features)
        stride = (1, 1) if self.padding == 'same' else self.stride
        kernel, pads = [], []
        given = (0, 0) if isinstance(self.padding, str) else self.padding
        for k, d, n, pad in zip(self.kernel, self.dilation, size, given, strict=True):
            pad = pad if self.mode == 'zeros' else min(pad, n - 1)
            if self.padding == 'same':
                while self.mode != 'zeros' and d * (k - 1) - d * (k - 1) // 2 >= n:
                    k -= 1
            else:
                while d * (k - 1) >= n + 2 * pad:
                    k -= 1
            kernel.append(k)
            pads.append(pad)
        return dict(
            in_channels=features,
            out_channels=self.out * groups,
            groups=groups,
            kernel_size=tuple(kernel),
            stride=stride,
            dilation=self.dilation,
            padding=self.padding if isinstance(self.padding, str) else tuple(pads),
            padding_mode=self.mode,
            bias=self.bias,
        )


@dataclass(frozen=True, kw_only=True)
class Case:
    """A network and its training.

    Attributes:
        parts: Convolutions, then linear layers; before them an embedding where `vocabulary`.
        pool: Whether linear layers see pooled features, else all positions as tokens.
        tied: Whether the head shares the embedding's weight, where that fits.
        batches: Sizes of a step's micro-batches.
        sides: Bits that tell by micro-batch whether 'side' modules are called.
        kind, head, settings, head_settings: The optimizer, another one for the head, or ''.
        options: (parameter's number, name in `OPTIONS`).
        grouped, via: Whether parameters come as a list, and the optimizer as `Preconditioned`.
        amp: '', 'number' or 'scaler'; the step `overflow` first overflows and is skipped.
        cleared: Who clears gradients.
        frozen: First step at which 'frozen' parameters are, and the first at which no longer.
    """

    kind: str
    parts: tuple[Part, ...] = ()
    features: int = 3
    size: tuple[int, int] = (3, 3)
    vocabulary: int = 0
    tied: bool = False
    pool: bool = True
    head_bias: bool = True
    steps: int = 3
    batches: tuple[int, ...] = (2,)
    sides: int = 0
    settings: Options
    head: str = ''
    head_settings: Options
    rule: Options
    options: tuple[tuple[int, str], ...] = ()
    grouped: bool = False
    via: bool = False
    amp: str = ''
    overflow: int | None = None
    cleared: str = 'optimizer'
    frozen: tuple[int, int] = (0, 9)
    seed: int = 0


class Unit(nn.Module):
    """A part of the network."""

    def __init__(self, part: Part, features: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.part, self.plain = part, False
        conv = isinstance(part, Conv)
        options = (
            part.fitted(features, size)
            if conv
            else dict(in_features=features, out_features=part.out, bias=part.bias)
        )
        make = nn.Conv2d if conv else nn.Linear
        self.main = make(**options)
        shape = self.main(
            torch.zeros(1, features, *size) if conv else torch.zeros(1, features)
        ).shape
        if part.extra not in ('', 'again'):
            if conv and part.extra == 'twin' and part.padding != 'same':
                options.update(dilation=1, stride=options['stride'][::-1])
            self.other = make(**options)
            if part.extra in ('twin', 'own bias'):
                self.other.weight = self.main.weight
            if part.extra in ('twin', 'bias alone'):
                self.other.bias = self.main.bias
        self.norm = nn.Identity()
        if part.norm and shape[1:].numel() > 2:  # of two numbers a norm leaves the signs alone
            norms = dict(batch=nn.BatchNorm2d, group=partial(nn.GroupNorm, 1))
            self.norm = norms[part.norm](shape[1]) if conv else nn.LayerNorm(shape[1])
        self.features, self.size = shape[1], tuple(shape[2:])

    def forward(self, x: Tensor, side: bool) -> Tensor:
        if self.part.checkpoint is None or self.plain:
            return self.body(x, side)
        if not x.requires_grad:
            x = x.detach().requires_grad_()
        return checkpoint(self.body, x, side, use_reentrant=self.part.checkpoint)

    def body(self, x: Tensor, side: bool) -> Tensor:
        part = self.part
        act = lambda y: ACTIVATIONS[part.act](y, part.inplace)
        y = act(self.main(x))
        if part.extra and (part.extra != 'side' or side):
            axis = {2: 0, 3: 1, 4: 3}[x.dim()]
            level = torch.cat([x, -x.narrow(axis, 0, 1)], axis)
            z = act((self.main if part.extra == 'again' else self.other)(level))
            y = y + z.mean({2: 0, 3: 1, 4: (2, 3)}[x.dim()], keepdim=True)
        y = F.dropout(y, 0.3, self.training and part.dropout)
        # References divide by blocks of zeros; the package leaves them alone.
        alive = y.flatten(2).movedim(1, 0).flatten(1) if y.dim() == 4 else y.flatten()
        assume(bool(alive.any(-1).all()))
        y = self.norm(y)
        if y.requires_grad:
            # Torch's batch norm on the CPU gives wrong gradients where the batch is 1 and y's has
            # the strides of channels last (2.11, without any optimizer of ours).
            y.register_hook(Tensor.contiguous)
        return y


class Net(nn.Module):
    """Three outputs (or as many as there are words) at each position."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.pool = case.pool
        features, size = case.features, case.size
        self.embed = nn.Embedding(case.vocabulary, features) if case.vocabulary else None
        self.units = nn.ModuleList()
        for part in case.parts:
            self.units.append(Unit(part, features, size))
            features, size = self.units[-1].features, self.units[-1].size or size
        tied = case.tied and self.embed is not None and features == case.features and not case.head
        self.head = nn.Linear(features, case.vocabulary if tied else 3, bias=case.head_bias)
        if tied:
            self.head.weight = self.embed.weight
        generator = torch.Generator().manual_seed(case.seed)
        for tensor in (*self.parameters(), *self.buffers()):
            if tensor.is_floating_point():
                spread = tensor[0].numel() ** -0.5 if tensor.dim() > 1 else 0.3
                nn.init.normal_(tensor.data, 0.0, spread, generator)
        for unit in self.units:
            if not isinstance(unit.norm, nn.Identity):
                unit.norm.weight.data += 1.0
            if isinstance(unit.norm, nn.BatchNorm2d):
                unit.norm.running_var.abs_().add_(0.3)
        self.double().train()

    def train(self, mode: bool = True) -> Net:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, x: Tensor, side: bool) -> Tensor:
        x = x if self.embed is None else self.embed(x)
        for unit in self.units:
            x = unit(x if isinstance(unit.main, nn.Conv2d) else self._rows(x), side)
        return self.head(self._rows(x))

    def _rows(self, x: Tensor) -> Tensor:
        if x.dim() < 4:
            return x
        return x.mean((2, 3)) if self.pool else x.flatten(2).mT


def batch_loss(
    case: Case, seed: int, size: int, total: int, side: bool, model: nn.Module
) -> Tensor:
    """A share of the mean squared error; its dropout masks are functions of the seed."""
    generator = torch.Generator().manual_seed(case.seed + 7 * seed)
    if case.vocabulary:
        x = torch.randint(0, case.vocabulary, (size, sum(case.size)), generator=generator)
    else:
        x = torch.randn(size, case.features, *case.size, generator=generator).double() + 0.2
    torch.manual_seed(seed)
    out = model(x, side)
    target = 2 * torch.arange(1, out.numel() + 1, dtype=out.dtype).cos().reshape(out.shape)
    return ((out - target) ** 2).flatten(1).mean(1).sum() / total


def losses(case: Case, step: int) -> list[Loss]:
    """The micro-batches of a step."""
    turn = step % len(case.batches)
    sizes = case.batches[turn:] + case.batches[:turn]
    return [
        partial(
            batch_loss, case, 3 * step + k, size, sum(sizes), bool(case.sides >> (3 * step + k) & 1)
        )
        for k, size in enumerate(sizes)
    ]


def freeze(case: Case, net: Net, step: int) -> None:
    """Freezes and thaws what is due at a step."""
    for unit in net.units:
        if unit.part.frozen:
            p = getattr(unit.main, unit.part.frozen)
            if p is not None:
                p.requires_grad_(not case.frozen[0] <= step < case.frozen[1])


# ------------------------------------------------------------------- strategies

COMMON: dict[str, Any] = dict(
    out=st.integers(1, 4),
    bias=st.booleans(),
    act=st.sampled_from(list(ACTIVATIONS)),
    inplace=st.booleans(),
    dropout=st.sampled_from([False, False, True]),
    extra=st.sampled_from(EXTRAS),
    checkpoint=st.sampled_from([None, None, False, True]),
    frozen=st.sampled_from(['', '', '', 'weight', 'bias']),
)
PAIR = lambda low, high: st.tuples(*[st.integers(low, high)] * 2)
LINEARS = st.builds(Part, norm=st.sampled_from(['', '', 'layer']), **COMMON)
CONVS = st.builds(
    Conv,
    kernel=PAIR(1, 3),
    stride=PAIR(1, 3),
    dilation=PAIR(1, 2),
    padding=st.sampled_from(['same', 'valid']) | PAIR(0, 2),
    groups=st.integers(1, 4),
    mode=st.sampled_from(['zeros', 'zeros', 'reflect', 'replicate', 'circular']),
    norm=st.sampled_from(['', '', 'batch', 'group']),
    **COMMON,
)
OPTIONS: dict[str, Options] = {
    'damping': dict(damping=0.25),
    'plain': dict(precondition=False),
    'lr': dict(lr=0.03),
    'decay': dict(weight_decay=0.2),
}
RUN: dict[str, Any] = dict(
    features=st.integers(2, 4),
    size=PAIR(2, 4),
    tied=st.booleans(),
    pool=st.booleans(),
    head_bias=st.booleans(),
    steps=st.integers(3, 6),
    sides=st.integers(0, 2**18 - 1),
    batches=st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple),
    options=st.lists(st.tuples(st.integers(0, 20), st.sampled_from(list(OPTIONS))), max_size=3).map(
        tuple
    ),
    grouped=st.booleans(),
    via=st.booleans(),
    amp=st.sampled_from(['', 'number', 'scaler']),
    overflow=st.none() | st.integers(0, 5),
    cleared=st.sampled_from(['optimizer', 'model']),
    frozen=st.tuples(st.integers(0, 2), st.integers(2, 7)),
    seed=st.integers(0, 99),
)


@st.composite
def networks(draw: st.DrawFn) -> dict[str, Any]:
    """The parts, and the vocabulary."""
    linears = st.lists(LINEARS, max_size=2)
    if draw(st.sampled_from([False, False, True])):
        return dict(parts=tuple(draw(linears)), vocabulary=draw(st.integers(2, 5)))
    convs = st.lists(CONVS, min_size=1, max_size=2)
    return dict(parts=(*draw(convs), *draw(linears)), vocabulary=0)
