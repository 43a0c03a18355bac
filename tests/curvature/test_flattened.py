"""Linear layers behind a flattened feature map: positions, and where they come from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mmprecond.curvature import (
    GRADIENT,
    INPUT,
    REDUCED,
    Layer,
    LinearLayer,
    Moment,
    Positions,
    SampledRows,
    Separable,
    Statistic,
    find_layers,
)
from mmprecond.curvature.flattened import find_flattened
from mmprecond.optimizers import FSGD, NKFAC, AdamR
from tests.support.capture import loss_of
from tests.support.errors import refused
from tests.support.patches import RESUMED, layer_of, measured, sums_and_traces
from tests.support.states import saved

FORMS = {'separable': Separable, 'kernel': Positions}


def flat_layer(module: nn.Linear, positions: int, **options: Any) -> LinearLayer:
    weight: Any = module.weight
    bias: Any = module.bias
    return LinearLayer('weight', [module], weight, bias, input_positions=positions, **options)


# ------------------------------------------------------------------- what is measured


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(1, 4),
    st.integers(2, 6),
    st.lists(st.integers(1, 3), min_size=0, max_size=3),
    st.booleans(),
    st.sampled_from([1e-9, 64.0]),
    st.sampled_from([None, REDUCED]),
)
def test_partial_traces_of_flattened_maps(
    c: int, p: int, leading: list[int], bias: bool, capture_mb: float, rows: Any
) -> None:
    module = nn.Linear(c * p, 3, bias=bias).double()
    layer = flat_layer(module, p, capture_mb=capture_mb)
    x = torch.randn(*leading, c * p, dtype=torch.float64)
    form = Separable.of(layer)
    assert form == Separable(c, p, bias)
    found, wanted = sums_and_traces(layer, form, x, rows=rows)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    found, (_, positions, *ones) = sums_and_traces(layer, Positions.of(layer), x, rows=rows)
    for ours, theirs in zip(found, [positions / c, *ones], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_a_flattened_map_is_not_sampled() -> None:
    layer = flat_layer(nn.Linear(12, 3).double(), 4)
    statistic, x = Statistic(INPUT, Separable.of(layer)), torch.randn(3, 7, 12).double()
    whole = measured(layer, statistic, x)
    sampled = measured(layer, statistic.over(SampledRows(positions=2)), x)
    for ours, wanted in zip(sampled.values(), whole.values(), strict=True):
        torch.testing.assert_close(ours, wanted)


def test_an_empty_batch_adds_nothing() -> None:
    layer = flat_layer(nn.Linear(12, 3).double(), 4)
    statistic = Statistic(INPUT, Separable.of(layer))
    x, empty = torch.randn(5, 12).double(), torch.zeros(0, 12).double()
    alone, both = measured(layer, statistic, x), measured(layer, statistic, empty, x)
    for key, value in alone.items():
        torch.testing.assert_close(both[key], value)


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('bias', [True, False])
def test_statistics_are_those_of_a_convolution_over_the_whole_map(bias: bool, form: str) -> None:
    conv = nn.Conv2d(4, 5, 7, bias=bias).double()
    linear = nn.Linear(196, 5, bias=bias).double()
    linear.load_state_dict(
        {k: v.flatten(1) if v.dim() > 2 else v for k, v in conv.state_dict().items()}
    )
    x = torch.randn(6, 4, 7, 7).double()
    ours, theirs = flat_layer(linear, 49), layer_of(conv)
    statistic = Statistic(INPUT, FORMS[form].of(ours))
    assert statistic.form == FORMS[form].of(theirs)
    found = measured(ours, statistic, x.flatten(1))
    for key, value in measured(theirs, statistic, x).items():
        torch.testing.assert_close(found[key], value, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------- methods


class Head(nn.Module):
    """A convolution or a linear layer over a whole map of 3 x 2, and a linear layer."""

    def __init__(self, flat: bool, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first: nn.Module = nn.Conv2d(4, 5, (3, 2), bias=bias)
        self.last = nn.Linear(5, 2)
        self.flat = flat
        if flat:
            state = self.first.state_dict()
            self.first = nn.Linear(24, 5, bias=bias)
            self.first.load_state_dict({k: v.reshape(5, -1).squeeze(1) for k, v in state.items()})

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1) if self.flat else x).flatten(1)
        return self.last(torch.tanh(x))

    def groups(self) -> list[dict[str, Any]]:
        """The first weight in a group of its own."""
        weight = self.first.weight
        rest = [p for p in self.parameters() if p is not weight]
        first = dict(params=[weight], input_positions=6) if self.flat else dict(params=[weight])
        return [first, dict(params=rest)]


def train(model: Head, optimizer: Any, steps: range) -> Tensor:
    for step in steps:
        optimizer.zero_grad()
        x = torch.randn(7, 4, 3, 2, generator=torch.Generator().manual_seed(step))
        loss_of(model(x.double())).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('name', RESUMED)
def test_methods_treat_it_as_that_convolution(name: str, form: str) -> None:
    kind, options = RESUMED[name]
    found = []
    for flat in (True, False):
        model = Head(flat).double()
        optimizer = kind(
            model.groups(),
            model=model,
            lr=0.01,
            stat_interval=1,
            refresh_interval=2,
            input_factor=form,
            **options,
        )
        found.append(train(model, optimizer, range(5)))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_a_saved_state_keeps_the_positions() -> None:
    def make() -> tuple[Head, Any]:
        model = Head(flat=True).double()
        return model, NKFAC(
            model.groups(),
            model=model,
            lr=0.01,
            stat_interval=2,
            refresh_interval=2,
            input_factor='kernel',
            settings='published',
        )

    model, optimizer = make()
    train(model, optimizer, range(3))
    twin, resumed = make()
    twin.load_state_dict(model.state_dict())
    resumed.load_state_dict(saved(optimizer.state_dict()))
    weights = train(model, optimizer, range(3, 7))
    assert torch.equal(train(twin, resumed, range(3, 7)), weights)


# ------------------------------------------------------------------- where positions come from


def positions_of(model: nn.Module, **groups: Any) -> dict[str, int]:
    """Positions of each linear layer, with all parameters in one group."""
    found = find_layers(model, [dict(params=list(model.parameters()), **groups)])[0]
    linear = {
        name: layer for name, layer in found.items() if isinstance(layer.modules[0], nn.Linear)
    }
    return {name: layer.kernel_positions for name, layer in linear.items()}


def test_a_group_says_it() -> None:
    model = nn.Sequential(nn.Linear(98, 8), nn.Linear(8, 2))
    first, second = ([*layer.parameters()] for layer in model)
    groups = [dict(params=first, input_positions=49), dict(params=second)]
    optimizer = NKFAC(groups, model=model, lr=0.1, input_factor='separable', settings='published')
    table = optimizer.table()
    assert 'input side as 2 channels x 49 positions' in table and '2x2 + 49x49 + 1x1' in table
    forms = [stack.kept[0].form for stack in optimizer.curvature.layers.values()]
    assert forms == [Separable(2, 49, True), Moment()]


@pytest.mark.parametrize(
    'form, kept',
    [('separable', 'separable'), ('kernel', 'kernel'), ('auto', 'separable'), ('patch', 'none')],
)
def test_a_wide_layer_is_measured_by_its_parts(form: str, kept: str) -> None:
    """And `max_dim` holds for these."""
    model = nn.Sequential(nn.Linear(588, 8), nn.Linear(8, 2))
    groups = [
        dict(params=[model[0].weight], input_positions=49),
        dict(params=[*model[1].parameters()]),
    ]
    optimizer = FSGD(
        groups, model=model, lr=0.1, input_factor=form, max_dim=100, settings='published'
    )
    found = {layer.name: s.kept[0].form.suffix for layer, s in optimizer.curvature.layers.items()}
    assert found.get('0.weight', 'none') == kept
    assert ('588 is over max_dim=100' in optimizer.table()) == (form == 'patch')


@pytest.mark.parametrize(
    'model, given, fragments',
    [
        (nn.Sequential(nn.Linear(10, 2)), 4, ['input_positions=4', '10 inputs of 0.weight']),
        (nn.Sequential(nn.Conv2d(4, 2, 3)), 9, ['0.weight is of a Conv2d', 'custom_keys']),
        (nn.Sequential(nn.Linear(10, 2)), 2.0, ['input_positions=2.0', 'integer']),
        (nn.Sequential(nn.Linear(10, 2)), True, ['input_positions=True', 'integer']),
        (nn.Sequential(nn.Linear(10, 2)), 0, ['input_positions=0', 'at least 1']),
    ],
)
def test_what_does_not_fit_is_refused(model: nn.Module, given: Any, fragments: list[str]) -> None:
    groups = [dict(params=[*model.parameters()], input_positions=given)]
    refused(
        ValueError, lambda: NKFAC(groups, model=model, lr=0.1, settings='published'), *fragments
    )


def test_a_layer_of_the_plain_rule_may_have_any() -> None:
    model = nn.Sequential(nn.Linear(10, 2), nn.Linear(2, 2))
    first, second = ([*layer.parameters()] for layer in model)
    groups = [dict(params=first, input_positions=4, precondition=False), dict(params=second)]
    assert len(NKFAC(groups, model=model, lr=0.1, settings='published').curvature.layers) == 1


class BBoxHead(nn.Module):
    """A stand-in: numbers and layers of MMDetection's head, in its names."""

    roi_feat_area = 4

    def __init__(self, pooled: bool = False, **layers: nn.Module) -> None:
        super().__init__()
        self.in_channels, self.conv_out_channels, self.with_avg_pool = 6, 5, pooled
        for name, layer in layers.items():
            self.add_module(name, layer)


