"""Directions, grids and files."""

from __future__ import annotations

import csv
import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from mmprecond.loss_surface import (
    Loss,
    choose_product,
    draw_spectra,
    draw_surface,
    explore,
    find_spectrum,
    find_surface,
    random_directions,
    write_page,
    write_spectra,
    write_surface,
)


@pytest.fixture
def loss() -> Loss:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.Flatten(), nn.Linear(12, 2)).double()
    batch = (torch.randn(4, 1, 3, 3).double(), torch.randn(4, 2).double())
    return Loss.of_batches(model, nn.functional.mse_loss, [batch])


def test_random_directions_have_the_norms_of_the_filters(loss: Loss) -> None:
    first, second = random_directions(loss, 3)
    assert torch.equal(first, random_directions(loss, 3)[0]) and not torch.equal(first, second)
    for p, piece in zip(loss.params, loss.unflatten(first), strict=True):
        if p.ndim < 2:
            assert not piece.any()
        else:
            torch.testing.assert_close(piece.flatten(1).norm(dim=1), p.flatten(1).norm(dim=1))


def test_a_surface_has_the_losses_of_moved_weights(loss: Loss) -> None:
    first, second = random_directions(loss)
    surface = find_surface(loss, first, second, span=0.5, points=3)
    assert surface.values[1, 1] == pytest.approx(loss.value())
    with loss.displaced(-0.5 * first + 0.5 * second):
        assert surface.values[0, 2] == pytest.approx(loss.value())


def test_along_eigenvectors_a_quadratic_is_a_parabola() -> None:
    model = nn.Linear(3, 1, bias=False).double()
    x = torch.diag(torch.tensor([3.0, 2.0, 1.0])).double()
    half = lambda out, target: ((out - target) ** 2).sum() / 2  # noqa: E731
    loss = Loss.of_batches(model, half, [(x, (x @ model.weight.T).detach())])
    spectrum = find_spectrum(choose_product(loss), loss.parameter_vector(), 3, 1)
    surface = find_surface(loss, *spectrum.vectors, span=1.0, points=3)
    expected = torch.tensor([[13.0, 9.0, 13.0], [4.0, 0.0, 4.0], [13.0, 9.0, 13.0]]) / 2
    torch.testing.assert_close(surface.values, expected.double(), atol=1e-9, rtol=0)


class Once(torch.autograd.Function):
    """A square whose derivative cannot be derived again, as that of RoIAlign."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, g: torch.Tensor) -> torch.Tensor:
        return 2 * ctx.saved_tensors[0] * g


def test_differences_where_there_is_no_second_derivative(caplog: pytest.LogCaptureFixture) -> None:
    """Whether the operation raises an error or counts as constant."""
    model, ones = nn.Linear(3, 1, bias=False).double(), torch.ones(3).double()
    loss = Loss(model, [lambda: (Once.apply(model.weight) ** 2).sum()])
    with pytest.raises(RuntimeError):
        loss.hessian_vector_product(ones)
    with pytest.raises(ValueError, match="differentiated only once; take 'differences'"):
        choose_product(loss, 'exact')
    with caplog.at_level(logging.INFO, 'mmprecond'):
        product = choose_product(loss)
    expected = 12 * model.weight.detach().flatten() ** 2
    torch.testing.assert_close(product(ones), expected, atol=1e-6, rtol=1e-6)
    assert 'no second derivative' in caplog.text and 'at two distances' in caplog.text

    silent = Loss(model, [lambda: Once.apply(model.weight).sum()])
    assert not choose_product(silent, 'exact')(ones).any()
    torch.testing.assert_close(choose_product(silent)(ones), 2 * ones)
    assert 'OnceBackward may' not in caplog.text and 'Once may count as constant' in caplog.text
    assert Loss(model, [lambda: (model.weight**2).sum()]).custom_operations() == set()


def test_files(loss: Loss, tmp_path: Path) -> None:
    spectrum = find_spectrum(choose_product(loss), loss.parameter_vector(), 5, 2)
    surface = find_surface(loss, *random_directions(loss), points=3)
    draw_spectra({'Hessian': spectrum, 'again': spectrum}, tmp_path / 'spectrum.png')
    draw_surface(surface, tmp_path / 'surface.png', ('a', 'b'))
    write_spectra({'Hessian': spectrum}, tmp_path / 'spectrum.csv')
    write_surface(surface, tmp_path / 'surface.csv')
    for name in ('spectrum', 'surface'):
        assert (tmp_path / f'{name}.png').read_bytes().startswith(b'\x89PNG')
    with (tmp_path / 'spectrum.csv').open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 5
    assert max(float(row['value']) for row in rows) == pytest.approx(spectrum.largest)
    with (tmp_path / 'surface.csv').open() as file:
        assert len(list(csv.DictReader(file))) == 9
    pytest.importorskip('plotly')
    write_page(surface, tmp_path / 'surface.html', ('a', 'b'))
    page = (tmp_path / 'surface.html').read_text()
    assert 'plotly' in page and '<script src=' not in page


def test_a_seed_draws_other_start_vectors_and_directions(loss: Loss, tmp_path: Path) -> None:
    pytest.importorskip('matplotlib')
    found = {}
    for name, seed in (('zero', 0), ('again', 0), ('one', 1)):
        (spectrum,) = explore(
            loss, tmp_path / name, steps=2, plane='random', points=3, seed=seed, progress=False
        ).values()
        found[name] = (spectrum.mean, (tmp_path / name / 'surface.csv').read_text())
    assert found['zero'] == found['again']
    assert all(a != b for a, b in zip(found['zero'], found['one'], strict=True))
