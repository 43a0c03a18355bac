"""SGDMBK and AdamWBK against a slow reference in float64, and the inverse roots they rest on."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mmprecond.linalg import inverse_power, newton_schulz_inverse_root
from mmprecond.optimizers import SGDMBK, AdamWBK, Preconditioned, PreconditionedOptimizer
from mmprecond.preconditioners import KroneckerRoot
from tests.reference.factors import Loss, plain_copy
from tests.reference.root import ReferenceRoot, newton_schulz
from tests.support.errors import refused
from tests.support.factors import factors_of
from tests.support.states import differences, everything, saved
from tests.support.trajectories import Convs, Tokens, follow, make_loss
from tests.support.trajectories import batch as rows

SGD = dict(lr=0.05, momentum=0.9, weight_decay=0.01)
ADAM = dict(lr=0.01, betas=(0.8, 0.95), eps=1e-7, weight_decay=0.02)
RULES = {'SGDMBK': SGD, 'AdamWBK': ADAM}
KINDS = {'SGDMBK': SGDMBK, 'AdamWBK': AdamWBK}
EVERY = dict(stat_interval=1, refresh_interval=1)
DTYPES = [torch.float32, torch.float64]
SEEDS = st.integers(0, 10**6)


def both(
    make: Callable[[], nn.Module], rule: str, **settings: Any
) -> tuple[nn.Module, PreconditionedOptimizer, ReferenceRoot]:
    torch.manual_seed(0)
    model = make().double()
    settings = EVERY | settings
    reference = ReferenceRoot(plain_copy(model), **RULES[rule], **settings)
    return model, KINDS[rule](model, **RULES[rule], **settings), reference


def losses(make: Any) -> Callable[[int], list[Loss]]:
    return lambda step: [make_loss(rows(step, 9 if make.features else 3, make.features))]


# ------------------------------------------------------------------- trajectories


@pytest.mark.parametrize('solver', ['newton_schulz', 'eigh'])
@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize('make', [Convs, Tokens])
def test_every_step_measures_and_refreshes(make: Any, rule: str, solver: str) -> None:
    """With groups, shared weights and a head for three levels."""
    model, optimizer, reference = both(make, rule, solver=solver)
    follow(model, optimizer, reference, losses(make), 4 if make is Convs else 8)


@pytest.mark.parametrize(
    'options',
    [
        dict(stat_interval=2, refresh_interval=4),
        dict(stat_interval=3, refresh_interval=3),
        dict(refresh_interval=2, stat_decay=0.0),
        dict(root_steps=1),
        dict(root_steps=4),
        dict(root_steps=25),
        dict(damping=0.3, stat_decay=0.5),
        dict(solver='eigh', damping=1e-8, refresh_interval=3),
    ],
    ids=str,
)
@pytest.mark.parametrize('rule', RULES)
def test_settings(rule: str, options: dict[str, Any]) -> None:
    model, optimizer, reference = both(Tokens, rule, **options)
    follow(model, optimizer, reference, losses(Tokens), 9)


@pytest.mark.parametrize('rule', RULES)
def test_a_layer_used_now_and_then(rule: str) -> None:
    """Zero rows are no capture, and a layer that joins late is refreshed at once."""
    model, optimizer, reference = both(Tokens, rule, stat_interval=2, refresh_interval=4)
    follow(
        model,
        optimizer,
        reference,
        lambda t: [make_loss(rows(t, features=6), use_second=t in (3, 6, 7, 9))],
        11,
    )


@pytest.mark.parametrize('rule', RULES)
def test_accumulation(rule: str) -> None:
    model, optimizer, reference = both(Tokens, rule)
    joint = copy.deepcopy(model)
    whole = KINDS[rule](joint, **RULES[rule], **EVERY)
    for step in range(4):
        x = rows(step, 9, 6)
        parts = [make_loss(x[:2], 9 / 2), make_loss(x[2:], 9 / 7)]
        follow(model, optimizer, reference, lambda _, parts=parts: parts, 1)
        whole.zero_grad()
        make_loss(x)(joint).backward()
        whole.step()
        for a, b in zip(model.parameters(), joint.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize('rule', RULES)
def test_settings_of_single_parameters(rule: str) -> None:
    overrides = {
        'first.bias': dict(lr=0.08, weight_decay=0.0),
        'last.weight': dict(damping=0.5),
        'second.weight': dict(precondition=False),
        'third.bias': dict(precondition=False),
    }
    model = both(Tokens, rule)[0]
    reference = ReferenceRoot(plain_copy(model), **RULES[rule], overrides=overrides)
    groups = [dict(params=[p], **overrides.get(name, {})) for name, p in model.named_parameters()]
    optimizer = KINDS[rule](groups, model=model, **RULES[rule], **EVERY)
    follow(model, optimizer, reference, losses(Tokens), 4)


@pytest.mark.parametrize('rule', RULES)
def test_preconditioned_is_adabk(rule: str) -> None:
    model, optimizer, _ = both(Tokens, rule)
    twin = plain_copy(model)
    kind = dict(type='SGDM') if rule == 'SGDMBK' else dict(type='AdamW', decay='published')
    other = Preconditioned(
        twin,
        rule=kind | RULES[rule],
        layers=[dict(preconditioner=dict(type='KroneckerRoot', **EVERY))],
    )
    for step in range(5):
        for net, opt in ((model, optimizer), (twin, other)):
            opt.zero_grad()
            losses(Tokens)(step)[0](net).backward()
            opt.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize('at', [1, 2, 4, 5])
@pytest.mark.parametrize('solver', ['newton_schulz', 'eigh'])
def test_a_resumed_run_continues_bit_for_bit(solver: str, at: int) -> None:
    options = ADAM | dict(stat_interval=2, refresh_interval=4, solver=solver)

    def run(model: nn.Module, optimizer: PreconditionedOptimizer, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            make_loss(rows(step, features=6).float())(model).backward()
            optimizer.step()

    model = Tokens()
    optimizer = AdamWBK(model, **options)
    run(model, optimizer, range(at))
    twin = copy.deepcopy(model)
    resumed = AdamWBK(twin, **options)
    resumed.load_state_dict(saved(optimizer.state_dict()))
    run(model, optimizer, range(at, 9)), run(twin, resumed, range(at, 9))
    assert differences(everything(model, optimizer), everything(twin, resumed)) == []


# ------------------------------------------------------------------- inverse roots


def with_values(values: list[float] | Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix of these eigenvalues."""
    values = torch.as_tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(
        torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)
    )[0]
    return basis @ (values[:, None] * basis.mT)


