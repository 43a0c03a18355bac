"""Closed forms of the attention features against explicit Jacobians, in float64."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmprecond.core.directions import Transformed, recover_norms
from mmprecond.curvature.attention import softmax_gram
from mmprecond.linalg import named_tensors
from mmprecond.preconditioners.attention_feature import AttentionFeature, value_operator
from mmprecond.preconditioners.input_feature import InputFeature
from tests.reference import attention as oracle
from tests.reference.attention import Block, draw_block, normal, only, part, stacked
from tests.support.factors import factors_of
from tests.support.properties import distance, few, seeds

VARIANTS = ('thesis', 'gauss_newton')
SEEDS = range(50)


def spd(seed: int, *shape: int) -> Tensor:
    """Random positive definite matrices (*shape, shape[-1])."""
    rows = normal(seed, *shape, 2 * shape[-1])
    return rows @ rows.mT / rows.shape[-1]


def cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.flatten(), b.flatten(), 0))


def direct(
    preconditioner: InputFeature,
    statistics: dict[str, Tensor],
    gradients: Tensor,
    damping: Tensor | float | None = None,
) -> Tensor:
    """Preconditioned gradients (k, b, o, i)."""
    operator, fine = preconditioner.refresh(factors_of(statistics), None, damping)
    assert fine.shape == (len(gradients),) and fine.dtype == torch.bool and fine.all()
    directions = preconditioner.apply(operator, gradients)
    parts = 3 if 'query_left' in operator else 1  # W_Q, W_K, W_V
    parts *= preconditioner.norm_recovery
    recover_norms([Transformed((), gradients, directions, parts)])
    return directions


# ------------------------------------------------------------------- the factors


@pytest.mark.parametrize('setup', [{}, {'heads': 3}, {'mask': False}, {'heads': 1, 'd': 4, 'n': 8}])
def test_factors_are_sums_over_tokens(setup: dict[str, int]) -> None:
    """L_Q = K'TK, the thesis's L_K = Q'TQ and X'TX, with relative bias and mask."""
    block = draw_block(0, **setup)
    found, (q, k, v) = oracle.statistics(block), block.qkv(block.weight)
    t = softmax_gram(block.logits(block.weight).softmax(-1), v) / block.tokens
    assert distance((k.mT @ t @ k).sum(1), found['query_curvature']) < 1e-12
    assert distance((q.mT @ t @ q).sum(1), found['key_curvature']) < 1e-12
    x = block.inputs
    assert distance((x.mT @ t @ x).sum(1), found['key_feature_moment']) < 1e-12


@pytest.mark.parametrize('seed', range(3))
def test_a_token_is_one_kronecker_product(seed: int) -> None:
    """J'J by W_Q, W_K, W_V: scale^2 M'M (x) xx', scale^2 qq' (x) Y'Y, I (x) (s'X)'(s'X)."""
    # Not too sharp: a row that is nearly one-hot has a Jacobian of rounding noise.
    block = draw_block(seed, windows=2, sharp=0.5)
    jacobian, scores = block.jacobian(), block.logits(block.weight).softmax(-1)
    (q, k, v), x = block.qkv(block.weight), block.inputs
    heads, d = block.heads, q.shape[-1]
    for h, w, i in [(0, 0, 0), (0, 1, 3), (1, 0, 5), (1, 1, 2)]:
        t = softmax_gram(scores[h, w], v[h, w], torch.eye(len(x[w])).double()[i])
        features = scores[h, w, i] @ x[w]
        expected = [
            block.scale**2 * torch.kron(k[h, w].t() @ t @ k[h, w], torch.outer(x[w, i], x[w, i])),
            block.scale**2 * torch.kron(torch.outer(q[h, w, i], q[h, w, i]), x[w].t() @ t @ x[w]),
            torch.kron(torch.eye(d).double(), torch.outer(features, features)),
        ]
        own = jacobian[w, i, h * d : (h + 1) * d].flatten(-2)
        for number, matrix in enumerate(expected):
            rows = own[:, number * heads + h]
            assert distance(rows.t() @ rows, matrix) < 1e-10
            assert own[:, number * heads + 1 - h].abs().max() == 0


# ------------------------------------------------------------------- operators


@pytest.mark.parametrize(
    'damping',
    [None, 0.0, torch.tensor([[0.3], [0.001]]).double()],
    ids=['setting', 'none', 'each layer its own'],
)
@pytest.mark.parametrize('variant', VARIANTS)
def test_directions_solve_the_damped_systems(variant: str, damping: Tensor | float | None) -> None:
    """Two layers together, without norm recovery."""
    blocks = [draw_block(0), draw_block(1, sharp=0.5)]
    statistics = stacked(*blocks)
    before = {name: matrix.clone() for name, matrix in statistics.items()}
    gradients = torch.stack([blocks[0].gradient(), 1e3 * blocks[1].gradient()])
    method = AttentionFeature(variant=variant, damping=0.02, norm_recovery=False)
    found = direct(method, statistics, gradients, damping)
    assert all(torch.equal(statistics[name], matrix) for name, matrix in before.items())
    for layer, gradient in enumerate(gradients):
        own = float(damping[layer]) if isinstance(damping, Tensor) else damping
        expected = oracle.directions(
            {name: matrix[layer] for name, matrix in before.items()},
            gradient,
            variant,
            0.02 if own is None else own,
        )
        for number in range(3):
            assert distance(part(found[layer], number), part(expected, number)) < 1e-7


@pytest.mark.parametrize('variant', VARIANTS)
def test_norm_recovery_comes_once_for_each_projection(variant: str) -> None:
    """One scalar over all heads of W_Q, one for W_K, one for W_V, in each layer."""
    blocks = [draw_block(0), draw_block(1)]
    statistics = stacked(*blocks)
    gradients = torch.stack([blocks[0].gradient(), 1e3 * blocks[1].gradient()])
    raw = direct(AttentionFeature(variant=variant, norm_recovery=False), statistics, gradients)
    found = direct(AttentionFeature(variant=variant), statistics, gradients)
    scalars = set()
    for layer in range(2):
        for number in range(3):
            kept, gradient = part(found[layer], number), part(gradients[layer], number)
            scalar = float(gradient.norm() / part(raw[layer], number).norm())
            assert kept.norm() == pytest.approx(float(gradient.norm()), rel=1e-9)
            assert distance(kept, scalar * part(raw[layer], number)) < 1e-9
            scalars.add(round(scalar, 6))
    assert len(scalars) == 6


@pytest.mark.parametrize('variant', VARIANTS)
def test_a_layer_that_fails_is_reported_among_good_ones(variant: str) -> None:
    method = AttentionFeature(variant=variant)
    good = stacked(draw_block(0), draw_block(1), draw_block(2))
    _, fine = method.refresh(factors_of(good), None, None)
    assert fine.tolist() == [True, True, True]
    own = {
        'thesis': ['query_curvature', 'key_curvature', 'output_moment', 'weight'],
        'gauss_newton': ['query_moment', 'key_feature_moment', 'value_feature_moment'],
    }
    for name in (*own[variant], 'input_moment'):
        bad = dict(good, **{name: good[name].clone()})
        bad[name][1, -1, 0, 0] = float('nan')
        _, fine = method.refresh(factors_of(bad), None, None)
        assert fine.tolist() == [True, False, True], name


@few
@given(
    seeds,
    st.integers(1, 5),
    st.integers(1, 5),
    st.sampled_from([1e-4, 0.01, 1.0]),
    st.sampled_from([1e-4, 0.1]),
)
def test_the_value_operator_is_the_written_formula(
    seed: int, out: int, channels: int, damping: float, shift: float
) -> None:
    """(5.15), for any shape of W_V; checked as D X = I."""
    weight, moment = normal(seed, 2, 3, out, channels), spd(seed + 1, 2, 3, out)
    before = weight.clone(), moment.clone()
    found, fine = value_operator(weight, moment, damping, shift)
    assert found.shape == (2, 3, channels, channels) and fine.shape == (2, 3) and fine.all()
    assert torch.equal(weight, before[0]) and torch.equal(moment, before[1])
    right = oracle.value_right(weight[1, 2], moment[1, 2], damping, shift)
    eye = torch.eye(channels).double()
    assert (found[1, 2] @ right - eye).norm() < 1e-10 * found[1, 2].norm() * right.norm()
    assert torch.allclose(found, found.mT, rtol=1e-9, atol=1e-12 * float(found.abs().max()))


def test_the_value_operator_reports_what_it_cannot_invert() -> None:
    weight, moment = normal(0, 3, 4, 4), spd(1, 3, 4)
    moment[1] = -moment[1]
    assert value_operator(weight, moment, 0.0, 0.0)[1].tolist() == [True, False, True]
    moment[2, 0, 0] = float('nan')
    assert value_operator(weight, moment)[1].tolist() == [True, False, False]


@pytest.mark.parametrize('noise', [0.0, 1e-7])
def test_a_saturated_head_keeps_a_usable_operator(noise: float) -> None:
    """Nothing, or indefinite rounding noise, beside the layer's other head."""
    statistics = {name: s.float() for name, s in stacked(draw_block(0), draw_block(1)).items()}
    curvature = statistics['query_curvature']
    random = normal(3, *curvature.shape[2:]).float()
    curvature[0, 0] = noise * curvature[0, 1].norm() * (random + random.mT)
    operators, fine = AttentionFeature().refresh(factors_of(statistics), None, None)
    assert fine.all() and all(o.isfinite().all() for o in named_tensors(operators).values())


