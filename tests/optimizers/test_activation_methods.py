"""MAC, SMAC, AdaAct, NysAct and AdaFisher: vectors that are measured, trajectories, settings."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mmprecond.optimizers import (
    MAC,
    SMAC,
    AdaAct,
    AdaFisher,
    AdaFisherW,
    NysAct,
    Preconditioned,
    PreconditionedOptimizer,
)
from mmprecond.preconditioners import ActivationMean
from tests.reference import activation as oracle
from tests.reference.factors import plain_copy
from tests.support.errors import refused
from tests.support.factors import factors_of
from tests.support.networks import ConvNet, TokenNet, classification, token_batches, train

# ------------------------------------------------------------------- trajectories


def alone(squares: list[Tensor], s: dict[str, Any]) -> Tensor:
    """AdaFisher's divisor of a parameter without inputs."""
    ones = [torch.tensor([0.0, 1.0]).double()] * len(
        squares
    )  # an average of ones: the larger entry
    return oracle.from_ones(squares, s) * oracle.from_ones(ones, s)[1] + s['damping']


METHODS: dict[
    str, tuple[Callable[..., PreconditionedOptimizer], Any, dict[str, Any], dict[str, Any]]
] = {
    'MAC': (MAC, oracle.mac, dict(damping=0.7, stat_decay=0.9), {}),
    'SMAC': (SMAC, oracle.mac, dict(damping=0.7, stat_decay=0.9), dict(output=True)),
    'SMAC none': (
        SMAC,
        oracle.mac,
        dict(damping=0.5, stat_decay=0.9, gradient_scale='none'),
        dict(output=True),
    ),
    'NysAct': (NysAct, oracle.nysact, dict(damping=1.3, stat_decay=0.9, rank=1000), {}),
    'AdaAct': (
        AdaAct,
        oracle.adaact,
        dict(betas=(0.8, 0.9), eps=1e-6),
        dict(after=True, momentum=0.8, stat_decay=0.9, decay='decoupled'),
    ),
    'AdaFisher': (
        AdaFisher,
        oracle.adafisher,
        dict(damping=0.05, momentum=0.8, stat_decay=0.7),
        dict(after=True, alone=alone),
    ),
    'AdaFisher code': (
        AdaFisher,
        oracle.adafisher,
        dict(damping=0.05, momentum=0.8, stat_decay=0.7, ema='code'),
        dict(after=True, alone=alone),
    ),
    'AdaFisherW': (
        AdaFisherW,
        oracle.adafisher,
        dict(damping=0.05, momentum=0.8, stat_decay=0.7),
        dict(after=True, alone=alone, decay='decoupled'),
    ),
}


@pytest.mark.parametrize('intervals', [(1, 1), (2, 4)], ids=str)
@pytest.mark.parametrize('name', METHODS)
@pytest.mark.parametrize('make', [ConvNet, TokenNet])
def test_trajectories(make: Any, name: str, intervals: tuple[int, int]) -> None:
    kind, method, given_settings, more = METHODS[name]
    torch.manual_seed(0)
    model = make().double()
    plain = plain_copy(model)
    common = dict(
        lr=0.03, weight_decay=0.02, stat_interval=intervals[0], refresh_interval=intervals[1]
    )
    optimizer = kind(model, **common, **given_settings, early_refreshes=False)
    known = {k: v for k, v in given_settings.items() if k not in ('betas', 'rank')}
    reference = oracle.ReferenceActivation(plain, method, **common, **{**known, **more})
    losses = classification(make)
    for step in range(7):
        optimizer.zero_grad()
        for loss in losses(step):
            loss(model).backward()
        optimizer.step()
        reference.step(*losses(step))
        for (key, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert (p - q).norm() <= 1e-9 * (1 + q.norm()), (key, step)


# ------------------------------------------------------------------- MAC


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 5), st.floats(0.01, 10.0), st.floats(0.0, 100.0), st.booleans())
def test_mac_is_a_scaled_inverse(size: int, rho: float, length: float, given_here: bool) -> None:
    """rho G (rho I + a a')^-1, with the setting's damping or a layer's own."""
    torch.manual_seed(size)
    vector = length * torch.randn(2, 1, size, 1).double()
    gradients = torch.randn(2, 1, 3, size).double()
    method = ActivationMean(damping=7.0 if given_here else rho)
    own = torch.full((2, 1), rho).double() if given_here else None
    operator, good = method.refresh(factors_of({'input_mean': vector}), None, own)
    inverse = torch.linalg.inv(vector @ vector.mT + rho * torch.eye(size).double())
    assert good.all()
    torch.testing.assert_close(method.apply(operator, gradients), rho * gradients @ inverse)


