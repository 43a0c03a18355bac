"""`layers` in words: one method for all, or one for attention modules and one elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmprecond import Preconditioned
from mmprecond.optimizers import SKFAC, SMAC
from mmprecond.preconditioners import METHODS
from mmprecond.preconditioners.registry import find_method
from tests.support.attention import feature_map, shift_window

RULE = dict(type='AdamW', lr=1e-3, weight_decay=0.05)


class Block(nn.Module):
    """A window attention of Swin between two layers of other types."""

    def __init__(self) -> None:
        super().__init__()
        self.block = shift_window()
        width = self.block.w_msa.embed_dims
        self.before, self.after = nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.block(torch.tanh(self.before(x)), (9, 9)))


def methods(layers: Any, model: nn.Module | None = None) -> dict[str, str]:
    """Preconditioner of each layer by its weight's name."""
    model = model or Block()
    optimizer = Preconditioned(model, rule=RULE, layers=layers)
    found = optimizer.curvature.layers.items()
    return {layer.name: type(stack.method).__name__ for layer, stack in found}


def test_one_word_is_for_all_layers() -> None:
    pytest.importorskip('mmdet')
    assert set(methods('NKFAC').values()) == {'NewtonKronecker'}
    assert methods('NKFAC') == methods('NewtonKronecker')
    assert methods('AFOpt') == methods(dict(elsewhere='AFOpt'))


def test_two_words_are_attention_and_elsewhere() -> None:
    pytest.importorskip('mmdet')
    found = methods('AFOpt + AdamR')
    attention = {name for name in found if '.w_msa.' in name}
    assert attention and {found[name] for name in attention} == {'AttentionFeature'}
    assert {found[name] for name in set(found) - attention} == {'EigenRotation'}


def test_words_train_as_the_list_that_they_stand_for() -> None:
    pytest.importorskip('mmdet')
    written = [
        dict(match=dict(attention=True), preconditioner=dict(type='AttentionFeature')),
        dict(preconditioner=dict(type='NewtonKronecker', damping=0.02)),
    ]
    words = dict(elsewhere=dict(type='NKFAC', damping=0.02), attention='AFOpt')
    weights = []
    for layers in (written, words):
        torch.manual_seed(0)
        model = Block().double()
        optimizer = Preconditioned(model, rule=RULE, layers=layers)
        for step in range(3):
            optimizer.zero_grad()
            torch.manual_seed(step)
            model(feature_map((9, 9))).square().mean().backward()
            optimizer.step()
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *weights))


def test_a_model_without_attention_takes_the_second() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    assert set(methods('AFOpt+NKFAC', model).values()) == {'NewtonKronecker'}
    optimizer = Preconditioned(model, rule=RULE, layers='AFOpt+NKFAC')
    text = 'rule; AFOpt takes no layer, because no attention module is trained and can be read'
    assert optimizer.summary().partition('the plain ')[2] == text
    with pytest.raises(ValueError, match='hits nothing in Sequential'):
        methods([dict(match=dict(attention=True), preconditioner=dict(type='AFOpt'))], model)


def test_attention_may_take_the_plain_rule() -> None:
    pytest.importorskip('mmdet')
    assert not any('.w_msa.' in n for n in methods(dict(attention=None, elsewhere='NKFAC')))
    assert all('.w_msa.' in n for n in methods(dict(attention='AFOpt')))


@pytest.mark.parametrize(
    ('layers', 'message'),
    [
        (
            'AFOPT+NKFAC',
            "layers: attention: unknown preconditioner type 'AFOPT'; did you mean AFOp",
        ),
        ('nkfak', "unknown preconditioner type 'nkfak'; did you mean .*NKFAC"),
        ('AFOpt+NKFAC+AdamR', "layers='AFOpt\\+NKFAC\\+AdamR': write 'NKFAC' for all layers"),
        ('AFOpt+', "layers='AFOpt\\+': write"),
        ('', "layers='': write"),
        ({}, 'layers={} is not a list'),
        (
            dict(attention='AFOpt', rest='NKFAC'),
            'layers does not take rest; it takes attention, el',
        ),
        ([dict(match=dict(attention=1), preconditioner=None)], 'attention=1 is no bool'),
    ],
)
def test_mistakes_take_one_line(layers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Preconditioned(nn.Linear(3, 2), rule=RULE, layers=layers)
    assert '\n' not in str(caught.value)


def test_every_method_has_a_word_of_its_own() -> None:
    measured = {m for m in METHODS.values() if m.__module__.startswith('mmprecond.') and m.word}
    assert len({method.word for method in measured}) == len(measured) == 12
    assert all(find_method(method.word) == (method, {}) for method in measured)


@pytest.mark.parametrize('kind', [SKFAC, SMAC])
def test_a_form_of_a_method_has_a_word_too(kind: type[Any]) -> None:
    """It is the optimizer of that name; settings beside the word are kept."""
    word = kind.__name__
    layers = dict(elsewhere=dict(type=word, refresh_interval=40))
    ours = Preconditioned(nn.Linear(3, 2), rule=dict(type='SGDM', lr=0.1), layers=layers)
    theirs = kind(nn.Linear(3, 2), lr=0.1, refresh_interval=40)
    method, other = (one.curvature.stacks[0].method for one in (ours, theirs))
    assert method == other and method.title == word and method.given == {'refresh_interval'}
    assert word in ours.table()
    if kind is SKFAC:  # another setting of the form
        other = kind(nn.Linear(3, 2), lr=0.1, reduction='reduce').curvature.stacks[0].method
        assert other.title == word
    layers = dict(elsewhere=dict(type=word, settings='published'))
    ours = Preconditioned(nn.Linear(3, 2), rule=dict(type='SGDM', lr=0.1), layers=layers)
    theirs = kind(nn.Linear(3, 2), lr=0.1, settings='published')
    method, other = (one.curvature.stacks[0].method for one in (ours, theirs))
    assert method == other and method.title == word


def test_a_subclass_does_not_take_its_parents_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, 'Own', type('Own', (METHODS['NewtonKronecker'],), {}))
    assert find_method('NKFAC') == (METHODS['NewtonKronecker'], {})
