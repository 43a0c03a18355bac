"""Sums of both forms of patches against the partial traces of the whole moment."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from torch import nn

from mmprecond.curvature import INPUT, REDUCED, PatchForm, Positions, Separable, Statistic
from mmprecond.curvature.conv import Conv1dLayer, Conv2dLayer, Conv3dLayer
from tests.support.capture import CONVS, geometries
from tests.support.patches import layer_of, measured, sums_and_traces

FORMS = [Separable, Positions]


def check(kind: type[PatchForm], conv: nn.Module, *inputs: torch.Tensor, **options: Any) -> None:
    """A separable form has all traces; the other one has the positions', over the channels."""
    rows = options.pop('rows', None)
    layer_type = options.pop('layer_type', Conv2dLayer)
    layer = layer_of(conv, kind=layer_type, **options)
    form: Any = kind.of(layer)
    found, wanted = sums_and_traces(layer, form, *inputs, rows=rows)
    if kind is Positions:
        _, positions, *ones = wanted
        wanted = [positions / form.channels, *ones]
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('kind', FORMS)
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('name', [name for name, conv in CONVS.items() if conv['kernel_size'] != 1])
def test_of_every_convolution(name: str, bias: bool, kind: type[PatchForm]) -> None:
    options = dict(in_channels=4, out_channels=4, bias=bias) | CONVS[name]
    conv = nn.Conv2d(**options).double()
    check(kind, conv, torch.randn(3, 4, 7, 6).double(), torch.randn(2, 4, 5, 8).double())


@pytest.mark.parametrize('kind', FORMS)
@settings(max_examples=40, deadline=None)
@given(geometries())
def test_of_any_geometry(
    kind: type[PatchForm], case: tuple[dict[str, Any], tuple[int, ...], float]
) -> None:
    options, shape, capture_mb = case
    conv = nn.Conv2d(**options).double()
    assume(conv.weight.shape[2:].numel() > 1)
    check(kind, conv, torch.randn(shape).double(), capture_mb=capture_mb)


@pytest.mark.parametrize('kind', FORMS)
def test_other_numbers_of_axes(kind: type[PatchForm]) -> None:
    line, x = nn.Conv1d(4, 3, 5, 2, 2).double(), torch.randn(2, 4, 5, 4, 6).double()
    check(kind, line, torch.randn(2, 4, 11).double(), layer_type=Conv1dLayer)
    check(kind, nn.Conv3d(4, 2, (2, 3, 1), groups=2).double(), x, layer_type=Conv3dLayer)


@pytest.mark.parametrize('kind', FORMS)
def test_of_reduced_rows(kind: type[PatchForm]) -> None:
    conv = nn.Conv2d(3, 4, 3, padding=1).double()
    check(kind, conv, torch.randn(4, 3, 6, 5).double(), rows=REDUCED)


@pytest.mark.parametrize('kind', FORMS)
def test_an_empty_batch_adds_nothing(kind: type[PatchForm]) -> None:
    layer = layer_of(nn.Conv2d(3, 4, 3, padding=1).double())
    form: Any = kind.of(layer)
    statistic = Statistic(INPUT, form)
    x, empty = torch.randn(2, 3, 5, 5).double(), torch.zeros(0, 3, 5, 5).double()
    alone, both = measured(layer, statistic, x), measured(layer, statistic, empty, x)
    for key, value in alone.items():
        torch.testing.assert_close(both[key], value)
