"""Parameter groups: settings of single parameters, exclusion, wrapped models, lr = 0."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mmprecond.optimizers import NKFAC, AdaNKFAC, PreconditionedOptimizer
from tests.reference.factors import plain_copy
from tests.reference.nkfac import ReferenceNKFAC
from tests.support.trajectories import ADAM, SGD, Convs, Tokens, batch, follow, make_loss

INTERVALS = dict(stat_interval=1, refresh_interval=1)


def grouped(
    model: nn.Module, rule: dict[str, Any], overrides: dict[str, dict[str, Any]]
) -> tuple[PreconditionedOptimizer, ReferenceNKFAC]:
    """One group a parameter, as MMEngine builds them."""
    groups = [dict(params=[p], **overrides.get(name, {})) for name, p in model.named_parameters()]
    kind = AdaNKFAC if 'betas' in rule else NKFAC
    reference = ReferenceNKFAC(plain_copy(model), **rule, **INTERVALS, overrides=overrides)
    return kind(groups, model=model, **rule, **INTERVALS, settings='published'), reference


OVERRIDES: dict[str, dict[str, dict[str, Any]]] = {
    'lr and decay of biases': {
        f'{name}.bias': dict(lr=0.08, weight_decay=0.0) for name in ('first', 'second', 'third')
    },
    'lr of a weight': {'third.weight': dict(lr=0.001)},
    'decay of all': {
        f'{name}.weight': dict(weight_decay=0.1 * k)
        for k, name in enumerate(('first', 'second', 'third', 'last'))
    },
    'damping of one of a shape': {'second.weight': dict(damping=0.5)},
    'damping of all': {
        f'{name}.weight': dict(damping=10.0**-k)
        for k, name in enumerate(('first', 'second', 'third', 'last'))
    },
    'damping of a bias says nothing': {'first.bias': dict(damping=9.0)},
    'excluded layer': {
        'second.weight': dict(precondition=False),
        'second.bias': dict(precondition=False),
    },
    'excluded weight': {'second.weight': dict(precondition=False)},
    'excluded bias': {'second.bias': dict(precondition=False)},
    'included in words': {'second.weight': dict(precondition=True)},
}


@pytest.mark.parametrize('rule', [SGD, ADAM], ids=['NKFAC', 'AdaNKFAC'])
@pytest.mark.parametrize('name', OVERRIDES)
def test_settings_of_single_parameters(name: str, rule: dict[str, Any]) -> None:
    model = Tokens().double()
    optimizer, reference = grouped(model, rule, OVERRIDES[name])
    follow(model, optimizer, reference, lambda t: [make_loss(batch(t, features=6))], 5)


def test_grouped_convolutions_with_biases_of_their_own() -> None:
    model = Convs().double()
    overrides = {
        'depthwise.bias': dict(lr=0.2),
        'grouped.bias': dict(precondition=False),
        'grouped.weight': dict(damping=0.1),
        'head.bias': dict(weight_decay=0.3),
    }
    optimizer, reference = grouped(model, SGD, overrides)
    follow(model, optimizer, reference, lambda t: [make_loss(batch(t))], 4)


def test_an_excluded_layer_is_in_the_table_and_costs_nothing() -> None:
    model = Tokens().double()
    optimizer, _ = grouped(model, SGD, OVERRIDES['excluded layer'])
    (line,) = [line for line in optimizer.table().splitlines() if line.startswith('second ')]
    assert 'plain rule' in line and 'precondition=False' in line
    optimizer.arm()
    assert not model.second._forward_hooks and model.third._forward_hooks
    assert 'second.weight' not in [layer.name for layer in optimizer.curvature.layers]


@pytest.mark.parametrize(
    'give',
    [
        lambda m: dict(params=m),
        lambda m: dict(params=m, model=m),
        lambda m: dict(params=m.parameters(), model=m),
        lambda m: dict(params=list(m.parameters()), model=m),
        lambda m: dict(params=[dict(params=m.parameters())], model=m),
        lambda m: dict(params=m.named_parameters(), model=m),
    ],
    ids=['module', 'both', 'generator', 'list', 'group', 'named'],
)
def test_all_ways_to_give_parameters_are_the_same(give: Any) -> None:
    model = Tokens().double()
    reference = ReferenceNKFAC(plain_copy(model), **SGD)
    optimizer = NKFAC(**give(model), **SGD, **INTERVALS, settings='published')
    follow(model, optimizer, reference, lambda t: [make_loss(batch(t, features=6))], 3)


def test_parameters_outside_the_optimizer_stay() -> None:
    """A layer whose bias alone, or weight alone, is given; the rest of the model is not trained."""
    model = Tokens().double()
    given = [model.first.weight, model.second.bias, *model.third.parameters()]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = NKFAC(given, model=model, **SGD, settings='published')
    assert [layer.name for layer in optimizer.curvature.layers] == ['first.weight', 'third.weight']
    make_loss(batch(0, features=6))(model).backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {'first.weight', 'second.bias', 'third.weight', 'third.bias'}
    sides = {layer.name: layer.shape for layer in optimizer.curvature.layers}
    assert sides == {'first.weight': (1, 6, 6), 'third.weight': (1, 6, 7)}


@pytest.mark.parametrize('rule', [SGD, ADAM], ids=['NKFAC', 'AdaNKFAC'])
def test_lr_zero_leaves_weights_and_merges_statistics(rule: dict[str, Any]) -> None:
    model = Tokens().double()
    kind = AdaNKFAC if 'betas' in rule else NKFAC
    optimizer = kind(model, **{**rule, 'lr': 0.0}, **INTERVALS, settings='published')
    before = [p.detach().clone() for p in model.parameters()]
    seen: list[Tensor] = []
    for step in range(3):
        optimizer.zero_grad()
        make_loss(batch(step, features=6))(model).backward()
        optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        entry = optimizer.state_dict()['precond']['layers']['first.weight']
        seen.append(entry['statistics']['input_moment'].clone())
        assert entry['refreshes'] == step + 1
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


def test_a_schedule_may_change_lr_and_decay() -> None:
    model = Tokens().double()
    reference = ReferenceNKFAC(plain_copy(model), **SGD)
    optimizer = NKFAC(model, **SGD, **INTERVALS, settings='published')
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for step in range(4):
        follow(
            model,
            optimizer,
            reference,
            lambda t, step=step: [make_loss(batch(step, features=6))],
            1,
        )
        scheduler.step()
        reference.defaults['lr'] *= 0.5


def test_a_group_added_later_takes_the_plain_rule() -> None:
    model = Tokens().double()
    optimizer = NKFAC(
        [*model.first.parameters()], model=model, lr=1.0, momentum=0.0, settings='published'
    )
    optimizer.add_param_group(dict(params=list(model.last.parameters()), lr=0.5))
    before = model.last.weight.detach().clone()
    make_loss(batch(0, features=6))(model).backward()
    optimizer.step()
    assert torch.allclose(before - model.last.weight, 0.5 * model.last.weight.grad)


@pytest.fixture
def gloo(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    'give',
    [
        lambda m: dict(params=m),
        lambda m: dict(params=m.parameters(), model=m),
        lambda m: dict(params=m.module.parameters(), model=m),
    ],
    ids=['module', 'model', 'inner'],
)
def test_a_wrapped_model_is_unwrapped(give: Any, gloo: None) -> None:
    model = Tokens().double()
    reference = ReferenceNKFAC(plain_copy(model), **SGD)
    wrapped = DistributedDataParallel(model)
    optimizer = NKFAC(**give(wrapped), **SGD, **INTERVALS, settings='published')
    assert all(not layer.name.startswith('module.') for layer in optimizer.curvature.layers)
    assert not optimizer.curvature.left_out
    for step in range(3):
        optimizer.zero_grad()
        make_loss(batch(step, features=6))(wrapped).backward()
        optimizer.step()
        reference.step(make_loss(batch(step, features=6)))
    theirs = dict(reference.model.named_parameters())
    for name, p in model.named_parameters():
        assert torch.allclose(p, theirs[name], rtol=0, atol=1e-9), name


# ------------------------------------------------------------------- sharing that is refused


def test_modules_with_one_weight_and_two_biases_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    for k in (1, 2):
        model[k].weight = model[0].weight
    model[2].bias = model[0].bias
    optimizer = NKFAC(model, lr=0.1, settings='published')
    assert [layer.name for layer in optimizer.curvature.layers] == ['3.weight']
    assert [left.name for left in optimizer.curvature.left_out] == ['0', '1', '2']
    assert all('shared' in left.reason for left in optimizer.curvature.left_out)


def test_a_weight_shared_with_an_unsupported_module_is_left_out() -> None:
    """Half a statistic is worse than none: the embedding's share of the gradient is not seen."""
    model = nn.ModuleDict(
        {'embed': nn.Embedding(7, 5), 'body': nn.Linear(5, 5), 'head': nn.Linear(5, 7, bias=False)}
    )
    model['head'].weight = model['embed'].weight
    optimizer = NKFAC(model, lr=0.1, settings='published')
    assert [layer.name for layer in optimizer.curvature.layers] == ['body.weight']
    assert {left.name for left in optimizer.curvature.left_out} == {'embed', 'head'}


def test_a_weight_shared_by_convolutions_of_other_groups_is_left_out() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 2, 1))
    model[1].weight, model[1].bias = model[0].weight, model[0].bias
    optimizer = NKFAC(model, lr=0.1, settings='published')
    (model(torch.randn(2, 2, 7, 7)) ** 2).mean().backward()
    optimizer.step()
    assert [layer.name for layer in optimizer.curvature.layers] == ['2.weight']


def test_a_bias_shared_by_two_weights_gets_one_direction() -> None:
    """It belongs to no single matrix: both weights go without it, and it takes the plain rule."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(3, 4), nn.Linear(5, 4)]).double()
    model[1].bias = model[0].bias
    optimizer = NKFAC(model, lr=1.0, momentum=0.0, settings='published')
    before = model[0].bias.detach().clone()
    x, y = torch.randn(9, 3).double(), torch.randn(9, 5).double()
    ((model[0](x) + model[1](y)) ** 2).mean().backward()
    optimizer.step()
    assert torch.allclose(before - model[0].bias, model[0].bias.grad)
