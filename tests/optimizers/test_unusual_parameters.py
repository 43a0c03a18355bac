"""Parameters and modules that are no usual ones: complex, empty, scripted, numbers of numpy."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmprecond import optimizers
from mmprecond.optimizers import NKFAC, RAMDA, SGDPH, AdamR, AdaNKFAC, Preconditioned
from tests.support.errors import refused
from tests.support.every_optimizer import (
    HOOKED,
    MEASURED,
    SETTINGS,
    backward,
    images,
    make,
    net,
    train,
)
from tests.support.states import differences


class Odd(nn.Module):
    """A usual net with something beside it."""

    def __init__(self, **beside: Any) -> None:
        super().__init__()
        self.net = net()
        for name, value in beside.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        if hasattr(self, 'narrow'):
            out = out + self.wide(self.narrow(out))
        return out


def empty() -> Odd:
    return Odd(
        narrow=nn.Linear(4, 0).double(),
        wide=nn.Linear(0, 4).double(),
        nothing=nn.Parameter(torch.zeros(0, dtype=torch.float64)),
        no_rows=nn.Parameter(torch.zeros(0, 3, dtype=torch.float64)),
    )


# ------------------------------------------------------------------- complex


@pytest.mark.parametrize('name', SETTINGS)
def test_complex_parameters_are_refused_in_one_line(name: str) -> None:
    model = Odd(phase=nn.Parameter(torch.zeros(3, dtype=torch.complex64)))
    refused(ValueError, lambda: make(name, model), 'complex', 'view_as_real')


# ------------------------------------------------------------------- empty


@pytest.mark.filterwarnings('ignore:Initializing zero-element tensors')
@pytest.mark.parametrize('name', SETTINGS)
def test_empty_layers_and_parameters_take_the_plain_rule(name: str) -> None:
    model = empty()
    optimizer = make(name, model)
    train(name, model, optimizer, range(5))
    assert all(p.isfinite().all() for p in model.parameters())
    if name in MEASURED:
        reasons = {left.name: left.reason for left in optimizer.left_out}
        assert reasons['narrow'] == reasons['wide'] == 'weight has no entries'
    saved = copy.deepcopy(optimizer.state_dict())
    resumed = make(name, model)
    resumed.load_state_dict(saved)
    assert differences(saved, resumed.state_dict()) == []


@pytest.mark.filterwarnings('ignore:Initializing zero-element tensors')
def test_empty_parameters_with_gradients() -> None:
    """A loss that reads them all."""
    for name in SETTINGS:
        model = empty()
        optimizer = make(name, model)
        for seed in range(3):
            optimizer.zero_grad()
            x, y = images(seed)
            extra = sum(p.sum() for p in model.parameters() if not p.numel())
            backward(name, optimizer, F.cross_entropy(model(x), y) + extra)
            optimizer.step()


# ------------------------------------------------------------------- TorchScript


@pytest.mark.parametrize('name', HOOKED)
def test_a_scripted_part_takes_the_plain_rule(name: str) -> None:
    model = Odd(head=torch.jit.script(nn.Linear(4, 4).double()))
    optimizer = make(name, model)
    (left,) = (left for left in optimizer.left_out if left.name.startswith('head'))
    assert 'scripted' in left.reason
    for seed in range(4):
        optimizer.zero_grad()
        x, y = images(seed)
        F.cross_entropy(model.head(model(x)), y).backward()
        optimizer.step()
    assert all(state['samples'] for state in optimizer.state_dict()['precond']['layers'].values())


class Plain(nn.Module):
    """What TorchScript can read."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 6)
        self.second = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize('name', MEASURED)
def test_a_model_may_be_scripted_and_traced_between_steps(name: str) -> None:
    found = []
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).double()
    for scripts in (False, True):
        model = Plain().double()
        optimizer = make(name, model)
        for step in range(5):
            if scripts:
                for export in (torch.jit.script, lambda m: torch.jit.trace(m, x)):
                    exported = export(model)
                    torch.testing.assert_close(exported(x), model(x))
            optimizer.zero_grad()
            (model(x) - step).square().mean().backward()
            optimizer.step()
        found.append(dict(model=dict(model.state_dict()), state=optimizer.state_dict()))
    assert differences(*found) == []