class Custom(BBoxHead):
    """Of another name."""


def fcs(*sizes: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(n, 24) for n in sizes)


HEADS: dict[str, tuple[dict[str, Any], list[str]]] = {
    'shared': (dict(shared_fcs=fcs(24, 24), fc_cls=nn.Linear(24, 3)), ['shared_fcs.0']),
    'behind convolutions': (dict(shared_fcs=fcs(20, 24)), ['shared_fcs.0']),
    'branches': (dict(cls_fcs=fcs(24, 24), reg_fcs=fcs(20)), ['cls_fcs.0', 'reg_fcs.0']),
    'shared before branches': (dict(shared_fcs=fcs(24), cls_fcs=fcs(24)), ['shared_fcs.0']),
    'no hidden layers': (
        dict(fc_cls=nn.Linear(24, 3), fc_reg=nn.Linear(24, 4)),
        ['fc_cls', 'fc_reg'],
    ),
    'one branch': (
        dict(cls_fcs=fcs(24), fc_cls=nn.Linear(24, 3), fc_reg=nn.Linear(24, 4)),
        ['cls_fcs.0', 'fc_reg'],
    ),
    'pooled': (dict(pooled=True, shared_fcs=fcs(24)), []),
    'double head': (
        dict(pooled=True, fc_branch=fcs(24, 24), fc_cls=nn.Linear(24, 3)),
        ['fc_branch.0'],
    ),
    'other sizes': (dict(shared_fcs=fcs(28)), []),
    'other layers': (dict(fc_other=nn.Linear(24, 3), deeper=nn.Sequential(nn.Linear(24, 3))), []),
    'none': ({}, []),
}


