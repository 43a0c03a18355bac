"""The preconditioner as a linear map, and what it does to a spectrum."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mmprecond import optimizers
from mmprecond.loss_surface import Loss, find_spectrum, preconditioner_of
from mmprecond.loss_surface.preconditioned import direction_map
from tests.reference.landscape import dense


def trained(kind: str, **options: Any) -> tuple[Any, Loss]:
    """An optimizer after some steps on inputs of very different sizes, and the loss."""
    torch.manual_seed(0)
    sizes = torch.logspace(-1.5, 1.5, 8)
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    inputs, targets = (torch.randn(200, 8) * sizes).double(), torch.randn(200, 3).double()
    loss = Loss.of_batches(model, nn.functional.mse_loss, [(inputs, targets)])
    settings = dict(dict(stat_interval=1, refresh_interval=1), **options)
    if kind not in ('AdamR', 'AdaAct'):
        settings['max_rows'] = None
    optimizer = getattr(optimizers, kind)(model, lr=1e-3, **settings)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()
    return optimizer, loss


@pytest.mark.parametrize('kind', ['NKFAC', 'FSGD', 'KFAC'])
def test_the_map_is_symmetric_and_takes_the_gradient_to_the_direction(kind: str) -> None:
    options = {} if kind != 'KFAC' else dict(kl_clip=1e9)
    optimizer, loss = trained(kind, **options)
    product = preconditioner_of(optimizer, loss)
    matrix = dense(product, loss.size)
    torch.testing.assert_close(matrix, matrix.T, atol=1e-9 * float(matrix.abs().max()), rtol=0)
    assert torch.linalg.eigvalsh(matrix).min() > 0
    gradient = loss.gradient()
    tensors = dict(zip(loss.params, loss.unflatten(gradient), strict=True))
    directions = optimizer.curvature.precondition(tensors, optimizer.param_groups)
    torch.testing.assert_close(
        product(gradient), loss.flatten([directions[p] for p in loss.params])
    )


def test_the_preconditioned_spectrum_is_flatter() -> None:
    """The ratio of the largest eigenvalue to the mean size falls."""
    optimizer, loss = trained('NKFAC')
    product = preconditioner_of(optimizer, loss)
    plain = find_spectrum(loss.hessian_vector_product, loss.parameter_vector(), loss.size, 1)
    flat = find_spectrum(
        loss.hessian_vector_product, loss.parameter_vector(), loss.size, 1, precondition=product
    )
    exact = torch.linalg.eigvals(
        dense(product, loss.size) @ dense(loss.hessian_vector_product, loss.size)
    ).real
    assert flat.largest == pytest.approx(float(exact.max()), rel=1e-6)

    def peak(values: torch.Tensor) -> float:
        return float(values.max() / values.abs().mean())

    assert peak(flat.values) < 0.5 * peak(plain.values)


def test_what_has_no_symmetric_map_is_refused() -> None:
    optimizer, loss = trained('AdaNKFAC')
    with pytest.raises(ValueError, match='not symmetric'):
        preconditioner_of(optimizer, loss)
    with pytest.raises(ValueError, match='SGD has no preconditioner'):
        preconditioner_of(torch.optim.SGD(loss.model.parameters(), lr=0.1), loss)
    fresh = optimizers.NKFAC(loss.model, lr=0.1)
    with pytest.raises(ValueError, match='no operators yet'):
        preconditioner_of(fresh, loss)
    for kind in ('AdamR', 'AdaAct'):
        with pytest.raises(ValueError, match=f'{kind} changes the updates of the rule'):
            direction_map(*trained(kind))