def thesis_block(seed: int) -> Block:
    """One head without bias, W_V of singular values 0.5 to 1.5."""
    block = draw_block(seed, heads=1, d=4, bias=False, mask=False)
    left, _, right = torch.linalg.svd(block.weight[2])
    block.weight[2] = left @ torch.diag(torch.linspace(0.5, 1.5, 4).double()) @ right
    return block


def test_the_thesis_value_form_is_exact_in_its_own_case(record_property: Callable) -> None:
    """One head, no bias, square well-conditioned W_V, no shift and no damping; not at defaults."""
    same_damping, undamped = [], []
    for seed in SEEDS:
        block = thesis_block(seed)
        found, gradient = oracle.statistics(block), block.gradient()[2]
        rows = block.jacobian()[..., 2, :, :].flatten(-2).flatten(0, 2)
        exact = torch.linalg.lstsq(rows, block.target.flatten()[:, None])[0].view(4, 4)
        operator, fine = value_operator(block.weight[2], found['output_moment'][0], 0.0, 0.0)
        assert fine and distance(gradient @ operator / block.tokens, exact) < 1e-8
        default, fine = value_operator(block.weight[2], found['output_moment'][0])
        assert fine and distance(gradient @ default / block.tokens, exact) > 1e-3
        undamped.append(cosine(gradient @ default, exact))
        damped = oracle.directions(found, block.gradient(), 'gauss_newton', 0.01)[2]
        same_damping.append(cosine(gradient @ default, damped))
    for name, values in (('exact, same damping', same_damping), ('exact, undamped', undamped)):
        record_property(f'cosine to {name}', median(values))
        print(
            f'thesis W_V at its defaults, cosine to {name}: median {median(values):.3f}, '
            f'from {min(values):.3f} to {max(values):.3f}'
        )
    assert 0.5 < median(same_damping) < 0.95


