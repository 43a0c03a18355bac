"""Operators against the matrices that they stand for, laid out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmprecond.curvature import (
    ALL,
    GRADIENT,
    INPUT,
    REDUCED,
    Blocks,
    Columns,
    Conv2dLayer,
    LinearLayer,
    Mean,
    Moment,
    SampledRows,
    Side,
    Sketch,
    Square,
    Statistic,
    WindowAttention,
)
from mmprecond.linalg import (
    BlockDiagonal,
    Dense,
    Diagonal,
    LowRank,
    Operator,
    RankOne,
    expected_shapes,
    from_tensors,
    join,
    named_tensors,
    unify,
    write,
)

KINDS = ('dense', 'blocks', 'low rank', 'diagonal', 'rank one')
few = settings(max_examples=60, deadline=None, derandomize=True)


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def symmetric(seed: int, *shape: int) -> Tensor:
    matrix = normal(seed, *shape)
    return matrix + matrix.mT


def make(kind: str, seed: int, k: int, b: int, n: int, left: bool = False) -> Operator:
    """An operator of k layers with b blocks of n."""
    if kind == 'dense':
        return Dense(normal(seed, k, b, n, n))
    if kind == 'blocks':
        size = -(-n // 2)
        return BlockDiagonal(symmetric(seed, k, 2 * b, size, size))
    if kind == 'low rank':
        return LowRank(normal(seed, k, b, n, 2), normal(seed + 1, k, b, 1, 1).abs())
    if kind == 'diagonal':
        return Diagonal(normal(seed, k, b, n, 1) if left else normal(seed, k, b, 1, n))
    return RankOne(normal(seed, k, b, n, 1))


def laid_out(operator: Operator, k: int, b: int, n: int) -> Tensor:
    """The matrices (k, b, n, n), entry by entry."""
    eye = torch.eye(n, dtype=torch.float64).expand(k, b, n, n)
    if isinstance(operator, Dense):
        return operator.matrix
    if isinstance(operator, LowRank):
        return operator.scale * (eye - operator.columns @ operator.columns.mT)
    if isinstance(operator, Diagonal):
        return torch.diag_embed(operator.entries.flatten(2))
    if isinstance(operator, RankOne):
        return eye - operator.vector @ operator.vector.mT
    assert isinstance(operator, BlockDiagonal)
    blocks = operator.blocks.unflatten(1, (b, -1))
    return torch.stack(
        [torch.stack([torch.block_diag(*one)[:n, :n] for one in layer]) for layer in blocks]
    )


@few
@given(
    st.sampled_from(KINDS),
    st.integers(0, 99),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(2, 7),
    st.integers(1, 4),
)
def test_both_sides_are_the_matrix_products(
    kind: str, seed: int, k: int, b: int, n: int, o: int
) -> None:
    matrices = normal(seed + 5, k, b, o, n)
    right, left = make(kind, seed, k, b, n), make(kind, seed, k, b, n, left=True)
    torch.testing.assert_close(right.right(matrices), matrices @ laid_out(right, k, b, n))
    torch.testing.assert_close(left.left(matrices.mT), laid_out(left, k, b, n) @ matrices.mT)


@few
@given(st.sampled_from(KINDS), st.integers(0, 99), st.integers(1, 2), st.integers(2, 6))
def test_saved_tensors_make_the_operator_again(kind: str, seed: int, b: int, n: int) -> None:
    operators = {'input': make(kind, seed, 1, b, n)}
    outline = {
        'input': type(operators['input']).outline(
            *(tuple(t.shape[1:]) for t in operators['input'].tensors)
        )
    }
    tensors = {name: tensor[0] for name, tensor in named_tensors(operators).items()}
    assert expected_shapes(outline, tensors) == {n: tuple(t.shape) for n, t in tensors.items()}
    again = from_tensors(outline, tensors)
    assert type(again['input']) is type(operators['input'])
    for name, tensor in named_tensors(again).items():
        assert torch.equal(tensor[0], tensors[name])
    assert from_tensors(outline, {}) == {}


def test_a_low_rank_outline_takes_other_ranks_and_dense_ones_but_no_others() -> None:
    outline = {'gradient': LowRank.outline((1, 6, 2), (1, 1, 1))}
    wide = {'gradient_columns': torch.zeros(1, 6, 5), 'gradient_scale': torch.ones(1, 1, 1)}
    assert expected_shapes(outline, wide)['gradient_columns'] == (1, 6, 5)
    dense = {'gradient_moment': torch.eye(6)[None]}
    assert expected_shapes(outline, dense) == {'gradient_moment': (1, 6, 6)}
    assert isinstance(from_tensors(outline, dense)['gradient'], Dense)
    for wrong in ({'gradient_blocks': torch.eye(3)[None]}, {'input_moment': torch.eye(6)[None]}):
        assert set(expected_shapes(outline, wrong)) == {'gradient_columns', 'gradient_scale'}
    too_wide = {**wide, 'gradient_columns': torch.zeros(1, 6, 9)}
    assert expected_shapes(outline, too_wide)['gradient_columns'] == (1, 6, 6)


def test_stacks_join_forms_that_differ() -> None:
    rows = [
        {'input': make('low rank', 1, 1, 1, 5)},
        {'input': LowRank(normal(2, 1, 1, 5, 4), normal(3, 1, 1, 1, 1).abs())},
        {},
    ]
    joined = join(rows)['input']
    assert isinstance(joined, LowRank) and joined.columns.shape == (3, 1, 5, 4)
    for k, row in enumerate(rows[:2]):
        torch.testing.assert_close(laid_out(joined, 3, 1, 5)[k], laid_out(row['input'], 1, 1, 5)[0])
    assert not joined.scale[2].any()
    dense = join([*rows, {'input': make('dense', 4, 1, 1, 5)}])['input']
    assert isinstance(dense, Dense) and dense.matrix.shape == (4, 1, 5, 5)
    torch.testing.assert_close(dense.matrix[0], laid_out(rows[0]['input'], 1, 1, 5)[0])
    assert join([{}, {}]) == {}
    assert unify({}, rows[0]) == ({}, rows[0])


@pytest.mark.parametrize('new', ['dense', 'low rank'])
def test_writing_keeps_what_was_not_chosen(new: str) -> None:
    held = {'input': make('dense', 0, 3, 1, 4)}
    before = held['input'].matrix.clone()
    fresh = {'input': make(new, 1, 2, 1, 4)}
    wanted = laid_out(fresh['input'], 2, 1, 4)
    after = write(held, fresh, [0, 2], 3, torch.tensor([True, False]))['input'].matrix
    torch.testing.assert_close(after, torch.stack([wanted[0], before[1], before[2]]))
    first = write({}, {'input': make('dense', 2, 1, 1, 4)}, [1], 3, torch.tensor([True]))
    assert not first['input'].matrix[[0, 2]].any() and first['input'].matrix[1].any()


# ------------------------------------------------------------------- statistics


@pytest.mark.parametrize(
    'statistic, key, shape',
    [
        (Statistic(INPUT, Moment()), 'input_moment', (2, 9, 9)),
        (Statistic(GRADIENT, Moment(), REDUCED), 'gradient_moment_reduced', (2, 9, 9)),
        (Statistic(INPUT, Columns(5), SampledRows(3)), 'input_columns_sampled', (2, 9, 5)),
        (Statistic(INPUT, Sketch(4, 'columns'), ALL), 'input_sketch', (2, 9, 4)),
        (Statistic(INPUT, Sketch(40)), 'input_sketch', (2, 9, 9)),
        (Statistic(INPUT, Blocks(4)), 'input_blocks', (3, 3, 3)),
        (Statistic(INPUT, Mean()), 'input_mean', (2, 9, 1)),
        (Statistic(GRADIENT, Square()), 'gradient_square', (2, 9, 1)),
        (Statistic(Side('query'), Moment(), key='other'), 'other', (2, 9, 9)),
    ],
)
def test_a_statistic_names_its_tensors(
    statistic: Statistic, key: str, shape: tuple[int, int, int]
) -> None:
    assert statistic.keys == (key,) and statistic.shapes(2, 9) == {key: shape}
    assert statistic == Statistic(statistic.side, statistic.form, statistic.rows, key)
    assert statistic.side.of_gradient == key.startswith('gradient')


def test_scaling_scales_what_is_stood_for() -> None:
    rows = normal(0, 1, 4, 3)
    for form, total in (
        (Moment(), rows @ rows.mT),
        (Columns(3), rows.clone()),
        (Mean(), rows.sum(2, keepdim=True)),
    ):
        before = total.clone()
        form.rescale(total, 0.25)
        if isinstance(form, Columns):
            torch.testing.assert_close(total @ total.mT, 0.25 * before @ before.mT)
        else:
            torch.testing.assert_close(total, 0.25 * before)


def test_layers_say_what_they_lack() -> None:
    linear = LinearLayer('w', [torch.nn.Linear(3, 2)], torch.nn.Parameter(torch.zeros(2, 3)), None)
    assert linear.lacks(Statistic(INPUT, Moment(), SampledRows())) == ''
    assert "no side 'value'" in linear.lacks(Statistic(Side('value'), Mean()))
    assert Conv2dLayer.type_refusal(torch.nn.Conv1d) and not Conv2dLayer.type_refusal(
        torch.nn.Conv2d
    )
    assert 'num_heads' in WindowAttention.refusal(torch.nn.Linear(3, 2))
