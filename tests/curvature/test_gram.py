"""Symmetric products against plain ones."""

from __future__ import annotations

import pytest
import torch

from mmprecond.curvature.gram import BAND, MANY, gram
from mmprecond.linalg import add_product


@pytest.mark.parametrize('size', [1, 3, 7, 8, 9, 20, 23])
@pytest.mark.parametrize('inner', [True, False])
@pytest.mark.parametrize('many', [0, 4, 99])
def test_a_product_in_bands(
    size: int, inner: bool, many: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr('mmprecond.curvature.gram.BAND', 4)
    monkeypatch.setattr('mmprecond.curvature.gram.MANY', many)
    chunks = [torch.randn(2, size, rows, dtype=torch.float64) for rows in (5, 0, 3)]
    around = torch.zeros(2, size + 2, size + 2, dtype=torch.float64)
    total = around[:, :size, :size] if inner else torch.zeros(2, size, size, dtype=torch.float64)
    total.fill_(float('nan'))
    found = gram(iter(chunks), total)
    rows = torch.cat(chunks, 2)
    torch.testing.assert_close(found, rows @ rows.mT, rtol=1e-13, atol=1e-13)
    assert found is total
    assert not around[:, size:].any() and not around[..., size:].any()


def test_half_of_a_large_product_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    done = 0

    def count(total: torch.Tensor, first: torch.Tensor, second: torch.Tensor, old: bool) -> None:
        nonlocal done
        done += total.numel()
        add_product(total, first, second, old)

    monkeypatch.setattr('mmprecond.curvature.gram.add_product', count)
    size = 8 * BAND
    gram([torch.randn(1, size, MANY)], torch.zeros(1, size, size))
    assert 0.5 * size**2 < done <= 0.57 * size**2


def test_without_rows_it_is_zero() -> None:
    assert not gram([], torch.full((1, 3, 3), float('nan'))).any()