def test_smac_needs_the_rows_scale() -> None:
    """As published ('none'), Z is 1 / rho to a percent: the gradients of a mean loss are small."""
    spread = {}
    for scale in ('rows', 'none'):
        torch.manual_seed(0)
        model = TokenNet().double()
        optimizer = SMAC(model, lr=0.01, gradient_scale=scale, settings='published')
        train(model, optimizer, token_batches(1, size=64))
        z = torch.cat(
            [stack.operator_tensors['gradient'].flatten() for stack in optimizer.curvature.stacks]
        )
        spread[scale] = float(z.max() / z.min())
    assert spread['none'] < 1.01 < 1.1 < spread['rows']


# ------------------------------------------------------------------- AdaAct, AdaFisher


def test_a_dead_input_does_not_blow_up() -> None:
    """An input that was never on, and then is: its weight moves as the floor allows."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    optimizer = AdaAct(model, lr=0.1)
    x = torch.randn(6, 4).double()
    x[:, 0] = 0
    for _ in range(3):
        optimizer.zero_grad()
        (model(x) ** 2).mean().backward()
        optimizer.step()
    factor = optimizer.curvature.stacks[0].operator_tensors['input'].flatten()
    assert factor[0] <= 1.01e6 * factor[1:].max() and model.weight.isfinite().all()


def test_a_plain_parameter_has_no_momentum_in_adaact() -> None:
    model = ConvNet().double()
    optimizer = AdaAct(model, lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        model(
            torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(step)).double()
        ).sum().backward()
        before = model.bn1.weight.detach().clone()
        optimizer.step()
        torch.testing.assert_close(model.bn1.weight, before - 0.1 * model.bn1.weight.grad)
    assert 'exp_avg' in optimizer.state[model.fc.weight]
    assert 'exp_avg' not in optimizer.state[model.bn1.weight]


@pytest.mark.parametrize('ema', ['paper', 'code'])
def test_adafisher_as_its_code_is_momentum_sgd(ema: str) -> None:
    """After some captures the code's divisor is lambda to a tenth; the paper's is not."""
    torch.manual_seed(0)
    model = TokenNet().double()
    optimizer = AdaFisher(model, lr=1e-4, ema=ema, stat_interval=1, refresh_interval=1)
    train(model, optimizer, token_batches(4))
    largest = max(
        float((s.operator_tensors['gradient'] @ s.operator_tensors['input']).max())
        for s in optimizer.curvature.stacks
    )
    assert largest < 1e-4 if ema == 'code' else largest > 0.1


def test_the_loss_scale_changes_no_divisor() -> None:
    found = []
    for scale in (1.0, 1e-5):
        torch.manual_seed(0)
        model = TokenNet().double()
        optimizer = AdaFisher(model, lr=0.0, stat_interval=1, refresh_interval=1)
        train(model, optimizer, token_batches(2), lambda out, y: scale * (out**2).mean())
        found.append(
            torch.cat(
                [s.operator_tensors['gradient'].flatten() for s in optimizer.curvature.stacks]
            )
        )
    torch.testing.assert_close(*found, rtol=1e-9, atol=0)


@pytest.mark.parametrize('start', [0, 3])
def test_norms_are_measured_and_damped_as_layers(start: int) -> None:
    """At the early steps too, not before the start, and with the damping of the warm-up."""
    model = ConvNet()
    optimizer = AdaFisher(model, lr=0.1, start_step=start)
    for group in optimizer.param_groups:
        group['initial_lr'] = 0.2
    for step in range(7):
        optimizer.zero_grad()
        x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(step))
        model(x).sum().backward()
        before, gradient = model.bn1.weight.detach().clone(), model.bn1.weight.grad.clone()
        optimizer.step()
        state = optimizer.state[model.bn1.weight]
        layer = optimizer.curvature.stacks[0].members
        assert state.get('fisher_samples', 0) == (layer[0].samples if layer else 0)
        if step == 0:
            fisher = (state['fisher_gradient'] * state['fisher_input']) if start == 0 else None
            divisor = 1.0 if fisher is None else fisher + 1e-3 / 0.5**2
            expected = before - 0.1 * gradient / divisor  # the first average is the gradient
            torch.testing.assert_close(model.bn1.weight.detach(), expected)


def test_what_has_one_entry_is_divided_by_one() -> None:
    """A scalar's range is nothing; its divisor stays, rather than fall to lambda."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.scale = nn.Linear(8, 1), nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * self.linear(x)

    torch.manual_seed(0)
    model = Scaled()
    optimizer = AdaFisher(model, lr=1e-3, stat_interval=1, refresh_interval=1)
    for _ in range(20):
        optimizer.zero_grad()
        model(torch.randn(6, 8)).square().mean().backward()
        optimizer.step()
    assert float(optimizer.state[model.scale]['fisher_gradient']) == pytest.approx(1)
    assert float(optimizer.curvature.stacks[0].operator_tensors['gradient']) == pytest.approx(1)


