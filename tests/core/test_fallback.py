"""fallback='gradient': matrices that capture cannot read take statistics of their gradient."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmprecond.curvature import MatrixLayer, matrix_dims
from mmprecond.optimizers import FSGD, KFAC, NKFAC, SOAP, AdamR, Preconditioned
from tests.support.errors import refused


class Net(nn.Module):
    """An embedding, positions, an attention of torch, a weight used by hand, a scripted part."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.positions = nn.Parameter(torch.randn(1, 5, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.by_hand = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.scripted = torch.jit.script(nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.words(x) + self.positions
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = torch.tanh(F.linear(x, self.by_hand.weight, self.by_hand.bias))
        return self.head(self.norm(self.scripted(x)).mean(1))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randint(11, (6, 5), generator=generator)
        y = torch.randint(3, (6,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


EVERY: dict[str, Any] = dict(stat_interval=1, refresh_interval=2)


def acting(optimizer: Any) -> set[str]:
    return {layer.name for stack in optimizer.curvature.stacks for _, layer in stack.ready()}


def matrices(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if len(matrix_dims(p)) > 1}


@pytest.mark.parametrize('kind', [NKFAC, AdamR, FSGD])
def test_no_matrix_takes_the_plain_rule(kind: Any) -> None:
    model, plain = net(), net()
    optimizer = kind(model, lr=0.01, fallback='gradient', **EVERY)
    train(model, optimizer, range(4))
    assert acting(optimizer) == matrices(model)
    other = kind(plain, lr=0.01, **EVERY)
    train(plain, other, range(4))
    assert acting(other) == {'head.weight'}
    assert all(p.isfinite().all() for p in model.parameters())
    (plain_rule,) = [line for line in optimizer.report().splitlines() if 'plain rule:' in line]
    assert plain_rule == 'plain rule: 1 LayerNorm'


@pytest.mark.parametrize('kind', [SOAP, NKFAC])
def test_methods_on_gradients_need_no_fallback(kind: Any) -> None:
    model = net()
    settings = {} if kind is SOAP else dict(source='gradient')
    optimizer = kind(model, lr=0.01, **settings, **EVERY)
    train(model, optimizer, range(4))
    assert acting(optimizer) == matrices(model)


def test_an_embedding_is_one_sided() -> None:
    optimizer = NKFAC(net(), lr=0.01, fallback='gradient')
    by_name = {layer.name: (layer, stack) for layer, stack in optimizer.curvature.layers.items()}
    layer, stack = by_name['words.weight']
    assert isinstance(layer, MatrixLayer) and [s.side.name for s in stack.kept] == ['input']
    assert by_name['positions'][0].shape == (1, 5, 8)


def test_exclusions_are_kept() -> None:
    model = net()
    groups = [
        dict(params=[p], precondition=name != 'positions') for name, p in model.named_parameters()
    ]
    optimizer = NKFAC(groups, lr=0.01, model=model, fallback='gradient', **EVERY)
    train(model, optimizer, range(3))
    assert acting(optimizer) == matrices(model) - {'positions'}
    layers = [
        dict(match=dict(name='words'), preconditioner=None),
        dict(preconditioner=dict(type='NKFAC', **EVERY)),
    ]
    model = net()
    rule = dict(type='SGDM', lr=0.01)
    optimizer = Preconditioned(model, rule=rule, layers=layers, fallback='gradient')
    train(model, optimizer, range(3))
    assert acting(optimizer) == matrices(model) - {'words.weight'}


def test_methods_without_the_form_refuse_it() -> None:
    refused(
        ValueError,
        lambda: KFAC(net(), lr=0.01, fallback='gradient', **EVERY),
        "fallback='gradient' is for NKFAC, AdaBK, AdamR and FSGD, and KFAC has none of them",
    )


def test_a_layer_that_changes_over_keeps_its_interval() -> None:
    """It is captured in the step that found it, and then with all others."""
    model = net()
    settings = dict(stat_interval=4, refresh_interval=4, early_refreshes=False)
    optimizer = NKFAC(model, lr=0.01, fallback='gradient', **settings)
    captured = []
    for step in range(9):
        due = {layer.name for layer in optimizer.curvature.due(step)}
        captured += [step] * ('by_hand.weight' in due)
        train(model, optimizer, range(step, step + 1))
    assert captured == [0, 4, 8]
    (samples,) = (
        member.samples
        for stack in optimizer.curvature.stacks
        for member in stack.members
        if member.layer.name == 'by_hand.weight'
    )
    assert samples == 3


@pytest.mark.parametrize('at', [1, 3])
def test_it_resumes_to_the_bit(at: int) -> None:
    whole, part = net(), net()
    train(whole, NKFAC(whole, lr=0.01, fallback='gradient', **EVERY), range(6))
    first = NKFAC(part, lr=0.01, fallback='gradient', **EVERY)
    train(part, first, range(at))
    second = NKFAC(part, lr=0.01, fallback='gradient', **EVERY)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(part, second, range(at, 6))
    assert acting(second) == matrices(part)
    for p, q in zip(whole.parameters(), part.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_wrong_fallback_is_one_line() -> None:
    refused(
        ValueError,
        lambda: NKFAC(net(), lr=0.1, fallback='plain'),
        "fallback='plain' is unknown; choose one of rule, gradient",
    )
