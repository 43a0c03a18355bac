"""A look at one layer's factors, operators and spectrum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mmprecond.optimizers import FSGD, MAC, NKFAC, AdamR, AFOpt
from tests.support.attention import feature_map, shift_window


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 5)
        self.unused = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(x).mean((2, 3)))


def trained(kind: Any, **settings: Any) -> Any:
    torch.manual_seed(0)
    model = Net()
    optimizer = kind(model, lr=0.01, stat_interval=1, refresh_interval=1, **settings)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(8, 3, 6, 6)).square().mean().backward()
        optimizer.step()
    return optimizer


def test_factors_and_spectrum_of_a_linear_layer() -> None:
    view = trained(NKFAC).curvature.layer('head')
    assert (view.name, view.samples, view.refreshes) == ('head.weight', 2, 2)
    assert {side: tuple(f.shape) for side, f in view.factors.items()} == {
        'input': (1, 5, 5),
        'gradient': (1, 5, 5),
    }
    values = view.spectrum('input')
    torch.testing.assert_close(values.sum(), view.factors['input'][0].double().trace())
    assert (values.diff() <= 0).all()
    assert {tuple(tensor.shape) for tensor in view.operators.values()} == {(1, 5, 5)}


def test_square_columns_of_a_sketch_have_singular_values() -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 8, bias=False)
    sketch: dict[str, Any] = dict(max_dim=4, max_rank=6, oversize='lowrank')
    optimizer = NKFAC(model, lr=0.01, stat_interval=1, refresh_interval=1, **sketch)
    model(torch.randn(50, 6)).square().mean().backward()
    optimizer.step()
    view = optimizer.curvature.layer('')
    columns = view.factors['input'][0].double()
    assert columns.shape == (6, 6) and not torch.allclose(columns, columns.mT)
    expected = torch.linalg.svdvals(columns).square()
    torch.testing.assert_close(view.spectrum('input')[0], expected)


def test_a_layer_has_the_name_of_its_module() -> None:
    block = nn.MultiheadAttention(4, 2, batch_first=True)
    optimizer = AFOpt(nn.ModuleDict(dict(attn=block)), lr=0.01, stat_interval=1)
    x = torch.randn(3, 5, 4)
    block(x, x, x)[0].square().mean().backward()
    optimizer.step()
    assert optimizer.curvature.layer('attn').name == 'attn.in_proj_weight'


def test_views_are_copies() -> None:
    optimizer = trained(NKFAC)
    optimizer.curvature.layer('head').factors['input'].zero_()
    assert optimizer.curvature.layer('head.weight').factors['input'].any()


@pytest.mark.parametrize('kind', [NKFAC, AdamR, MAC, FSGD])
def test_every_form_can_be_drawn(kind: Any, tmp_path: Path) -> None:
    optimizer = trained(kind)
    for name in ('conv', 'head'):
        view = optimizer.curvature.layer(name)
        assert all(view.spectrum(side).ndim == 2 for side in view.factors)
        view.plot(tmp_path / f'{name}.png')
        assert (tmp_path / f'{name}.png').read_bytes().startswith(b'\x89PNG')


def test_attention_is_a_layer_too() -> None:
    block = shift_window()
    optimizer = AFOpt(block, lr=0.01, stat_interval=1, refresh_interval=1)
    block(feature_map((9, 9)), (9, 9)).square().mean().backward()
    optimizer.step()
    view = optimizer.curvature.layer(next(iter(optimizer.curvature.layers)).name)
    assert view.plot() is not None


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('hed', "no layer 'hed' is preconditioned; did you mean head?"),
        ('unused', 'unused.weight has no statistics yet'),
    ],
)
def test_wrong_names_are_one_line(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trained(NKFAC).curvature.layer(name)


def test_a_side_must_exist() -> None:
    with pytest.raises(ValueError, match="head.weight has no factor 'output'; it has "):
        trained(NKFAC).curvature.layer('head').spectrum('output')