def test_a_groups_damping_reaches_parameters_without_inputs() -> None:
    moved = []
    for damping in (1e-3, 1.0):
        torch.manual_seed(0)
        model = TokenNet().double()
        groups = [
            dict(params=list(model.norm.parameters()), damping=damping),
            dict(params=[p for n, p in model.named_parameters() if 'norm' not in n]),
        ]
        optimizer = AdaFisher(groups, lr=1e-3, model=model)
        before = model.norm.weight.detach().clone()
        train(model, optimizer, token_batches(1))
        moved.append((model.norm.weight - before).detach().abs())
    assert (moved[0] > 1.5 * moved[1]).all()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_adafisher_resumes_in_half_precision(dtype: torch.dtype) -> None:
    def one(model: nn.Module, optimizer: AdaFisher, seed: int) -> None:
        optimizer.zero_grad()
        x = torch.randn(4, 7, 16, generator=torch.Generator().manual_seed(seed)).to(dtype)
        model(x).square().mean().backward()
        optimizer.step()

    torch.manual_seed(0)
    model = TokenNet().to(dtype)
    optimizer = AdaFisher(model, lr=1e-3, damping=0.1, stat_interval=1, refresh_interval=1)
    one(model, optimizer, 0)
    other = copy.deepcopy(model)
    resumed = AdaFisher(other, lr=1e-3, damping=0.1, stat_interval=1, refresh_interval=1)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in range(1, 4):
        one(model, optimizer, seed)
        one(other, resumed, seed)
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True)
    )
    assert resumed.state[other.norm.weight]['fisher_gradient'].dtype == torch.float32


# ------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    'kind, options, words',
    [
        (MAC, dict(damping=0), 'damping=0'),
        (MAC, dict(stat_decay=1), 'stat_decay=1'),
        (MAC, dict(compat='code'), "compat='code'"),
        (SMAC, dict(gradient_scale='batch'), "gradient_scale='batch'"),
        (NysAct, dict(rank=0), 'rank=0'),
        (NysAct, dict(sketch='rows'), "sketch='rows'"),
        (AdaAct, dict(betas=0.9), 'betas=0.9'),
        (AdaAct, dict(betas=(0.9, 1.0)), 'betas=1'),
        (AdaAct, dict(eps=-1.0), 'eps=-1'),
        (AdaFisher, dict(ema='both'), "ema='both'"),
        (AdaFisher, dict(damping=-1.0), 'damping=-1'),
        (AdaFisherW, dict(momentum=1.0), 'momentum=1'),
        (AdaAct, dict(sharding='apply'), "sharding='refresh' or 'none'"),
    ],
)
def test_bad_settings(kind: Any, options: dict[str, Any], words: str) -> None:
    refused(ValueError, lambda: kind(TokenNet(), **{'lr': 0.1, **options}), words)


def test_left_over_keys_are_named() -> None:
    refused(TypeError, lambda: AdaAct(TokenNet(), lr=0.1, momentum=0.9), '_delete_=True')


def test_methods_are_mixed_layer_by_layer() -> None:
    torch.manual_seed(0)
    model = ConvNet().double()
    layers = [
        dict(
            match=dict(name='conv1'),
            preconditioner=dict(type='NystromFeature', rank=4, settings='published'),
        ),
        dict(
            match=dict(name='conv2'),
            preconditioner=dict(type='ActivationMean', settings='published'),
        ),
        dict(preconditioner=dict(type='NewtonKronecker', settings='published')),
    ]
    optimizer = Preconditioned(model, rule=dict(type='SGDM', lr=0.05), layers=layers)
    loss = model(torch.randn(4, 3, 8, 8).double()).square().mean()
    loss.backward()
    optimizer.step()
    assert {type(stack.method).__name__ for stack in optimizer.curvature.stacks} == {
        'NystromFeature',
        'ActivationMean',
        'NewtonKronecker',
    }
    assert model(torch.randn(4, 3, 8, 8).double()).isfinite().all()


def test_diagonals_need_their_rule() -> None:
    layers = [dict(preconditioner=dict(type='InputDiagonal'))]
    refused(
        ValueError,
        lambda: Preconditioned(TokenNet(), rule=dict(type='AdamW', lr=0.1), layers=layers),
        "type='EMASGD'",
    )
    model = TokenNet().double()
    optimizer = Preconditioned(model, rule=dict(type='EMASGD', lr=0.1), layers=layers)
    train(model, optimizer, token_batches(3))
    assert all(p.isfinite().all() for p in model.parameters())