def exact_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.rsqrt()) @ vectors.mT


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(1, 8), SEEDS, st.integers(-20, 20))
def test_converged_roots_are_exact(n: int, seed: int, power: int) -> None:
    """Where no eigenvalue is below a hundredth of the trace, at any scale."""
    generator = torch.Generator().manual_seed(seed)
    values = 0.1 + torch.rand(n, generator=generator, dtype=torch.float64)
    matrix = 10.0**power * with_values(values, seed)
    before = matrix.clone()
    root, good = newton_schulz_inverse_root(matrix)
    assert good.shape == () and bool(good) and torch.equal(matrix, before)
    assert torch.allclose(root, exact_root(matrix), rtol=1e-3, atol=1e-3 * float(root.abs().max()))
    many, _ = newton_schulz_inverse_root(matrix, 30)
    torch.testing.assert_close(many, exact_root(matrix), rtol=1e-9, atol=0)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(1, 8), SEEDS, st.integers(0, 12), st.floats(0, 8))
def test_roots_follow_the_published_iteration(n: int, seed: int, steps: int, spread: float) -> None:
    matrix = with_values(torch.logspace(-spread, 0, n), seed)
    root, good = newton_schulz_inverse_root(matrix, steps)
    wanted = newton_schulz(matrix, steps)
    assert bool(good)
    assert torch.allclose(root, wanted, rtol=1e-9, atol=1e-9 * float(wanted.abs().max()))


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize(
    'y, ratio', [(0.3, 1.0), (1e-2, 1.0), (1e-3, 0.976), (1e-4, 0.53), (1e-5, 0.18)]
)
def test_truncation_after_ten_steps(y: float, ratio: float, dtype: torch.dtype) -> None:
    """An eigenvalue of y times the trace, against its true root (spec 1.1)."""
    matrix = 7 * with_values([y, *[(1 - y) / 4] * 4])
    vectors = torch.linalg.eigh(matrix)[1]
    root, _ = newton_schulz_inverse_root(matrix.to(dtype))
    smallest = vectors[:, 0] if y < 0.2 else vectors[:, -1]
    found = float(smallest @ root.double() @ smallest)
    assert found * math.sqrt(7 * y) == pytest.approx(ratio, abs=0.006)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(2, 8), SEEDS, st.floats(0, 30), st.integers(0, 12))
