"""Pictures and tables of spectra and surfaces."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .lanczos import Spectrum
from .surface import Surface

#: Points of a density.
RESOLUTION = 1000


def draw_spectra(spectra: Mapping[str, Spectrum], path: Path) -> None:
    """Plots spectral densities below each other, each on its own axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.6 * len(spectra)), layout='constrained')
    axes = figure.subplots(len(spectra), 1, squeeze=False)[:, 0]
    for axis, (name, spectrum) in zip(axes, spectra.items(), strict=True):
        points, density = density_of(spectrum)
        axis.semilogy(points, density.clamp(min=float(density.max()) * 1e-8))
        axis.set(xlabel='eigenvalue', ylabel='density', title=title_of(name, spectrum))
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def title_of(name: str, spectrum: Spectrum) -> str:
    """Name of a spectrum with its extreme eigenvalues."""
    return f'{name}: {spectrum.smallest:.3g} to {spectrum.largest:.3g}'


def density_of(spectrum: Spectrum) -> tuple[torch.Tensor, torch.Tensor]:
    """Points and density of a spectrum, with Gaussians of 1 % of its range."""
    width = max((spectrum.largest - spectrum.smallest) / 100, 1e-12)
    points = torch.linspace(
        spectrum.smallest - 3 * width, spectrum.largest + 3 * width, RESOLUTION
    ).to(spectrum.values)
    return points.cpu(), spectrum.density(points, width).cpu()


def draw_surface(surface: Surface, path: Path, labels: tuple[str, str]) -> None:
    """Plots a surface as contours on a logarithmic scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 5), layout='constrained')
    axis = figure.subplots()
    drawn = axis.contourf(surface.first, surface.second, surface.values.log10().T, levels=30)
    axis.plot([0], [0], 'r+', markersize=12)
    axis.set(xlabel=labels[0], ylabel=labels[1], title='log10 of the loss')
    figure.colorbar(drawn)
    figure.savefig(path, dpi=130)


def write_page(surface: Surface, path: Path, labels: tuple[str, str]) -> None:
    """Writes an interactive HTML page with the surface, which loads nothing from elsewhere."""
    import plotly.graph_objects as go

    plot: Any = go.Figure(
        go.Surface(x=surface.first.tolist(), y=surface.second.tolist(), z=surface.values.T.tolist())
    )
    axes = dict(xaxis_title=labels[0], yaxis_title=labels[1], zaxis_title='loss')
    plot.update_layout(scene=axes, title='Loss around the weights')
    plot.write_html(path, include_plotlyjs=True)


def write_spectra(spectra: Mapping[str, Spectrum], path: Path) -> None:
    """Writes Ritz values and weights: spectrum, run, value, weight."""
    with path.open('w', newline='') as file:
        writer = csv.writer(file, lineterminator='\n')
        writer.writerow(('spectrum', 'run', 'value', 'weight'))
        for name, spectrum in spectra.items():
            for run, (values, weights) in enumerate(
                zip(spectrum.values.tolist(), spectrum.weights.tolist(), strict=True)
            ):
                writer.writerows((name, run, *pair) for pair in zip(values, weights, strict=True))


def write_surface(surface: Surface, path: Path) -> None:
    """Writes the grid: first coordinate, second coordinate, loss."""
    with path.open('w', newline='') as file:
        writer = csv.writer(file, lineterminator='\n')
        writer.writerow(('first', 'second', 'loss'))
        for x, row in zip(surface.first.tolist(), surface.values.tolist(), strict=True):
            writer.writerows(
                (x, y, value) for y, value in zip(surface.second.tolist(), row, strict=True)
            )
