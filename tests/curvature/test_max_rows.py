"""max_rows: statistics of some positions, drawn at random, stand for all."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mmprecond.curvature.drawing import draw_by_size
from mmprecond.optimizers import NKFAC, AdamR, AFOpt, PreconditionedOptimizer
from mmprecond.rules import SGDM
from tests.support.attention import feature_map, shift_window
from tests.support.capture import RawKronecker, loss_of
from tests.support.forecasts import compare

MODULES = {
    'conv': (nn.Conv2d(2, 4, 3, padding=1), (5, 2, 6, 6)),
    'grouped, strided': (nn.Conv2d(4, 4, 3, stride=2, groups=2, bias=False), (5, 4, 9, 9)),
    'tokens': (nn.Linear(3, 4), (5, 20, 3)),
}


def statistics(module: nn.Module, x: Tensor, step: int = 0, **options: Any) -> dict[str, Tensor]:
    twin = copy.deepcopy(module).double()
    method = RawKronecker(stat_interval=1, refresh_interval=1, **options)
    optimizer = PreconditionedOptimizer(
        twin,
        model=twin,
        rule=SGDM(),
        method=method,
        defaults=dict(lr=0.1, momentum=0.0, weight_decay=0.0),
    )
    optimizer.t = step
    optimizer.arm()
    loss_of(twin(x.double())).backward()
    optimizer.step()
    stack = optimizer.curvature.stacks[0]
    return {name.removesuffix('_sampled'): s[0] for name, s in stack.statistics.items()}


@pytest.mark.parametrize('name', MODULES)
def test_all_rows_are_all(name: str) -> None:
    module, shape = MODULES[name]
    torch.manual_seed(0)
    x = torch.randn(shape)
    whole, sampled = statistics(module, x), statistics(module, x, max_rows=10**6)
    for key, value in whole.items():
        torch.testing.assert_close(sampled[key], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('name', MODULES)
def test_a_sample_is_right_in_the_mean(name: str) -> None:
    module, shape = MODULES[name]
    torch.manual_seed(0)
    x = torch.randn(shape)
    whole = statistics(module, x)
    drawn = [statistics(module, x, step, max_rows=17) for step in range(300)]  # 3 of each sample
    for key, value in whole.items():
        stacked = torch.stack([one[key] for one in drawn])
        error = (stacked.mean(0) - value).abs()
        assert bool((error <= 5 * stacked.std(0) / 300**0.5 + 1e-12).all())
        assert not torch.allclose(stacked[0], value, rtol=1e-3)


def test_few_rows_of_a_detector_are_not_missed() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 5, 1).double()
    twin = copy.deepcopy(conv)
    x = torch.randn(2, 2, 30, 30).double()
    gradient = torch.zeros(2, 5, 30, 30).double()
    gradient[:, :, 3:6, 7] = torch.randn(2, 5, 3).double()
    moments = []
    for module, max_rows in ((conv, None), (twin, 8)):  # 4 of 900 positions, where 3 count
        optimizer = NKFAC(module, lr=0.1, rank_share=None, max_rows=max_rows)
        module(x).backward(gradient)
        (staged,) = optimizer.curvature.capture.staged.values()
        (moment,) = (value for key, value in staged.sums.items() if key.startswith('gradient'))
        moments.append(moment)
    torch.testing.assert_close(moments[1], moments[0], rtol=1e-12, atol=0)


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.floats(0, 1e3, width=32), min_size=2, max_size=40),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_draws_by_size(sizes: list[float], share: float, seed: int) -> None:
    """Each row drawn counts at least once, zeros count nothing, few rows are all drawn."""
    values = torch.tensor(sizes, dtype=torch.float64)
    taken = min(len(sizes) - 1, 1 + int(share * (len(sizes) - 1)))
    draw = draw_by_size(values, taken, torch.Generator().manual_seed(seed))
    assert len(draw.positions.unique()) == taken
    assert isinstance(draw.factors, torch.Tensor)
    drawn = values[draw.positions]
    assert bool((draw.factors[drawn > 0] >= 1).all()) and not draw.factors[drawn == 0].any()
    if int((values > 0).sum()) <= taken:
        torch.testing.assert_close(drawn @ draw.factors, values.sum())


def test_draws_by_size_are_right_in_the_mean() -> None:
    torch.manual_seed(0)
    sizes, values = torch.rand(30).double() ** 6, torch.randn(30).double()
    totals = []
    for seed in range(4000):
        draw = draw_by_size(sizes, 8, torch.Generator().manual_seed(seed))
        drawn = (sizes * values)[draw.positions]
        totals.append(drawn @ draw.factors)
    stacked = torch.stack(totals)
    assert abs(stacked.mean() - sizes @ values) < 4 * stacked.std() / 4000**0.5


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1)
        self.tokens = nn.Linear(12, 24)
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.tokens(torch.tanh(self.conv(x)).flatten(2).mT)).mean(1))


@pytest.mark.parametrize('kind', [NKFAC, AdamR])
def test_training_and_resumption(kind: type[PreconditionedOptimizer]) -> None:
    torch.manual_seed(0)
    model = Net().double()
    settings: dict[str, Any] = dict(lr=0.01, stat_interval=2, refresh_interval=4, max_rows=30)
    optimizer = kind(model, **settings)

    def train(model: nn.Module, optimizer: Any, steps: range) -> None:
        for step in steps:
            x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step)).double()
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    train(model, optimizer, range(6))
    twin = copy.deepcopy(model)
    other = kind(twin, **settings)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, range(6, 12))
    train(twin, other, range(6, 12))
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    operators = {name for stack in optimizer.curvature.stacks for name in stack.operator_tensors}
    assert operators == {'input_moment', 'gradient_moment'}


def test_it_costs_as_many_rows() -> None:
    compare(NKFAC, Net(), (torch.randn(4, 3, 16, 16),), max_rows=64)


@pytest.mark.parametrize('max_rows', [None, 16, 64])
@pytest.mark.parametrize('form', ['separable', 'kernel'])
def test_forms_of_patches_cost_what_is_forecast(form: str, max_rows: int | None) -> None:
    model = nn.Sequential(
        nn.Conv2d(16, 12, 3, padding=1), nn.Tanh(), nn.Conv2d(12, 16, 3, stride=2)
    )
    compare(NKFAC, model, (torch.randn(4, 16, 12, 12),), input_factor=form, max_rows=max_rows)


def test_attention_and_errors() -> None:
    block = shift_window()
    optimizer = AFOpt(block, lr=0.01, max_rows=9)
    block(feature_map((9, 9)), (9, 9)).square().mean().backward()
    optimizer.step()
    names = {name for stack in optimizer.curvature.stacks for name in stack.statistics}
    assert {'query_curvature', 'input_moment', 'input_moment_sampled'} <= names
    with pytest.raises(ValueError, match='max_rows=0'):
        NKFAC(Net(), lr=0.1, max_rows=0)