# ------------------------------------------------------------------- numbers


@pytest.mark.parametrize('name', SETTINGS)
def test_numpys_numbers_are_numbers(name: str) -> None:
    if name == 'Preconditioned':
        pytest.skip('its rate is in its rule')
    found = []
    for lr in (float(np.float32(0.01)), np.float32(0.01), np.float64(np.float32(0.01))):
        model = net()
        optimizer = make(name, model, lr=lr)
        assert type(optimizer.param_groups[0]['lr']) is float
        train(name, model, optimizer, range(3))
        found.append(dict(model.state_dict()))
    assert differences(found[0], found[1]) == differences(found[0], found[2]) == []
    refused(ValueError, lambda: make(name, net(), lr=torch.tensor(0.01)), 'lr is a Tensor', 'item')
    refused(ValueError, lambda: make(name, net(), lr=np.float32('nan')), 'lr=')


def test_numbers_of_numpy_do_not_reach_checkpoints() -> None:
    model = net()
    optimizer = AdaNKFAC(
        model,
        lr=0.1,
        stat_interval=np.int64(2),
        refresh_interval=4,
        damping=np.float32(0.1),
        betas=(np.float32(0.9), np.float64(0.99)),
        intervals=[(np.int64(9), 3, 6)],
    )
    optimizer.param_groups[0]['lr'] = np.float32(0.05)  # as a schedule writes it
    train('AdaNKFAC', model, optimizer, range(3))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert state['param_groups'][0]['lr'] == float(np.float32(0.05))
    refused(ValueError, lambda: RAMDA(net().parameters(), total_steps=np.int64(9)), 'int(9)')


# ------------------------------------------------------------------- SGDPH's parameters


def test_frozen_and_empty_vectors_take_no_turn() -> None:
    model = Odd(nothing=nn.Parameter(torch.zeros(0, dtype=torch.float64)))
    model.net.fc2.bias.requires_grad_(False)  # it would have been the last one
    optimizer = SGDPH(model, lr=0.01)
    names = {id(p): name for name, p in model.named_parameters()}
    assert [names[id(p)] for p in optimizer.vectors] == [
        'net.stem.bias',
        'net.norm.weight',
        'net.norm.bias',
        'net.fc1.bias',
    ]
    train('SGDPH', model, optimizer, range(4))
    measured = [p for p in optimizer.vectors[:-1] if optimizer.state[p]['hessian'].any()]
    assert len(measured) == 3


@pytest.mark.parametrize('move', [lambda m: m.double(), lambda m: m.to(torch.float64)])
def test_sgdph_follows_a_model_that_changes_its_dtype(move: Any) -> None:
    found = []
    for late in (False, True):
        torch.manual_seed(0)
        model = net().float()
        if not late:
            move(model)
        optimizer = SGDPH(model, lr=0.01, refresh='all')
        if late:
            move(model)
        train('SGDPH', model, optimizer, range(3))
        found.append(dict(model.state_dict()))
    assert differences(*found) == []


def test_sgdph_under_reentrant_checkpointing_names_the_remedy() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    optimizer = SGDPH(model, lr=0.01)
    x = torch.randn(3, 4, requires_grad=True)
    checkpoint(model, x, use_reentrant=True).sum().backward(create_graph=True)
    refused(ValueError, optimizer.step, 'use_reentrant=False')


def test_sgdph_goes_on_from_torchs_sgd() -> None:
    """Its Hessians start anew, and are measured from the next step on."""
    model = net()
    plain = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for seed in range(2):
        plain.zero_grad()
        x, y = images(seed)
        F.cross_entropy(model(x), y).backward()
        plain.step()
    optimizer = SGDPH(model, lr=0.01, momentum=0.9, refresh='all')
    optimizer.load_state_dict(plain.state_dict())
    train('SGDPH', model, optimizer, range(2, 5))
    hessians = [optimizer.state[p]['hessian'] for p in optimizer.vectors[:-1]]
    assert all(h.any() for h in hessians)