@pytest.mark.parametrize('kind', [BBoxHead, Custom])
@pytest.mark.parametrize('name', HEADS)
def test_box_heads_say_it(name: str, kind: Any) -> None:
    layers, expected = HEADS[name]
    model = nn.Sequential(kind(**layers))
    names = {module: name for name, module in model.named_modules()}
    found = {names[module]: area for module, area in find_flattened(model).items()}
    assert found == {f'0.{name}': 4 for name in expected}


def test_a_group_overrides_the_head() -> None:
    head = BBoxHead(shared_fcs=fcs(24, 24))
    assert positions_of(head) == {'shared_fcs.0': 4, 'shared_fcs.1': 1}
    assert set(positions_of(head, input_positions=1).values()) == {1}
    assert set(positions_of(head, input_positions=None).values()) == {1, 4}
    assert set(positions_of(head, input_positions=6).values()) == {6}


def test_a_head_of_other_numbers_says_nothing() -> None:
    head = BBoxHead(shared_fcs=fcs(24))
    for area in (1, None, 4.0):
        head.roi_feat_area = area
        assert find_flattened(head) == {}
    other = nn.Sequential(fcs(24))
    other.roi_feat_area, other.in_channels = 4, 6
    assert find_flattened(other) == {}


class Doubled(nn.Linear):
    """A linear layer that is read by a layer type of a user."""


