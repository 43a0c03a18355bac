"""SOAP and Shampoo against slow references and against another package's code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmprecond.optimizers import SOAP, AdamR, Preconditioned, Shampoo
from tests.reference.gradient import ReferenceShampoo, ReferenceSOAP
from tests.support.errors import refused


def net() -> nn.Module:
    """Weights without biases; a gradient has full rank in each of their dimensions."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(3, 6, 3, bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(18, 18, bias=False),
        nn.Tanh(),
        nn.Linear(18, 18, bias=False),
    ).double()


def backward(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(64, 3, 5, generator=generator, dtype=torch.float64)
    y = torch.randn(64, 18, generator=generator, dtype=torch.float64)
    model.zero_grad()
    nn.functional.mse_loss(model(x), y).backward()


def train(model: nn.Module, optimizer: Any, steps: int) -> None:
    for step in range(steps):
        backward(model, step)
        optimizer.step()


def largest_difference(first: nn.Module, second: nn.Module) -> float:
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return max(float((p - q).detach().abs().max()) for p, q in pairs)


@pytest.mark.parametrize('frequency', [1, 3, 100])
@pytest.mark.parametrize('decay', [0.0, 0.1])
def test_soap_is_its_algorithm(frequency: int, decay: float) -> None:
    ours, theirs = net(), net()
    optimizer = SOAP(
        ours, lr=3e-3, weight_decay=decay, refresh_interval=frequency, settings='published'
    )
    references = [
        ReferenceSOAP(p.detach(), 3e-3, (0.95, 0.95), decay, frequency=frequency)
        for p in theirs.parameters()
    ]
    for step in range(25):
        backward(ours, step)
        optimizer.step()
        backward(theirs, step)
        for reference, p in zip(references, theirs.parameters(), strict=True):
            assert p.grad is not None
            reference.step(p.grad)
        assert largest_difference(ours, theirs) < 1e-8
    assert largest_difference(ours, net()) > 1e-2


@pytest.mark.parametrize(('frequency', 'bound'), [(100, 1e-11), (3, 1e-6)])
def test_soap_is_that_of_pytorch_optimizer(frequency: int, bound: float) -> None:
    """With later bases only to the rounding of float32, in which that package computes them."""
    peers = pytest.importorskip('pytorch_optimizer')
    ours, theirs = net(), net()
    common = dict(lr=3e-3, eps=1e-30, weight_decay=0.0)
    train(theirs, peers.SOAP(theirs.parameters(), precondition_frequency=frequency, **common), 25)
    settings = dict(refresh_interval=frequency, settings='published')
    train(ours, SOAP(ours, **common, **settings), 25)
    assert largest_difference(ours, theirs) < bound
    assert largest_difference(ours, net()) > 1e-2


def test_soap_has_adamws_betas_unless_published() -> None:
    betas = [
        SOAP(net(), **settings).param_groups[0]['betas']
        for settings in ({}, dict(settings='published'), dict(betas=(0.8, 0.9)))
    ]
    assert betas == [(0.9, 0.999), (0.95, 0.95), (0.8, 0.9)]


@pytest.mark.parametrize('kind', [SOAP, AdamR])
def test_moments_of_a_stack_rotate_like_those_of_single_layers(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where one of its layers joins late, some of its bases are first ones, some are not."""
    results = []
    for chunk_bytes in (2**29, 1):
        monkeypatch.setattr('mmprecond.core.stack.CHUNK_BYTES', chunk_bytes)
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(18, 18, bias=False) for _ in range(3))).double()
        settings = dict(stat_interval=1, refresh_interval=2)
        optimizer = kind(model, lr=0.01, rotate_moments=True, **settings)
        for step in range(12):
            x = torch.randn(32, 18, generator=torch.Generator().manual_seed(step)).double()
            optimizer.zero_grad()
            (model if step > 4 else model[:2])(x).square().mean().backward()
            optimizer.step()
        assert len(optimizer.curvature.stacks) == 1
        results.append([p.detach().clone() for p in model.parameters()])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('kind', [SOAP, Shampoo])
def test_biases_take_the_plain_rule(kind: Any) -> None:
    """SOAP's source takes matrices alone; one more column would change their bases."""
    torch.manual_seed(0)
    model, plain = (nn.Sequential(nn.Flatten(), nn.Linear(15, 18)).double() for _ in range(2))
    plain.load_state_dict(model.state_dict())
    settings = dict(lr=0.01, weight_decay=0.1, refresh_interval=2)
    optimizer, rule = kind(model, **settings), kind(plain, **settings, start_step=100)
    for step in range(10):
        backward(model, step)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        optimizer.step()
        rule.step()
    torch.testing.assert_close(model[1].bias, plain[1].bias, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(model[1].weight, plain[1].weight, rtol=1e-3)


@pytest.mark.parametrize('published', [True, False])
def test_shampoo_is_its_algorithm(published: bool) -> None:
    torch.manual_seed(0)
    ours, theirs = (nn.Linear(4, 3, bias=False).double() for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    settings: dict[str, Any] = dict(settings='published')
    if not published:  # the same by single settings
        settings = dict(
            refresh_interval=1, stat_decay=None, damping_form='absolute', graft=False, solver='eigh'
        )
    optimizer = Shampoo(ours, lr=0.1, momentum=0.0, damping=1e-3, **settings)
    reference = ReferenceShampoo(theirs.weight.detach(), 0.1, 1e-3)
    for step in range(20):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        for model in (ours, theirs):
            model.zero_grad()
            (model(x) - x[:, :3]).square().mean().backward()
        optimizer.step()
        assert theirs.weight.grad is not None
        reference.step(theirs.weight.grad)
        torch.testing.assert_close(ours.weight, theirs.weight, rtol=0, atol=1e-10)


def test_grafting_keeps_the_length_of_the_rules_update() -> None:
    model = net()
    plain = net()
    optimizer = Shampoo(model, lr=0.1)
    other = Shampoo(plain, lr=0.1, start_step=100)  # the rule alone
    for one, opt in ((model, optimizer), (plain, other)):
        backward(one, 0)
        opt.step()
    start = [p.detach() for p in net().parameters()]
    for p, q, s in zip(model.parameters(), plain.parameters(), start, strict=True):
        torch.testing.assert_close((p - s).norm(), (q - s).norm(), rtol=1e-12, atol=0)
        assert not torch.allclose(p, q)


@pytest.mark.parametrize('kind', [SOAP, Shampoo])
def test_neither_installs_hooks(kind: Any) -> None:
    model = net()
    optimizer = kind(model, lr=1e-3)
    seen: list[int] = []

    def count(module: nn.Module, *_: Tensor) -> None:
        seen.append(sum(len(m._forward_hooks) for m in model.modules()))

    handle = model[0].register_forward_pre_hook(count)
    train(model, optimizer, 3)
    handle.remove()
    assert set(seen) == {0} and optimizer.curvature.stacks[0].members[0].samples == 3


def test_shampoo_goes_under_momentum_alone() -> None:
    Preconditioned(net(), rule=dict(type='SGDM', lr=0.1), layers='Shampoo')
    refused(
        ValueError,
        lambda: Preconditioned(net(), rule=dict(type='AdamW', lr=0.1), layers='Shampoo'),
        'Shampoo does not work with the rule AdamW',
        'give a config the optimizer SGD',
    )


@pytest.mark.parametrize(
    ('kind', 'settings', 'message'),
    [
        (SOAP, dict(source='activation'), "source='activation' is unknown"),
        (SOAP, dict(stat_decay=1.0), 'stat_decay=1.0'),
        (Shampoo, dict(damping_form='rel'), 'choose one of relative, absolute'),
        (Shampoo, dict(graft=1), 'graft=1 is neither True nor False'),
    ],
)
def test_wrong_settings_are_one_line(kind: Any, settings: dict[str, Any], message: str) -> None:
    refused(ValueError, lambda: kind(net(), lr=0.1, **settings), message)


@pytest.mark.parametrize('size', [1.0, 10.0])
def test_published_shampoo_survives_rounding(size: float) -> None:
    """Gradients of a softmax have a null direction; its moment's eigenvalue may round below 0."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = Shampoo(model, lr=0.01, settings='published')
    for _ in range(25):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(
            model(size * torch.randn(64, 64)), torch.randint(10, (64,))
        )
        loss.backward()
        optimizer.step()
    assert all(bool(p.isfinite().all()) for p in model.parameters())