def test_no_root_is_above_its_bound(n: int, seed: int, spread: float, steps: int) -> None:
    """1.5^steps / sqrt(trace): 57.7 / sqrt(trace) as published."""
    matrix = with_values(torch.logspace(-spread, 0, n, dtype=torch.float64), seed)
    root, good = newton_schulz_inverse_root(matrix, steps)
    assert bool(good)
    bound = 1.5**steps / float(matrix.trace()) ** 0.5
    assert torch.linalg.matrix_norm(root, 2) <= bound * (1 + 1e-6)


BAD = {
    'zero': torch.zeros(3, 3),
    'nan': torch.full((3, 3), float('nan')),
    'infinite': torch.diag(torch.tensor([1.0, float('inf'), 1.0])),
    'negative': -torch.eye(3),
    'no trace': torch.diag(torch.tensor([1.0, -1.0, 0.0])),
    'indefinite': torch.diag(torch.tensor([1.0, -0.5, 2.0])),
    'one nan': torch.eye(3).index_put(
        (torch.tensor(1), torch.tensor(0)), torch.tensor(float('nan'))
    ),
}


def stack_with(bad: Tensor, dtype: torch.dtype) -> Tensor:
    good = [with_values([1.0, 2.0, 3.0], seed) for seed in (1, 2)]
    return torch.stack([good[0], bad.double(), good[1]]).to(dtype)[:, None]


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('name', BAD)
def test_bad_matrices_among_good_ones_are_reported(name: str, dtype: torch.dtype) -> None:
    stack = stack_with(BAD[name], dtype)
    for function in (newton_schulz_inverse_root, lambda m: inverse_power(m, 0.5)):
        roots, good = function(stack)
        assert good.tolist() == [[True], [False], [True]], function
        torch.testing.assert_close(
            roots[[0, 2], 0].double(),
            torch.stack([exact_root(m) for m in stack[[0, 2], 0].double()]),
            rtol=1e-3,
            atol=1e-4,
        )


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('negative', [0.01, 0.05])
def test_a_somewhat_indefinite_matrix_is_reported(negative: float, dtype: torch.dtype) -> None:
    """Its iteration grows without bound, but ten steps are too few to overflow."""
    roots, good = newton_schulz_inverse_root(with_values([1.0, -negative, 2.0]).to(dtype))
    assert not good or roots.abs().max() < 1.5**10


