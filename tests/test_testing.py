"""`mmprecond.testing` on all that the package has, and on what it must find."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmprecond.curvature import LAYER_TYPES, Conv2dLayer, LinearLayer, register_layer
from mmprecond.linalg import Dense, Operators, map_tensors
from mmprecond.optimizers import KFAC, NKFAC, FAdam
from mmprecond.preconditioners import METHODS, InputFeature, NewtonKronecker
from mmprecond.rules import RULES, SGDM, AdamW, State, moments_of
from mmprecond.testing import check_layer, check_preconditioner, check_rule

#: Modules of four to six channels, and the shapes of their inputs.
MODULES: dict[str, tuple[Any, list[tuple[int, ...]]]] = {
    'linear': (lambda: nn.Linear(4, 3), [(5, 4), (2, 3, 4)]),
    'linear without bias': (lambda: nn.Linear(4, 3, bias=False), [(2, 3, 2, 4), (4,)]),
    'conv1d': (lambda: nn.Conv1d(4, 3, 3, padding=1), [(2, 4, 7), (4, 5), (0, 4, 5)]),
    'conv1d strided': (lambda: nn.Conv1d(4, 6, 3, stride=2, dilation=2, groups=2), [(2, 4, 9)]),
    'conv1d same': (lambda: nn.Conv1d(4, 3, 4, padding='same', bias=False), [(2, 4, 7)]),
    'conv1d circular': (
        lambda: nn.Conv1d(4, 3, 3, padding=2, padding_mode='circular'),
        [(2, 4, 7)],
    ),
    'conv2d': (lambda: nn.Conv2d(4, 3, 3, padding=1), [(2, 4, 5, 6), (4, 3, 4)]),
    'conv2d odd': (
        lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1), groups=2),
        [(2, 4, 6, 7)],
    ),
    'conv3d': (lambda: nn.Conv3d(3, 2, 2, padding=1), [(2, 3, 3, 4, 2), (0, 3, 3, 3, 3)]),
    'conv3d odd': (
        lambda: nn.Conv3d(
            4,
            4,
            (2, 1, 3),
            stride=(1, 2, 1),
            padding=(0, 1, 2),
            dilation=(1, 1, 2),
            groups=2,
            bias=False,
        ),
        [(2, 4, 3, 4, 5), (4, 3, 4, 5)],
    ),
    'conv3d reflect': (
        lambda: nn.Conv3d(2, 2, 2, padding=1, padding_mode='reflect'),
        [(1, 2, 3, 3, 3)],
    ),
    'transposed': (lambda: nn.ConvTranspose2d(4, 3, 3), [(2, 4, 3, 4), (4, 3, 2), (0, 4, 3, 3)]),
    'transposed strided': (
        lambda: nn.ConvTranspose2d(
            4, 6, (3, 2), stride=2, padding=(1, 0), output_padding=1, groups=2
        ),
        [(2, 4, 3, 4)],
    ),
    'transposed dilated': (
        lambda: nn.ConvTranspose2d(2, 3, 2, stride=3, dilation=2, bias=False),
        [(3, 2, 2, 3)],
    ),
}


def test_an_output_padding_beyond_the_stride_is_refused() -> None:
    wide = nn.ConvTranspose2d(2, 3, 3, dilation=2, output_padding=1)
    optimizer = NKFAC(nn.Sequential(wide, nn.Conv2d(3, 2, 1)), lr=0.1)
    assert [(one.name, one.reason) for one in optimizer.left_out] == [
        ('0', 'its output_padding reaches its stride')
    ]


@pytest.mark.parametrize('name', MODULES)
def test_layers(name: str) -> None:
    make, shapes = MODULES[name]
    torch.manual_seed(0)
    check_layer(make(), *map(torch.randn, shapes))


@pytest.mark.parametrize('name', METHODS)
def test_preconditioners(name: str) -> None:
    check_preconditioner(METHODS[name](stat_interval=1, refresh_interval=2))


@pytest.mark.parametrize('name', RULES)
def test_rules(name: str) -> None:
    options = dict(refresh_interval=2, rank=2) if name == 'DCTAdamW' else {}
    check_rule(RULES[name](**options), weight_decay=0.1)


# ------------------------------------------------------------------- what they find


class Shifted(Conv2dLayer):
    """Reads a pixel beside the right one."""

    def input_rows(self, module: Any, inputs: Tensor) -> Any:
        return super().input_rows(module, inputs.roll(1, -1))


class Miscounted(LinearLayer):
    def sample_count(self, module: nn.Module, gradient: Tensor) -> int:
        return 1


class Doubled(LinearLayer):
    def input_moment(self, module: nn.Module, inputs: Tensor) -> Tensor:
        return 2 * super().input_moment(module, inputs)


@pytest.mark.parametrize(
    'base, layer, words',
    [
        (nn.Conv2d, Shifted, 'the gradient of output element'),
        (nn.Linear, Miscounted, 'samples of'),
        (nn.Linear, Doubled, 'input_moment'),
    ],
)
def test_a_wrong_layer_is_found(base: Any, layer: Any, words: str) -> None:
    kind = type('Other', (base,), {})
    register_layer(kind, layer)
    try:
        with pytest.raises(AssertionError, match=words):
            check_layer(
                kind(2, 3, 3) if base is nn.Conv2d else kind(4, 3),
                torch.randn(2, 2, 5, 5) if base is nn.Conv2d else torch.randn(2, 3, 4),
            )
    finally:
        del LAYER_TYPES[kind]


@dataclass(frozen=True, kw_only=True)
class Mixing(NewtonKronecker):
    """Lets the layers of a stack see each other."""

    def apply(self, operators: Operators, gradients: Tensor) -> Tensor:
        return super().apply(operators, gradients - gradients.mean(0, keepdim=True) / 2)


@dataclass(frozen=True, kw_only=True)
class Confident(InputFeature):
    """Says that it succeeded."""

    def refresh(self, *given: Any) -> Any:
        operators, succeeded = super().refresh(*given)
        return operators, torch.ones_like(succeeded)


@dataclass(frozen=True, kw_only=True)
class Boasting(InputFeature):
    """Outlines something else than it makes."""

    def outline(self, layer: Any) -> Operators:
        return {'input': Dense.outline((1, 2, 2))}


@pytest.mark.parametrize(
    'kind, words',
    [
        (Mixing, 'in a stack of three and by itself'),
        (Confident, 'NaN in input_moment'),
        (Boasting, 'outline says'),
    ],
)
def test_a_wrong_preconditioner_is_found(kind: Any, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        check_preconditioner(kind(stat_interval=1, refresh_interval=2))


class Global(SGDM):
    """Scales by all gradients of a batch."""

    def compute_updates(
        self, params: list[Tensor], directions: list[Tensor], states: list[State], group: Any
    ) -> list[Tensor]:
        total = torch.stack(torch._foreach_norm(directions)).norm()
        return [direction / total for direction in directions]


class Forgetful(AdamW):
    """Keeps something that no state has."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def compute_updates(
        self, params: list[Tensor], directions: list[Tensor], states: list[State], group: Any
    ) -> list[Tensor]:
        moments_of(states, 'exp_avg', params)
        self.calls += 1
        return [direction / (1 + self.calls // 3) for direction in directions]

    def apply_updates(
        self, params: list[Tensor], updates: list[Tensor], states: list[State], group: Any
    ) -> None:
        torch._foreach_add_(params, updates, alpha=-group['lr'])


@pytest.mark.parametrize(
    'rule, words', [(Global(), 'by itself and in a batch'), (Forgetful(), 'a resumed run departs')]
)
def test_a_wrong_rule_is_found(rule: Any, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        check_rule(rule)


# ------------------------------------------------------------------- in training


class Volumes(nn.Module):
    """Every kind of convolution in one network."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(2, 4, 3, padding=1)
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.flat = nn.Conv2d(4, 4, 3, padding=1)
        self.deep = nn.Conv3d(2, 3, 3, padding=1)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.line(x)).unflatten(2, (2, 3))
        x = torch.tanh(self.flat(torch.tanh(self.up(x))))
        x = torch.tanh(self.deep(x.unflatten(1, (2, 2))))
        return self.head(x.mean((2, 3, 4)))


@pytest.mark.parametrize(
    'kind, options',
    [
        (NKFAC, {}),
        (NKFAC, dict(max_rows=8)),
        (FAdam, {}),
        (KFAC, dict(reduction='reduce')),
        (KFAC, dict(reduction='sample', positions=3)),
    ],
)
def test_all_convolutions_are_preconditioned(kind: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Volumes()
    optimizer = kind(model, lr=3e-3, stat_interval=1, refresh_interval=2, **options)
    assert len(optimizer.curvature.layers) == 5
    losses = []
    for _ in range(30):
        x = torch.randn(16, 2, 6, generator=torch.Generator().manual_seed(1))
        optimizer.zero_grad()
        loss = (model(x) - x.mean((1, 2))[:, None]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(member.refreshes for stack in optimizer.curvature.stacks for member in stack.members)
    assert not any(
        t.isnan().any()
        for stack in optimizer.curvature.stacks
        for t in map_tensors(stack.operators, torch.clone)['input'].tensors
    )
