"""`precondition`: curvature for an optimizer of torch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmprecond
from mmprecond import Preconditioned

KINDS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    'SGD': (torch.optim.SGD, dict(lr=0.1, momentum=0.9, weight_decay=0.01)),
    'Nesterov': (
        torch.optim.SGD,
        dict(lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
    ),
    'Adam': (torch.optim.Adam, dict(lr=0.01)),
    'AdamW': (torch.optim.AdamW, dict(lr=0.01, betas=(0.8, 0.9))),
}


class Net(nn.Module):
    """A linear layer, and a parameter that takes the plain rule and has gradients of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 3).double()
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def loss(self, step: int) -> Tensor:
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step)).double()
        return self.linear(x).square().mean() + (self.scale * x[:3, 0] + self.scale**2).sum()


def train(model: Net, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        model.loss(step).backward()
        optimizer.step()


def groups_of(model: Net) -> list[dict[str, Any]]:
    return [dict(params=[model.linear.weight], lr=0.02), dict(params=[model.linear.bias])]


@pytest.mark.parametrize('name', KINDS)
def test_moments_and_settings_go_on(name: str) -> None:
    kind, settings = KINDS[name]
    model, twin = Net(), Net()
    optimizer, plain = kind(model.parameters(), **settings), kind(twin.parameters(), **settings)
    train(model, optimizer, range(3))
    train(twin, plain, range(3))
    train(model, mmprecond.precondition(model, optimizer, 'NKFAC'), range(3, 8))
    train(twin, plain, range(3, 8))
    torch.testing.assert_close(model.scale, twin.scale, rtol=1e-12, atol=0)
    assert not torch.allclose(model.linear.weight, twin.linear.weight)


@pytest.mark.parametrize('name', KINDS)
def test_it_equals_the_same_written_out(name: str) -> None:
    kind, settings = KINDS[name]
    weights = []
    for attached in (True, False):
        model = Net()
        groups = [*groups_of(model), dict(params=[model.scale], weight_decay=0.0)]
        optimizer: torch.optim.Optimizer
        if attached:
            optimizer = mmprecond.precondition(model, kind(groups, **settings))
        else:
            rule = {'Adam': dict(type='AdamW'), 'AdamW': dict(type='AdamW', weight_decay=0.01)}
            written = rule.get(name, dict(type='SGDM')) | settings
            optimizer = Preconditioned(groups, model=model, rule=written, layers='AFOpt+NKFAC')
        train(model, optimizer, range(6))
        weights.append([p.detach().clone() for p in model.parameters()])
        assert [group['lr'] for group in optimizer.param_groups][0] == 0.02
    assert all(map(torch.equal, *weights))


def test_entries_of_groups_and_options_are_kept() -> None:
    model = Net()
    groups = groups_of(model)
    groups[0]['damping'] = 0.5
    optimizer = mmprecond.precondition(
        model, torch.optim.SGD(groups, lr=0.1), 'NKFAC', clip_update=1.0
    )
    assert optimizer.param_groups[0]['damping'] == 0.5
    assert optimizer.curvature.options.clip_update == 1.0
    assert 'nesterov' not in optimizer.param_groups[0]


class Adan(torch.optim.Optimizer):
    """Another package's, whose state has other names."""

    def __init__(self, params: Any, lr: float, betas: Any = (0.98, 0.92, 0.99)) -> None:
        super().__init__(params, dict(lr=lr, betas=betas))


def test_adan_can_stay_if_its_betas_mean_the_same() -> None:
    model = Net()
    adan = Adan(model.parameters(), lr=0.1)
    assert type(mmprecond.precondition(model, adan, 'NKFAC').rule).__name__ == 'Adan'
    adan.state[model.linear.weight]['exp_avg'] = torch.zeros(3, 4)
    with pytest.raises(ValueError, match='has no step, exp_avg_diff, previous, so it is not of'):
        mmprecond.precondition(model, adan, 'NKFAC')

    class Other(Adan):
        def __init__(self, params: Any, lr: float, betas: Any = (0.02, 0.08, 0.01)) -> None:
            super().__init__(params, lr, betas)

    Other.__name__ = 'Adan'
    with pytest.raises(ValueError, match='Adan cannot be a rule'):
        mmprecond.precondition(model, Other(model.parameters(), lr=0.1))


def test_the_given_optimizer_stays_as_it_is() -> None:
    model = Net()
    adamw = torch.optim.AdamW(model.parameters(), lr=0.1)
    train(model, adamw, range(2))
    before = copy.deepcopy(adamw.state_dict())
    train(model, mmprecond.precondition(model, adamw, 'NKFAC'), range(2, 4))
    after = adamw.state_dict()['state']
    for key, state in before['state'].items():
        assert all(torch.equal(value, after[key][name]) for name, value in state.items())


@pytest.mark.parametrize(
    'layers',
    [
        'NKFAC',
        'AFOpt+NKFAC',
        dict(attention='AFOpt', elsewhere=dict(type='NKFAC', damping=0.02)),
        [dict(preconditioner=dict(type='NKFAC', damping=0.02))],
    ],
)
def test_each_form_of_layers(layers: Any) -> None:
    model = Net()
    optimizer = mmprecond.precondition(model, torch.optim.SGD(model.parameters(), lr=0.1), layers)
    (stack,) = optimizer.curvature.stacks
    assert stack.method.title == 'NKFAC'
    assert (stack.method.damping == 0.02) == (not isinstance(layers, str))


def test_what_no_rule_does_is_refused() -> None:
    model = Net()
    groups = [dict(params=[model.linear.weight]), dict(params=[model.scale], nesterov=True)]
    with pytest.raises(ValueError, match='the groups of SGD differ in nesterov'):
        mmprecond.precondition(model, torch.optim.SGD(groups, lr=0.1, momentum=0.9))
    with pytest.raises(ValueError, match='RMSprop cannot be a rule under a preconditioner'):
        mmprecond.precondition(model, torch.optim.RMSprop(model.parameters()))
    kind: Any = type('AdamW', (torch.optim.AdamW,), {})  # another package's
    with pytest.raises(ValueError, match='AdamW cannot be a rule'):
        mmprecond.precondition(model, kind(model.parameters()))


@pytest.mark.parametrize('momentum', [0.9, 0.0])
def test_a_decayed_rate_is_no_warm_up(momentum: float) -> None:
    """Also without momentum, where the optimizer has no state."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    plain = torch.optim.SGD(model.parameters(), lr=1.0, momentum=momentum)
    schedule = torch.optim.lr_scheduler.MultiStepLR(plain, [1, 2], 0.1)
    for _ in range(2):
        plain.zero_grad()
        model(torch.randn(8, 6)).square().mean().backward()
        plain.step(), schedule.step()
    assert mmprecond.precondition(model, plain, 'NKFAC').curvature.warm_up.reached == 1.0
