"""Entries of parameter groups: those without effect are refused, also when they come later."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mmprecond.optimizers import (
    ARO,
    NKFAC,
    RAMDA,
    SGDPH,
    SOAA,
    DCTAdamW,
    RuleOptimizer,
)
from tests.support.trajectories import Tokens, batch, make_loss


def test_a_group_added_later_cannot_ask_for_preconditioning() -> None:
    model = Tokens().double()
    optimizer = NKFAC([*model.first.parameters()], model=model, lr=0.1)
    for entry in (dict(precondition=True), dict(damping=0.5), dict(input_positions=4)):
        with pytest.raises(ValueError, match=f'added later has {next(iter(entry))}'):
            optimizer.add_param_group(dict(params=[model.last.weight], **entry))
    optimizer.add_param_group(dict(params=[model.last.weight], precondition=False))
    first = {key: value for key, value in optimizer.param_groups[0].items() if key != 'params'}
    optimizer.add_param_group(dict(params=[model.third.bias], **first))  # a copy changes nothing
    assert [len(group['params']) for group in optimizer.param_groups] == [2, 1, 1]


@pytest.mark.parametrize(
    ('key', 'value'), [('precondition', False), ('input_positions', 4)], ids=lambda v: str(v)
)
def test_layers_are_chosen_when_the_optimizer_is_built(key: str, value: Any) -> None:
    """Set later the entry would change nothing, so the next step refuses it, and not a state."""
    model = Tokens().double()
    optimizer = NKFAC(model, lr=0.1)
    state = optimizer.state_dict()
    make_loss(batch(0, features=6))(model).backward()
    optimizer.step()
    optimizer.param_groups[0][key] = value
    with pytest.raises(ValueError, match=f'{key} of a parameter group was changed'):
        optimizer.step()
    del optimizer.param_groups[0][key]
    optimizer.step()
    state['param_groups'][0][key] = value
    optimizer.load_state_dict(state)  # its layers are attached by this optimizer's own groups
    optimizer.step()


PLAIN: dict[str, tuple[type[RuleOptimizer], dict[str, Any]]] = {
    'ARO': (ARO, dict(norm='sign')),
    'DCTAdamW': (DCTAdamW, dict(rank=4)),
    'RAMDA': (RAMDA, dict(restart=0.5)),
    'SGDPH': (SGDPH, dict(hessian_lr=0.5)),
    'SOAA': (SOAA, dict(radius=2.0)),
    'NKFAC': (NKFAC, dict(nesterov=True)),
}


@pytest.mark.parametrize('name', PLAIN)
def test_settings_of_all_groups_are_refused_in_one(name: str) -> None:
    kind, common = PLAIN[name]
    groups = [dict(params=nn.Linear(4, 4).parameters(), **common)]
    options = dict(model=nn.Linear(4, 4)) if name == 'NKFAC' else {}
    with pytest.raises(ValueError, match=f'has {next(iter(common))}, which all groups have'):
        kind(groups, lr=0.1, **options)


def test_entries_that_change_nothing_are_taken() -> None:
    """Groups of torch's own SGD, labels of the user's, and a group that is taken out again."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    groups = torch.optim.SGD([dict(params=p) for p in model.parameters()], lr=0.1).param_groups
    groups[0].update(mask=torch.ones(2), precondition=False)
    optimizer = NKFAC(groups, model=model, lr=0.1)
    del optimizer.param_groups[0]
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()


def test_a_copied_group_may_have_a_scheduled_damping() -> None:
    model = Tokens().double()
    optimizer = NKFAC([*model.first.parameters()], model=model, lr=0.1)
    optimizer.param_groups[0]['damping'] = 0.5
    first = {key: value for key, value in optimizer.param_groups[0].items() if key != 'params'}
    optimizer.add_param_group(dict(params=[model.last.weight], **first))


@pytest.mark.parametrize(
    ('kind', 'entry'),
    [
        (ARO, dict(damping=0.1)),
        (DCTAdamW, dict(input_positions=4)),
        (RAMDA, dict(precondition=False)),
        (SGDPH, dict(precondition=False)),
        (SOAA, dict(damping=0.1)),
        (ARO, dict(amsgrad=True)),
    ],
)
def test_entries_that_an_optimizer_does_not_read_are_refused(
    kind: type[RuleOptimizer], entry: dict[str, Any]
) -> None:
    groups = [dict(params=nn.Linear(4, 4).parameters(), **entry)]
    with pytest.raises(ValueError, match=f'has {next(iter(entry))}=.*, which {kind.__name__} does'):
        kind(groups, lr=0.1)


def test_a_matrix_of_aro_can_be_switched_off_later() -> None:
    """The rule reads this entry at each step, so that it may change."""
    model = nn.Linear(4, 4)
    optimizer = ARO(model, lr=0.1)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    optimizer.param_groups[0]['precondition'] = False
    optimizer.step()
    assert optimizer.state[model.weight]['exp_avg'].any()
