"""SKFAC: random positions of each sample, rows kept as columns, inverses by Woodbury."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmprecond.curvature import Columns
from mmprecond.optimizers import KFAC, SKFAC
from tests.reference.factors import plain_copy
from tests.reference.kfac import ReferenceKFAC
from tests.reference.nkfac import power_iteration
from tests.support.samples import CONVS, loss_of, slow
from tests.support.samples import positions as rows_of
from tests.support.sketches import EVERY, Tall, close, entry, factors, images, measure
from tests.support.trajectories import Convs, Tokens, follow, make_loss
from tests.support.trajectories import batch as rows

SCALINGS = ['kl_clip', 'norm_recovery', 'none']


# ------------------------------------------------------------------- all positions


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('name', CONVS)
def test_all_positions_of_a_map_are_expand(name: str, bias: bool) -> None:
    """Ten times as many as there are, and exactly as many; images in several orders of memory."""
    torch.manual_seed(0)
    conv = nn.Conv2d(**{'in_channels': 4, 'out_channels': 4, 'bias': bias, **CONVS[name]}).double()
    x = torch.randn(3, 4, 5, 6).double()
    count = conv(x)[0, 0].numel()
    for given in (
        x,
        x.to(memory_format=torch.channels_last),
        x[0],
        torch.randn(1, 4, 1, 6).double().expand(2, 4, 5, 6),
        torch.randn(2, 6, 4, 5).double().permute(0, 2, 3, 1),
    ):
        for positions in (count, 10 * count):
            for settings in (
                dict(capture_mb=1e-6),
                dict(solver='woodbury', stat_decay=0.0, max_columns=500),
            ):
                optimizer = measure(
                    copy.deepcopy(conv), given, reduction='sample', positions=positions, **settings
                )
                close(factors(optimizer), slow(conv, 'expand', given))


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('shape', [(4,), (5, 4), (3, 1, 4), (2, 3, 4), (2, 3, 2, 4)], ids=str)
def test_all_positions_of_a_sequence_are_expand(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    module, x = nn.Linear(4, 3, bias=bias).double(), torch.randn(shape).double()
    for positions in (6, 60):
        optimizer = measure(copy.deepcopy(module), x, reduction='sample', positions=positions)
        close(factors(optimizer), slow(module, 'expand', x))


# ------------------------------------------------------------------- some positions


def candidates(module: nn.Module, x: Tensor, count: int) -> dict[tuple[int, ...], Any]:
    """Sums over samples of x x' and g g' at each possible choice of positions, scaled to all."""
    plain = plain_copy(module)
    out = plain(x)
    (slope,) = torch.autograd.grad(loss_of(out), out)
    pairs = list(rows_of(plain, x, slope))
    total = pairs[0][1].shape[1]
    found = {}
    for chosen in itertools.combinations(range(total), min(count, total)):
        right, left = 0.0, 0.0
        for a, b in pairs:
            if plain.bias is not None:
                a = torch.cat([a, torch.ones_like(a[..., :1])], 2)
            for p in chosen:
                right = right + a[:, p, :, None] * a[:, p, None].expand(len(b), -1, -1)
                left = left + b[:, p, :, None] * b[:, p, None]
        found[chosen] = [m * total / len(chosen) for m in (right, left)] + [len(pairs) * total]
    return found


def explain(found: tuple[Tensor, Tensor], *calls: dict[tuple[int, ...], Any]) -> list[Any]:
    """The choices, one a call, that give these factors on both sides."""
    agree = []
    for chosen in itertools.product(*calls):
        right, left, n = (
            sum(parts)
            for parts in zip(*(c[k] for c, k in zip(calls, chosen, strict=True)), strict=True)
        )
        fits = [
            torch.allclose(a, b, rtol=1e-9, atol=1e-12)
            for a, b in zip(found, (right / n, left * n), strict=True)
        ]
        assert fits[0] == fits[1], 'positions of inputs and gradients differ'
        agree += [chosen] * all(fits)
    return agree


SOME: dict[str, tuple[Any, tuple[int, ...]]] = {
    'stride': (lambda: nn.Conv2d(2, 3, 3, stride=2), (3, 2, 5, 7)),
    'padding': (lambda: nn.Conv2d(2, 3, 2, padding=1, stride=(2, 3), bias=False), (2, 2, 3, 7)),
    'groups': (lambda: nn.Conv2d(4, 6, (2, 1), groups=2, dilation=(2, 1)), (2, 4, 4, 3)),
    'depthwise': (lambda: nn.Conv2d(3, 3, 3, groups=3, padding='same'), (2, 3, 2, 3)),
    'one image': (lambda: nn.Conv2d(2, 3, 1), (2, 2, 3)),
    'tokens': (lambda: nn.Linear(4, 3), (3, 6, 4)),
    'map of tokens': (lambda: nn.Linear(4, 3, bias=False), (2, 2, 3, 4)),
}


@pytest.mark.parametrize('count', [1, 2, 5])
@pytest.mark.parametrize('name', SOME)
def test_one_choice_of_positions_explains_both_sides(name: str, count: int) -> None:
    """For inputs and gradients, for all samples; each of two calls draws its own."""
    torch.manual_seed(0)
    make, shape = SOME[name]
    module = make().double()
    x, y = torch.randn(shape).double(), torch.randn(shape).double()
    for settings in ({}, dict(solver='woodbury', stat_decay=0.0, max_columns=60)):
        before = torch.get_rng_state()
        optimizer = measure(module, x, reduction='sample', positions=count, **settings)
        assert torch.equal(torch.get_rng_state(), before)
        (one,) = explain(factors(optimizer), candidates(module, x, count))
        optimizer = measure(module, x, y, reduction='sample', positions=count, **settings)
        (both,) = explain(
            factors(optimizer), candidates(module, x, count), candidates(module, y, count)
        )
        assert one[0] in both  # the last call's gradient arrives first


@pytest.mark.parametrize('name', ['padding', 'groups', 'tokens'])
def test_all_choices_are_equally_likely_and_unbiased(name: str) -> None:
    """The mean over draws comes near 'expand' as one over the root of their number."""
    torch.manual_seed(0)
    make, shape = SOME[name]
    module, x = make().double(), torch.randn(shape).double()
    choices = candidates(module, x, 2)
    wanted = slow(module, 'expand', x)
    n = choices[0, 1][2]
    spread = [
        torch.stack([c[0] / n for c in choices.values()]),
        torch.stack([c[1] * n for c in choices.values()]),
    ]
    close([s.mean(0) for s in spread], wanted)  # by symmetry
    optimizer = KFAC(
        module,
        lr=0.0,
        reduction='sample',
        positions=2,
        stat_decay=0.0,
        **EVERY,
        settings='published',
    )
    draws, sums = 300, [0.0, 0.0]
    counts = dict.fromkeys(choices, 0)
    for _ in range(draws):
        optimizer.zero_grad()
        loss_of(module(x)).backward()
        optimizer.step()
        found = factors(optimizer)
        sums = [a + b for a, b in zip(sums, found, strict=True)]
        nearest = min(choices, key=lambda c: float((choices[c][1] * n - found[1]).norm()))
        counts[nearest] += 1
    expected = draws / len(choices)
    chi = sum((c - expected) ** 2 / expected for c in counts.values())
    assert chi < len(choices) - 1 + 4 * (2 * (len(choices) - 1)) ** 0.5
    for total, all_of_them, mean in zip(sums, spread, wanted, strict=True):
        variance = (all_of_them - mean).square().sum() / len(choices)
        error = (total / draws - mean).square().sum()
        assert float(error) < 9 * float(variance) / draws


# ------------------------------------------------------------------- Woodbury


@pytest.mark.parametrize('form, micro', [('pi', False), ('pi', True), ('relative', True)])
@pytest.mark.parametrize('scaling', SCALINGS)
@pytest.mark.parametrize('reduction', ['sample', 'reduce'])
def test_it_is_the_dense_inverse(reduction: str, scaling: str, form: str, micro: bool) -> None:
    """Of the same rows: KFAC draws the same positions. One layer has a damping of its own."""
    torch.manual_seed(0)
    model = Tall().double()
    twin = copy.deepcopy(model)
    lr = 1e-4 if form == 'relative' and scaling == 'none' else 0.01  # or it diverges
    settings = dict(
        lr=lr,
        weight_decay=0.01,
        reduction=reduction,
        positions=2,
        damping=0.1,
        damping_form=form,
        scaling=scaling,
        **EVERY,
    )
    groups = lambda model: [
        dict(params=[p], **(dict(damping=0.7) if 'twice' in name else {}))
        for name, p in model.named_parameters()
    ]
    ours = SKFAC(groups(model), model=model, max_columns=13, **settings, settings='published')
    theirs = KFAC(groups(twin), model=twin, stat_decay=0.0, **settings, settings='published')
    assert (
        sum(
            isinstance(statistic.form, Columns)
            for stack in ours.curvature.layers.values()
            for statistic in stack.kept
        )
        == 7
    )
    for step in range(4):
        x = images(step, 3 if micro and reduction == 'reduce' else 2)
        for net, optimizer in ((model, ours), (twin, theirs)):
            optimizer.zero_grad()
            for part in (x[:1], x[1:]) if micro else (x,):
                (make_loss(part)(net) * len(part) / len(x)).backward()
            optimizer.step()
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-10, msg=f'{name} at step {step}')


@pytest.mark.parametrize('make, max_columns', [(Tokens, 6), (Convs, 6)])
@pytest.mark.parametrize(
    'settings',
    [
        dict(),
        dict(scaling='norm_recovery'),
        dict(scaling='none', damping=1.0),
        dict(stat_interval=1, refresh_interval=3),
        dict(stat_interval=2, refresh_interval=2),
    ],
    ids=str,
)
def test_reduced_trajectories(make: Any, max_columns: int, settings: dict[str, Any]) -> None:
    """Against the slow reference, which inverts whole matrices."""
    settings = EVERY | dict(reduction='reduce', damping=0.25) | settings
    rule = dict(lr=0.02, momentum=0.9, weight_decay=0.01)
    model = make().double()
    reference = ReferenceKFAC(plain_copy(model), **rule, stat_decay=0.0, **settings)
    optimizer = SKFAC(model, max_columns=max_columns, **rule, **settings, settings='published')
    assert 'Woodbury' in optimizer.table()
    follow(
        model,
        optimizer,
        reference,
        lambda t: [make_loss(rows(t, 3 if make is Tokens else 2, make.features))],
        5,
    )


@pytest.mark.parametrize('form', ['pi', 'relative'])
def test_unequal_micro_batches_are_the_joint_batch(form: str) -> None:
    torch.manual_seed(0)
    model = Tall().double()
    twin = copy.deepcopy(model)
    settings = dict(
        lr=0.01,
        reduction='reduce',
        max_columns=12,
        damping_form=form,
        scaling='norm_recovery',
        **EVERY,
    )
    parts, whole = (
        SKFAC(model, **settings, settings='published'),
        SKFAC(twin, **settings, settings='published'),
    )
    for step in range(3):
        x = images(step, 5)
        parts.zero_grad(), whole.zero_grad()
        for part in (x[:2], x[2:]):
            (make_loss(part)(model) * len(part) / 5).backward()
        make_loss(x)(twin).backward()
        parts.step(), whole.step()
        for name in ('conv', 'twice', 'head'):
            close(factors(parts, f'{name}.weight'), factors(whole, f'{name}.weight'))
        if form == 'pi':  # 'relative' depends on the order of the columns and on their signs
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                torch.testing.assert_close(p, q, rtol=0, atol=1e-10)


@pytest.mark.parametrize('form', ['pi', 'relative'])
@pytest.mark.parametrize('bias', [True, False])
def test_the_operator_is_the_inverse_of_the_damped_factor(form: str, bias: bool) -> None:
    """Written out: scale (I - U U') (A A' + mu I) = I, with mu as the docstring defines it."""
    torch.manual_seed(0)
    module = nn.Conv2d(6, 40, 3, groups=2, bias=bias).double()
    optimizer = measure(
        module,
        torch.randn(3, 6, 6, 6).double(),
        make=SKFAC,
        damping=0.04,
        damping_form=form,
        max_columns=18,
        positions=5,
    )
    found = factors(optimizer)
    operator = entry(optimizer)['operator']
    for block in range(2):
        pair = [matrix[block] for matrix in found]
        pi = float(torch.linalg.eigvalsh(pair[0]).mean() / torch.linalg.eigvalsh(pair[1]).mean())
        for side, factor, power in zip(('input', 'gradient'), pair, (0.5, -0.5), strict=True):
            mu = 0.2 * pi**power if form == 'pi' else 0.04 * power_iteration(factor)
            u, scale = (operator[f'{side}_{k}'][block] for k in ('columns', 'scale'))
            eye = torch.eye(len(u)).double()
            product = scale * (eye - u @ u.t()) @ (factor + mu * eye)
            torch.testing.assert_close(product, eye, rtol=0, atol=1e-9)


# ------------------------------------------------------------------- more rows than slots


def mean_of_products(
    module: nn.Module, inputs: list[Tensor], draws: int, **settings: Any
) -> list[Tensor]:
    optimizer = SKFAC(module, lr=0.0, **EVERY, **settings, settings='published')
    sums: list[Any] = [0.0, 0.0]
    for _ in range(draws):
        optimizer.zero_grad()
        sum(loss_of(module(x)) for x in inputs).backward()
        optimizer.step()
        sums = [a + b for a, b in zip(sums, factors(optimizer), strict=True)]
        assert all(a.isfinite().all() for a in entry(optimizer)['operator'].values())
    return [s / draws for s in sums]


@pytest.mark.parametrize('slots', [1, 2, 3, 6])
def test_overflowing_rows_are_right_in_the_mean(slots: int) -> None:
    """The error is that of a count sketch: rows a and b in one slot add s (a b' + b a')."""
    torch.manual_seed(0)
    module, draws = nn.Linear(7, 8, bias=False).double(), 400
    inputs = [torch.randn(k, 7).double() for k in (4, 3)]
    wanted = slow(module, 'expand', *inputs)
    found = mean_of_products(module, inputs, draws, max_columns=slots)
    slopes = [torch.autograd.grad(loss_of(out), out)[0] for out in map(module, inputs)]
    for mean, right, all_rows, factor in zip(
        found, wanted, (inputs, slopes), (1 / 7, 7.0), strict=True
    ):
        stacked = torch.cat(list(reversed(all_rows)))  # in the order of the backward pass
        variance = sum(
            float(
                (torch.outer(stacked[a], stacked[b]) + torch.outer(stacked[b], stacked[a]))
                .square()
                .sum()
            )
            * factor**2
            for a in range(7)
            for b in range(a)
            if (a - b) % slots == 0
        )
        error = float((mean - right).square().sum())
        assert 0.1 * variance / draws < error < 6 * variance / draws


def test_overflowing_random_positions_are_right_in_the_mean() -> None:
    torch.manual_seed(0)
    module, x = nn.Linear(5, 6, bias=False).double(), torch.randn(1, 4, 5).double()
    wanted = slow(module, 'expand', x)
    found = mean_of_products(module, [x], 300, max_columns=2, positions=3)
    assert float((found[0] - wanted[0]).norm() / wanted[0].norm()) < 0.15


# ------------------------------------------------------------------- sizes


@pytest.mark.parametrize('reduction', ['sample', 'reduce'])
def test_a_long_side_costs_columns_alone(reduction: str) -> None:
    """With 16 columns even a side over max_dim is taken."""
    module = nn.Linear(500, 40)
    optimizer = measure(
        module, torch.randn(9, 3, 500), make=SKFAC, max_dim=64, max_columns=16, reduction=reduction
    )
    kept = entry(optimizer)
    suffix = dict(sample='_sampled', reduce='_reduced')[reduction]
    assert {k: tuple(v.shape) for k, v in kept['statistics'].items()} == {
        f'input_columns{suffix}': (1, 501, 16),
        f'gradient_columns{suffix}': (1, 40, 16),
    }
    assert {k: tuple(v.shape) for k, v in kept['operator'].items()} == {
        'input_columns': (1, 501, 16),
        'input_scale': (1, 1, 1),
        'gradient_columns': (1, 40, 16),
        'gradient_scale': (1, 1, 1),
    }
    assert '501x16 + 40x16' in optimizer.table() and 'Woodbury' in optimizer.table()
    dense = measure(module, torch.randn(9, 500), make=SKFAC, max_columns=501)
    assert sorted(entry(dense)['operator']) == ['gradient_moment', 'input_moment']
    with pytest.raises(ValueError, match='max_dim=64'):
        KFAC(module, lr=0.1, max_dim=64, settings='published')