@pytest.mark.parametrize('solver', ['newton_schulz', 'eigh'])
@pytest.mark.parametrize('name', sorted(set(BAD) - {'zero'}))
def test_a_refresh_reports_bad_statistics(name: str, solver: str) -> None:
    method = KroneckerRoot(solver=solver)
    fine = stack_with(torch.eye(3), torch.float64)
    _, good = method.refresh(
        factors_of({'input_moment': stack_with(BAD[name], torch.float64), 'gradient_moment': fine}),
        None,
    )
    assert good.tolist() == [True, False, True]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(1, 8),
    SEEDS,
    st.floats(0, 4),
    st.integers(-6, 6),
    st.sampled_from([0.25, 0.5, 1.0, 1.5, 2.0]),
)
def test_inverse_powers(n: int, seed: int, spread: float, power: int, exponent: float) -> None:
    """A^-p has A's eigenvectors and the powers of its eigenvalues."""
    values = 10.0**power * torch.logspace(-spread, 0, n, dtype=torch.float64)
    result, good = inverse_power(with_values(values, seed), exponent)
    wanted = with_values(values**-exponent, seed)
    assert bool(good) and result.shape == (n, n)
    assert torch.allclose(result, wanted, rtol=1e-7, atol=1e-7 * float(wanted.abs().max()))


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('exponent', [0.25, 0.5, 1.0, 2.0])
def test_inverse_powers_of_a_batch_are_those_of_each(exponent: float, dtype: torch.dtype) -> None:
    stack = torch.stack([with_values([0.1, 1.0, 3.0, 4.0], k) for k in range(6)]).to(dtype)
    stack = stack.reshape(3, 2, 4, 4)
    result, good = inverse_power(stack, exponent)
    roots, fine = newton_schulz_inverse_root(stack)
    assert good.shape == fine.shape == (3, 2) and good.all() and fine.all()
    assert result.dtype == roots.dtype == dtype
    for k in range(3):
        for b in range(2):
            torch.testing.assert_close(
                result[k, b], inverse_power(stack[k, b], exponent)[0], rtol=1e-4, atol=1e-5
            )
            torch.testing.assert_close(
                roots[k, b], newton_schulz_inverse_root(stack[k, b])[0], rtol=1e-4, atol=1e-5
            )


# ------------------------------------------------------------------- settings


def test_default_settings() -> None:
    for kind in KINDS.values():
        optimizer = kind(nn.Linear(3, 2), lr=0.1)
        (method,) = {stack.method for stack in optimizer.curvature.stacks}
        assert (
            method
            == KroneckerRoot()
            == KroneckerRoot(
                stat_interval=200,
                refresh_interval=2000,
                stat_decay=0.9,
                damping=1e-5,
                solver='newton_schulz',
                root_steps=10,
            )
        )
    assert optimizer.rule.decay == 'published'
    assert optimizer.defaults == dict(lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize(
    'name, value, remedy',
    [
        ('solver', 'newton', 'newton_schulz, eigh'),
        ('solver', None, 'newton_schulz, eigh'),
        ('root_steps', 0, 'at least 1'),
        ('root_steps', 10.0, 'at least 1'),
        ('damping', 0.0, 'greater than 0'),
        ('damping', float('nan'), 'give a number'),
        ('stat_decay', 1.0, 'less than 1'),
        ('stat_decay', -0.1, 'at least 0'),
        ('stat_interval', 300, 'multiple'),
        ('refresh_interval', 100, 'stat_interval=200'),
        ('max_dim', 0, 'at least 1'),
        ('oversize', 'crop', 'skip, one_sided'),
        ('lr', -1.0, 'at least 0'),
        ('weight_decay', None, 'at least 0'),
    ],
)
def test_values_out_of_range(kind: str, name: str, value: Any, remedy: str) -> None:
    refused(
        ValueError, lambda: KINDS[kind](nn.Linear(2, 2), **{'lr': 0.1, name: value}), name, remedy
    )


@pytest.mark.parametrize(
    'kind, key',
    [
        ('SGDMBK', 'betas'),
        ('AdamWBK', 'momentum'),
        ('SGDMBK', 'exponent'),
        ('AdamWBK', 'newton_steps'),
        ('SGDMBK', 'damping_floor'),
        ('AdamWBK', 'decay'),
    ],
)
def test_a_left_over_key_says_delete(kind: str, key: str) -> None:
    refused(
        TypeError,
        lambda: KINDS[kind](nn.Linear(2, 2), lr=0.1, **{key: 1}),
        kind,
        key,
        '`_delete_=True`',
        'root_steps',
    )


def test_a_model_and_its_parameters() -> None:
    for kind, cls in KINDS.items():
        refused(
            ValueError,
            lambda: cls(nn.Linear(2, 2).parameters(), lr=0.1),
            kind,
            'model=',
            "constructor='PrecondOptimWrapperConstructor'",
        )