@pytest.mark.parametrize('exponent', [1.0, 0.5, 0.25])
def test_input_feature_is_a_power_by_eigendecomposition(exponent: float) -> None:
    """Two layers of three blocks; the norm is recovered over a layer's blocks together."""
    statistics, gradients = {'input_moment': spd(0, 2, 3, 4)}, normal(1, 2, 3, 5, 4)
    gradients[1] *= 1e3
    plain = InputFeature(exponent=exponent, damping=0.02, norm_recovery=False)
    found = direct(plain, statistics, gradients)
    recovered = direct(InputFeature(exponent=exponent, damping=0.02), statistics, gradients)
    other = direct(plain, statistics, gradients, 0.5)
    for k in range(2):
        assert distance(recovered[k], found[k] * gradients[k].norm() / found[k].norm()) < 1e-9
        for b in range(3):
            for result, damping in ((found, 0.02), (other, 0.5)):
                matrix = oracle.damped(statistics['input_moment'][k, b], damping)
                values, basis = torch.linalg.eigh(matrix)
                power = basis @ torch.diag(values**-exponent) @ basis.t()
                assert distance(result[k, b], gradients[k, b] @ power) < 1e-10


# ------------------------------------------------------------------- what the directions achieve


def linear_problem(seed: int, spread: float) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Inputs (n x i), gradient by the outputs (n x o), gradient of W and statistics, of a loss."""
    inputs = normal(seed, 12, 5) * 10 ** (spread * normal(seed + 1, 5)) @ normal(seed + 2, 5, 5)
    weight = normal(seed + 3, 3, 5).requires_grad_(True)
    outputs = F.linear(inputs, weight)
    loss = F.cross_entropy(outputs, torch.arange(12) % 3) + 0.1 * outputs.sin().sum()
    target, gradient = torch.autograd.grad(loss, [outputs, weight])
    return inputs, target, gradient, {'input_moment': oracle.moment(inputs)[None, None] / 12}


@few
@given(seeds)
def test_undamped_fsgd_solves_the_normal_equations(seed: int) -> None:
    """(5.1): the change of W whose outputs are nearest to a gradient step on the outputs."""
    inputs, target, gradient, statistics = linear_problem(seed, 0.2)
    method = InputFeature(norm_recovery=False)
    step = direct(method, statistics, gradient[None, None], 0.0)[0, 0] / len(inputs)
    assert distance(inputs.t() @ inputs @ step.t(), inputs.t() @ target) < 1e-8
    assert distance(step, torch.linalg.lstsq(inputs, target)[0].t()) < 1e-6


@pytest.mark.parametrize('heads', [1, 2, 3])
def test_the_undamped_exact_value_form_solves_the_normal_equations(heads: int) -> None:
    """(5.11), through the Jacobian of the attention output by W_V, heads and bias and mask."""
    for seed in range(8):
        block = draw_block(seed, heads=heads, windows=4 + heads)
        method = AttentionFeature(variant='gauss_newton', norm_recovery=False)
        step = direct(method, stacked(block), block.gradient()[None], 0.0)[0, 2 * heads :]
        rows = block.jacobian()[..., 2 * heads :, :, :].flatten(-3).flatten(0, 2)
        target = block.target.flatten()
        step = step.flatten() / block.tokens
        assert distance(rows.t() @ (rows @ step), rows.t() @ target) < 1e-8
        assert distance(step, torch.linalg.lstsq(rows, target[:, None])[0][:, 0]) < 1e-6


def never_less(reductions: list[float]) -> None:
    """Each is as large as the next one, of less to more damped; the last is the gradient's."""
    assert reductions[-1] > 0
    for less, more in zip(reductions, reductions[1:], strict=False):
        assert less >= more * (1 - 1e-9)


