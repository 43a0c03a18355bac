"""Training loops that public bug reports of other second-order optimizers tell of."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmprecond.optimizers import KFAC, NKFAC
from tests.support.classifier import batch, build
from tests.support.errors import warnings_of
from tests.support.every_optimizer import MEASURED, SETTINGS, images, make, net, train
from tests.support.states import differences


def state_of(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    return copy.deepcopy(dict(model=dict(model.state_dict()), state=optimizer.state_dict()))


# ------------------------------------------------------------------- adversarial training


def generator() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)).double()


def critic() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()


@pytest.mark.parametrize('name', MEASURED)
@pytest.mark.parametrize('critic_steps', [1, 2])
def test_the_generators_pass_is_none_of_the_critics(name: str, critic_steps: int) -> None:
    """Two optimizers in turns: the same with the critic frozen in the generator's turn."""
    found = []
    for toggles in (False, True):
        first, second = generator(), critic()
        ours, theirs = make(name, first), make(name, second)
        draws = torch.Generator().manual_seed(0)
        for step in range(9):
            z = torch.randn(8, 3, generator=draws, dtype=torch.float64)
            if step % (critic_steps + 1):
                ours.zero_grad()
                second.requires_grad_(not toggles)
                (-second(first(z)).mean()).backward()
                ours.step()
                second.requires_grad_(True)
            else:
                theirs.zero_grad()
                real = torch.randn(8, 4, generator=draws, dtype=torch.float64)
                loss = second(first(z).detach()).square().mean() - second(real).mean()
                loss.backward()
                theirs.step()
        found.append([state_of(first, ours), state_of(second, theirs)])
    assert differences(*found) == []


# ------------------------------------------------------------------- dtypes and devices


@pytest.mark.parametrize('name', SETTINGS)
def test_a_model_may_change_its_dtype_after_the_optimizer_is_made(name: str) -> None:
    """As `model.to(device)` does, parameters change in place before the first step."""
    found = []
    for late in (False, True):
        model = net().float() if late else net().float().double()
        optimizer = make(name, model)
        if late:
            model.double()
        train(name, model, optimizer, range(5))
        found.append(dict(model.state_dict()))
    assert differences(*found) == []


@pytest.mark.parametrize('name', SETTINGS)
def test_a_model_in_bfloat16_trains(name: str) -> None:
    model = net().bfloat16()
    optimizer = make(name, model)
    before = [p.detach().clone() for p in model.parameters()]
    for step in range(5):
        optimizer.zero_grad()
        x, y = images(step)
        loss = F.cross_entropy(model(x.bfloat16()).float(), y)
        if optimizer.needs == 'loss':
            optimizer.loss = loss.detach()
        loss.backward(create_graph=optimizer.needs == 'graph')
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    if name in MEASURED:
        layers = optimizer.state_dict()['precond']['layers']
        for state in layers.values():
            assert state['samples'] and all(
                t.dtype == torch.float32 for t in state['statistics'].values()
            )


def test_weights_that_were_replaced_are_named(caplog: pytest.LogCaptureFixture) -> None:
    """The optimizer holds the old ones, which get no gradients any more."""
    model = net()
    optimizer = make('NKFAC', model)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    train('NKFAC', model, optimizer, range(4))
    (warning,) = warnings_of(caplog)
    assert 'replaced' in warning and 'assign=True' in warning and 'stem.weight' in warning


# ------------------------------------------------------------------- memory


@pytest.mark.parametrize('name', ['NKFAC', 'KFAC', 'MAC', 'AdamR'])
def test_evaluation_in_training_mode_keeps_no_activation(name: str) -> None:
    model = net()
    optimizer = make(name, model, stat_interval=1, refresh_interval=1)
    kept: list[weakref.ref[Tensor]] = []
    handle = model.fc1.register_forward_hook(lambda m, i, o: kept.append(weakref.ref(i[0])))
    with torch.no_grad():
        model(images(0)[0])
    for _ in range(2):
        model(images(1)[0])  # a graph that is dropped
    handle.remove()
    gc.collect()
    assert len(kept) == 3 and not [one for one in kept if one() is not None]
    assert not optimizer.curvature.capture.staged


# ------------------------------------------------------------------- modules


class Tied(nn.Module):
    """A linear decoder on an embedding's weight, as language models have it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(7, 5)
        self.body = nn.Linear(5, 5)
        self.decoder = nn.Linear(5, 7, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(torch.tanh(self.body(self.embedding(x))))


def test_a_decoder_on_an_embeddings_weight_takes_the_plain_rule() -> None:
    model = Tied()
    optimizer = NKFAC(model, lr=0.1, stat_interval=1, refresh_interval=1, settings='published')
    reasons = {left.name: left.reason for left in optimizer.left_out}
    assert 'decoder' in reasons or 'embedding' in reasons
    x = torch.randint(0, 7, (4, 6), generator=torch.Generator().manual_seed(0))
    F.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()
    gradient, before = model.decoder.weight.grad.clone(), model.decoder.weight.detach().clone()
    optimizer.step()
    torch.testing.assert_close(before - model.decoder.weight, 0.1 * gradient)
    assert set(optimizer.state_dict()['precond']['layers']) == {'body.weight'}


def test_data_parallel_without_devices() -> None:
    found = []
    for wraps in (False, True):
        model = net()
        optimizer = make('NKFAC', nn.DataParallel(model) if wraps else model)
        train('NKFAC', nn.DataParallel(model) if wraps else model, optimizer, range(4))
        found.append(state_of(model, optimizer))
    assert differences(*found) == []


def test_one_module_in_two_places_under_paramwise_cfg() -> None:
    """MMEngine lists its parameters twice, unless told to bypass duplicates."""
    from tests.support.classifier import Classifier

    model = Classifier()
    model.again = model.conv
    wrapper = build(model, paramwise_cfg=dict(norm_decay_mult=0.0, bypass_duplicate=True))
    for seed in range(3):
        model.train_step(batch(seed=seed), wrapper)
    layers = wrapper.optimizer.state_dict()['precond']['layers']
    assert set(layers) == {'conv.weight', 'fc.weight'}
    assert all(state['samples'] == 2 for state in layers.values())


def test_the_first_layer_may_be_missing_from_the_optimizer() -> None:
    """Some layers are trained by another optimizer: they are measured by none of ours."""
    model = net()
    mine = [p for name, p in model.named_parameters() if not name.startswith('stem')]
    optimizer = KFAC(
        mine, lr=0.01, model=model, stat_interval=1, refresh_interval=1, settings='published'
    )
    other = torch.optim.SGD(model.stem.parameters(), lr=0.01)
    for step in range(3):
        x, y = images(step)
        optimizer.zero_grad()
        other.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        other.step()
    assert 'stem.weight' not in optimizer.state_dict()['precond']['layers']


def test_a_rate_of_zero_and_a_frozen_run_leave_the_weights() -> None:
    for name in MEASURED:
        if name == 'Preconditioned':
            continue
        model = net()
        optimizer = make(name, model, lr=0.0)
        before = copy.deepcopy(model.state_dict())
        train(name, model, optimizer, range(3))
        assert differences(dict(before), dict(model.state_dict())) == []