def test_a_layer_type_of_a_user_takes_no_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    class DoubledLayer(Layer):
        input_rows, gradient_rows = LinearLayer.input_rows, LinearLayer.gradient_rows

    from mmprecond.curvature import LAYER_TYPES

    monkeypatch.setitem(LAYER_TYPES, Doubled, DoubledLayer)
    head = BBoxHead(shared_fcs=nn.ModuleList([Doubled(24, 3)]))
    assert positions_of(head) == {'shared_fcs.0': 1}


@pytest.fixture
def heads() -> Iterator[Any]:
    """MMDetection's box heads, which take their parts from its registry."""
    found = pytest.importorskip('mmdet.models.roi_heads.bbox_heads')
    from mmengine.registry import DefaultScope

    with DefaultScope.overwrite_default_scope('mmdet'):
        yield found


@pytest.mark.parametrize(
    'kind, expected',
    [
        ('Shared2FCBBoxHead', {'shared_fcs.0': 49}),
        ('Shared4Conv1FCBBoxHead', {'shared_fcs.0': 49}),
        ('BBoxHead', {'fc_cls': 49, 'fc_reg': 49}),
        ('DoubleConvFCBBoxHead', {'fc_branch.0': 49}),
        ('DIIHead', {}),
    ],
)
def test_heads_of_mmdetection(heads: Any, kind: str, expected: dict[str, int]) -> None:
    small: dict[str, Any] = dict(in_channels=8, num_classes=3)
    small |= {
        'Shared2FCBBoxHead': dict(fc_out_channels=49 * 8),  # the second looks like the first
        'Shared4Conv1FCBBoxHead': dict(conv_out_channels=4, fc_out_channels=16),
        'DoubleConvFCBBoxHead': dict(
            num_convs=1, num_fcs=2, conv_out_channels=8, fc_out_channels=392
        ),
        'DIIHead': dict(
            num_heads=2,
            feedforward_channels=16,
            dynamic_conv_cfg=dict(
                type='DynamicConv', in_channels=8, feat_channels=2, out_channels=8
            ),
        ),
    }.get(kind, {})
    head = getattr(heads, kind)(**small)
    assert {name: p for name, p in positions_of(head).items() if p > 1} == expected


def test_the_box_head_is_preconditioned_with_its_positions(heads: Any) -> None:
    """12,544 inputs are over max_dim; 256 channels and 49 positions are not."""
    head = heads.Shared2FCBBoxHead(in_channels=256, fc_out_channels=8, num_classes=3)
    plain = NKFAC(head, lr=0.1, max_dim=8192, settings='published')
    assert '12545 is over max_dim=8192' in plain.table()
    optimizer = AdamR(
        head, lr=0.1, stat_interval=1, refresh_interval=1, input_factor='auto', settings='published'
    )
    assert 'as 256 channels x 49 positions' in optimizer.table()
    before = head.shared_fcs[0].weight.detach().clone()
    for step in range(2):
        optimizer.zero_grad()
        x = torch.randn(4, 256, 7, 7, generator=torch.Generator().manual_seed(step))
        sum(out.square().mean() for out in head(x)).backward()
        optimizer.step()
    assert not torch.equal(head.shared_fcs[0].weight, before)
    assert all(member.refreshes for stack in optimizer.curvature.stacks for member in stack.members)
    statistic = Statistic(GRADIENT, Moment())
    assert any(statistic in stack.kept for stack in optimizer.curvature.stacks)