@pytest.mark.parametrize('name', ['AdaNKFAC', 'AdamR', 'FAdam', 'AdaAFOpt', 'Preconditioned'])
def test_torchs_adam_counts_steps_in_tensors(name: str) -> None:
    """Its state is taken up as one batch, and goes on from its step."""
    model = net()
    plain = torch.optim.AdamW(model.parameters(), lr=0.01)
    for seed in range(3):
        plain.zero_grad()
        x, y = images(seed)
        F.cross_entropy(model(x), y).backward()
        plain.step()
    rule = dict(rule=dict(type='AdamW', lr=0.01)) if name == 'Preconditioned' else {}
    kind: Any = getattr(optimizers, name)
    optimizer = (
        Preconditioned(model, layers=SETTINGS[name]['layers'], **rule)
        if name == 'Preconditioned'
        else kind(model, lr=0.01)
    )
    optimizer.load_state_dict(plain.state_dict())
    assert {type(state['step']) for state in optimizer.state.values()} == {int}
    train(name, model, optimizer, range(3, 5))
    assert {state['step'] for state in optimizer.state.values()} == {5}
    batches = optimizer._batches({p: p for p in model.parameters()})
    assert len(batches) == 1


# ------------------------------------------------------------------- distributed checkpoints


@pytest.mark.parametrize('name', SETTINGS)
def test_distributed_checkpoints_are_exact_or_refused(name: str) -> None:
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    model = net()
    optimizer = make(name, model)
    if optimizer.adds_to_state:  # torch initialises a fresh optimizer by a step
        refused(
            ValueError,
            lambda: get_optimizer_state_dict(model, optimizer),
            'torch.distributed.checkpoint would drop',
        )
        assert optimizer.t == 0
        optimizer.zero_grad()
        optimizer = make(name, model)
    train(name, model, optimizer, range(3))
    if optimizer.adds_to_state:
        for call in (
            lambda: get_optimizer_state_dict(model, optimizer),
            lambda: set_optimizer_state_dict(model, optimizer, {'state': {}, 'param_groups': []}),
        ):
            refused(ValueError, call, 'torch.distributed.checkpoint', 'optimizer.state_dict()')
        return
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    twin = copy.deepcopy(model)
    resumed = make(name, twin)
    set_optimizer_state_dict(twin, resumed, saved)
    train(name, model, optimizer, range(3, 6))
    train(name, twin, resumed, range(3, 6))
    assert differences(dict(model.state_dict()), dict(twin.state_dict())) == []


def test_nkfac_keeps_its_state_where_it_is_asked_for_by_others() -> None:
    """Only torch.distributed.checkpoint is refused."""
    assert 'precond' in NKFAC(net(), lr=0.1).state_dict()


def test_the_state_of_soap_is_refused() -> None:
    """Its moments are in another basis, under the names of Adam's."""
    peers = pytest.importorskip('pytorch_optimizer')
    model = nn.Linear(4, 3)
    soap = peers.SOAP(model.parameters())
    for _ in range(2):
        soap.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        soap.step()
    optimizer = AdamR(model, lr=0.1)
    with pytest.raises(ValueError, match='which no optimizer of mmprecond has; start afresh from'):
        optimizer.load_state_dict(soap.state_dict())


def test_states_that_are_none() -> None:
    optimizer = NKFAC(net(), lr=0.1)
    refused(ValueError, lambda: optimizer.load_state_dict({'steps': 1, 'layers': {}}), 'steps, lay')


@pytest.mark.parametrize(
    ('kind', 'settings', 'plain'),
    [
        (NKFAC, dict(maximize=True), torch.optim.SGD),
        (NKFAC, dict(nesterov=True, momentum=0.9), torch.optim.SGD),
        (NKFAC, dict(dampening=0.5, momentum=0.9), torch.optim.SGD),
        (AdaNKFAC, dict(amsgrad=True), torch.optim.AdamW),
    ],
)
def test_settings_of_torch_that_would_be_ignored(kind: Any, settings: Any, plain: Any) -> None:
    model = net()
    state = plain(model.parameters(), lr=0.1, **settings).state_dict()
    name, value = next(iter(settings.items()))
    refused(ValueError, lambda: kind(model, lr=0.1).load_state_dict(state), f'{name}={value}')
