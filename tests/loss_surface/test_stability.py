"""The largest stable rate: against recursions on quadratics, and against whole matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mmprecond import optimizers
from mmprecond.loss_surface import Loss, largest_rate
from mmprecond.loss_surface.preconditioned import direction_map
from tests.reference.landscape import dense

pytest.importorskip('scipy')


def quadratic() -> tuple[nn.Module, Loss, Any]:
    """Least squares without noise, whose loss is a quadratic with its least value at 0."""
    torch.manual_seed(0)
    model = nn.Linear(6, 2, bias=False).double()
    inputs = torch.randn(40, 6).double() * torch.logspace(-1, 0.5, 6).double()
    batch = inputs, inputs @ torch.randn(6, 2).double()
    return model, Loss.of_batches(model, nn.functional.mse_loss, [batch]), batch


def final_loss(
    optimizer: torch.optim.Optimizer, loss: Loss, batch: Any, rate: float, steps: int = 500
) -> float:
    """Loss after many steps, relative to the first."""
    start = loss.value()
    for group in optimizer.param_groups:
        group['lr'] = rate
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(loss.model(batch[0]), batch[1]).backward()
        optimizer.step()
    return loss.value() / start


def sgd(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-9, **options)


MAKERS = {
    'plain': lambda model: sgd(model),
    'momentum': lambda model: sgd(model, momentum=0.9),
    'dampening': lambda model: sgd(model, momentum=0.9, dampening=0.5),
    'Nesterov': lambda model: sgd(model, momentum=0.9, nesterov=True),
    'one operator for all steps': lambda model: optimizers.FSGD(
        model, lr=1e-9, norm_recovery=False, refresh_interval=10**6, early_refreshes=False
    ),
}


@pytest.mark.parametrize('name', MAKERS)
def test_steps_grow_above_the_rate_and_shrink_below(name: str) -> None:
    model, loss, batch = quadratic()
    final_loss(optimizer := MAKERS[name](model), loss, batch, 0.0)
    found = largest_rate(loss, optimizer)
    weights = loss.parameter_vector()
    assert final_loss(optimizer, loss, batch, 0.97 * found.rate) < 1
    with torch.no_grad():
        torch._foreach_copy_(loss.params, loss.unflatten(weights))
    assert final_loss(optimizer, loss, batch, 1.03 * found.rate) > 1e3


def test_adam_has_the_root_of_its_second_moment() -> None:
    """The recursion of Adam with a fixed root, which is what the rate is of."""
    model, loss, batch = quadratic()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.8, 0.9), weight_decay=0.0)
    final_loss(optimizer, loss, batch, 0.0)
    found = largest_rate(loss, optimizer)
    second = optimizer.state[model.weight]['exp_avg_sq'].flatten()
    root = second.sqrt() + 1e-8  # after so many steps the bias is corrected
    hessian = dense(loss.hessian_vector_product, loss.size)
    exact = torch.linalg.eigvals(hessian / root[:, None]).real.max()
    assert found.eigenvalue == pytest.approx(float(exact), rel=1e-2)
    for share, grows in ((0.97, False), (1.03, True)):
        point, average = torch.ones_like(root), torch.zeros_like(root)
        for _ in range(2000):
            average = 0.8 * average + 0.2 * hessian @ point
            point = point - share * found.rate * average / root
        assert (float(point.norm()) > 1e3) is grows


@pytest.mark.parametrize('kind', ['NKFAC', 'AdaNKFAC', 'FAdam'])
def test_a_preconditioned_network_has_the_eigenvalue_of_the_whole_matrix(kind: str) -> None:
    """Also with groups of different rates, which count relative to the largest."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    batch = torch.randn(60, 5).double(), torch.randn(60, 3).double()
    loss = Loss.of_batches(model, nn.functional.mse_loss, [batch])
    groups = [
        dict(params=list(model[0].parameters()), lr=0.0),
        dict(params=list(model[2].parameters()), lr=0.0),
    ]
    settings: dict[str, Any] = dict(stat_interval=1, refresh_interval=1, max_rows=None)
    optimizer = getattr(optimizers, kind)(groups, lr=0.1, model=model, **settings)
    final_loss(optimizer, loss, batch, 0.0, steps=20)
    optimizer.param_groups[0]['lr'], optimizer.param_groups[1]['lr'] = 0.05, 0.2
    rates = loss.flatten(
        [torch.full_like(p, 0.25) for p in model[0].parameters()]
        + [torch.ones_like(p) for p in model[2].parameters()]
    )
    if kind != 'NKFAC':
        corrected = (1 - 0.999**20) ** 0.5
        rates /= loss.flatten(
            [optimizer.state[p]['exp_avg_sq'].sqrt() / corrected + 1e-8 for p in loss.params]
        )
    product = (
        rates[:, None]
        * dense(direction_map(optimizer, loss), loss.size)
        @ dense(loss.hessian_vector_product, loss.size)
    )
    exact = float(torch.linalg.eigvals(product).real.max())
    found = largest_rate(loss, optimizer)
    assert found.eigenvalue == pytest.approx(exact, rel=1e-2)
    assert found.rate == pytest.approx(found.bound / exact, rel=1e-2)


def test_what_has_no_known_rate_is_refused() -> None:
    model, loss, _ = quadratic()
    with pytest.raises(ValueError, match='stable rate of Adagrad is not known'):
        largest_rate(loss, torch.optim.Adagrad(model.parameters()))
    with pytest.raises(ValueError, match='no second moment'):
        largest_rate(loss, torch.optim.Adam(model.parameters()))
    with pytest.raises(ValueError, match='no operators yet'):
        largest_rate(loss, optimizers.NKFAC(model, lr=0.1))
    with pytest.raises(ValueError, match='SGD never moves'):
        largest_rate(loss, sgd(model, momentum=0.9, dampening=1))


def test_a_loss_that_curves_down_has_no_bound() -> None:
    model = nn.Linear(3, 1, bias=False).double()
    loss = Loss(model, [lambda: -(model.weight**2).sum()])
    assert largest_rate(loss, sgd(model)).rate == float('inf')