@few
@given(seeds, st.floats(0, 1.5))
def test_damped_fsgd_reduces_at_least_as_much_as_the_gradient(seed: int, spread: float) -> None:
    """With an exact line search, on every draw; and the more, the less it is damped."""
    inputs, target, gradient, statistics = linear_problem(seed, spread)
    steps = [
        direct(InputFeature(damping=damping), statistics, gradient[None, None])[0, 0]
        for damping in (1e-4, 0.01, 1.0)
    ]
    never_less(
        [
            oracle.reduction(lambda w: F.linear(inputs, w), gradient, target, step)
            for step in (*steps, gradient)
        ]
    )


@few
@given(seeds, st.integers(1, 2), st.integers(5, 7), st.floats(0.2, 3), st.booleans())
def test_the_damped_exact_value_form_reduces_at_least_as_much(
    seed: int, heads: int, n: int, sharp: float, mask: bool
) -> None:
    """Likewise, for each head by itself."""
    block = draw_block(seed, heads=heads, n=n, windows=2, sharp=sharp, mask=mask)
    statistics, gradient = stacked(block), block.gradient()
    steps = [
        direct(
            AttentionFeature(variant='gauss_newton', damping=damping), statistics, gradient[None]
        )[0]
        for damping in (1e-4, 0.01, 1.0)
    ]
    for head in range(2 * heads, 3 * heads):
        never_less([block.reduction(only(step, head)) for step in (*steps, gradient)])


def test_one_step_for_unlike_heads_has_no_such_bound() -> None:
    """What cannot be claimed: each head is damped by its own eigenvalue."""
    block = draw_block(0, heads=2, d=1)
    moments = torch.stack([torch.diag(torch.tensor([100.0, 1e-3])), 0.01 * torch.eye(2)]).double()
    statistics = stacked(block) | {'value_feature_moment': moments[None]}
    gradient = torch.zeros(1, 6, 1, 2).double()
    gradient[0, 4, 0, 1], gradient[0, 5, 0, 0] = 1.0, 0.03
    step = direct(AttentionFeature(variant='gauss_newton'), statistics, gradient)[0, 4:]
    gradient = gradient[0, 4:]
    taken = [float((gradient * d).sum() ** 2 / (d @ moments * d).sum()) for d in (step, gradient)]
    assert taken[0] < 0.1 * taken[1]


Wins = dict[tuple[str, int], list[tuple[float, float]]]


@pytest.fixture(scope='module')
def wins() -> Wins:
    """Reductions by the direction and by the gradient, by variant and part, of 50 draws."""
    found: Wins = {(variant, number): [] for variant in VARIANTS for number in range(3)}
    for seed in SEEDS:
        block = draw_block(seed, windows=4)
        statistics, gradient = stacked(block), block.gradient()
        plain = [block.reduction(part(gradient, number)) for number in range(3)]
        for variant in VARIANTS:
            step = direct(AttentionFeature(variant=variant), statistics, gradient[None])[0]
            for number in range(3):
                taken = block.reduction(part(step, number))
                found[variant, number].append((taken, plain[number]))
    return found


@pytest.mark.parametrize('number', range(3), ids=oracle.PARTS)
@pytest.mark.parametrize('variant', VARIANTS)
def test_directions_reduce_more_than_the_gradient(
    wins: Wins, variant: str, number: int, record_property: Callable
) -> None:
    """The median over 50 draws; the thesis's W_K and W_V are reported only."""
    pairs, name = wins[variant, number], oracle.PARTS[number]
    won = sum(taken > plain for taken, plain in pairs) / len(pairs)
    taken, plain = (median(values) for values in zip(*pairs, strict=True))
    record_property('wins', won)
    print(
        f'{variant} W_{name[0].upper()}: more than the gradient on {won:.0%} of draws, '
        f'median {taken:.4f} against {plain:.4f} of the objective'
    )
    assert len(pairs) == 50 and all(0 < a <= 1 and 0 < b <= 1 for a, b in pairs)
    if variant == 'gauss_newton' or name == 'query':
        assert taken > 1.2 * plain and won >= 0.8
