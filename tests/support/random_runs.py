"""Random networks trained by the package and by its slow references."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import reject
from hypothesis import strategies as st
from torch import nn

from mmprecond import optimizers
from mmprecond.optimizers import Preconditioned, PreconditionedOptimizer
from tests.reference.factors import Loss, plain_copy
from tests.reference.feature import ReferenceFeature
from tests.reference.kfac import ReferenceKFAC
from tests.reference.nkfac import ReferenceNKFAC
from tests.reference.root import ReferenceRoot
from tests.reference.rules import ReferenceAdamW, ReferenceAdan, ReferenceRule, ReferenceSGDM
from tests.support.fuzz import OPTIONS, RUN, Case, Net, freeze, losses, networks

pytestmark = pytest.mark.filterwarnings('ignore:Using padding=.same.:UserWarning')

METHODS = {
    'NKFAC': 'NewtonKronecker',
    'AdaNKFAC': 'NewtonKronecker',
    'KFAC': 'FisherKronecker',
    'FSGD': 'InputFeature',
    'FAdam': 'InputFeature',
    'AFOpt': 'AttentionFeature',
    'AdaAFOpt': 'AttentionFeature',
    'SGDMBK': 'KroneckerRoot',
    'AdamWBK': 'KroneckerRoot',
}


SGD_KINDS = ('NKFAC', 'KFAC', 'FSGD', 'SGDMBK')
INTERVALS = ((1, 1), (1, 2), (2, 2), (2, 4), (1, 3), (3, 3))


def settings_of(kind: str) -> st.SearchStrategy[dict[str, Any]]:
    """Settings of an optimizer's preconditioner, of which no step is so long that it diverges."""
    pick = st.sampled_from
    own: dict[str, st.SearchStrategy[Any]] = {
        'NewtonKronecker': st.fixed_dictionaries(
            dict(
                damping=pick([0.01, 0.3]),
                newton_steps=pick([1, 3]),
                exact_interval=pick([4, 500]),
                solver=pick(['newton', 'newton', 'cholesky']),
            )
        ),
        'FisherKronecker': st.fixed_dictionaries(
            dict(reduction=pick(['expand', 'reduce']), kl_clip=pick([1e-3, 1e-6]))
        ).flatmap(
            lambda s: pick(
                [
                    dict(s, damping=0.0625),
                    dict(s, damping=1.0, scaling='none'),
                    dict(s, damping=0.0625, scaling='norm_recovery'),
                    dict(s, damping=0.01, damping_form='relative'),
                    dict(s, damping=0.1, damping_form='relative', scaling='norm_recovery'),
                ]
            )
        ),
        'InputFeature': pick(
            [
                dict(damping=0.01),
                dict(exponent=0.5),
                dict(exponent=0.25),
                dict(exponent=2.0, damping=0.1),
                dict(norm_recovery=False, damping=0.3),
            ]
        ),
        'AttentionFeature': pick(
            [
                dict(count_from=0, convolutions=True, damping=0.01),
                dict(count_from=0, convolutions=True, damping=0.3, norm_recovery=False),
            ]
        ),
        'KroneckerRoot': st.fixed_dictionaries(
            dict(
                damping=pick([1e-5, 0.3]),
                solver=pick(['newton_schulz', 'eigh']),
                root_steps=pick([4, 10]),
            )
        ),
    }
    common = pick(INTERVALS).flatmap(
        lambda pair: st.fixed_dictionaries(
            dict(
                stat_interval=st.just(pair[0]),
                refresh_interval=st.just(pair[1]),
                stat_decay=pick([0.0, 0.5, 0.95]),
                max_dim=pick([8192, 8192, 8192, 6, 12]),
            )
        )
    )
    return st.tuples(common, own[METHODS[kind]]).map(lambda both: both[0] | both[1])


def rules_of(kind: str) -> st.SearchStrategy[dict[str, Any]]:
    if kind in ('NKFAC', 'KFAC', 'FSGD', 'SGDMBK', 'AFOpt'):
        fixed: dict[str, Any] = dict(type='SGDM', lr=0.02)
        return st.fixed_dictionaries(
            {name: st.just(value) for name, value in fixed.items()}
            | dict(momentum=st.sampled_from([0.0, 0.9]), weight_decay=st.sampled_from([0.0, 0.05]))
        )
    fixed = dict(type='AdamW', lr=0.01, betas=(0.8, 0.95), eps=1e-6)
    if kind == 'AdaAFOpt':
        fixed.update(type='Adan', betas=(0.9, 0.8, 0.95))
    elif kind != 'FAdam':
        fixed.update(decay='published')
    return st.fixed_dictionaries(
        {name: st.just(value) for name, value in fixed.items()}
        | dict(weight_decay=st.sampled_from([0.0, 0.05]))
    )


@st.composite
def cases(draw: st.DrawFn, kind: str = '', mixed: bool = False) -> Case:
    """A case of one optimizer, or of any; `mixed` gives the head another method."""
    kind = kind or draw(st.sampled_from(SGD_KINDS if mixed else list(METHODS)))
    head = draw(st.sampled_from([k for k in SGD_KINDS if k != kind])) if mixed else ''
    return Case(
        kind=kind,
        head=head,
        settings=draw(settings_of(kind)),
        head_settings=draw(settings_of(head)) if head else {},
        rule=draw(rules_of(kind)),
        **draw(networks()),
        **{name: draw(strategy) for name, strategy in RUN.items()},
    )


# ------------------------------------------------------------------- the package


def overrides_of(case: Case, net: Net) -> dict[str, dict[str, Any]]:
    """What the user sets for single parameters."""
    names = [name for name, _ in net.named_parameters()]
    found: dict[str, dict[str, Any]] = {}
    for number, option in case.options:
        name = names[number % len(names)]
        if not (case.head and name.startswith('head')):  # an entry for nothing is refused
            found.setdefault(name, {}).update(OPTIONS[option])
    return found


def optimizer_of(case: Case, net: Net) -> PreconditionedOptimizer:
    overrides = overrides_of(case, net)
    params: Any = net
    if overrides or case.grouped:
        params = [dict(params=[p], **overrides.get(name, {})) for name, p in net.named_parameters()]
    entry = dict(
        preconditioner=dict(type=METHODS[case.kind], **case.settings, settings='published')
    )
    if case.head:
        other = dict(type=METHODS[case.head], **case.head_settings, settings='published')
        layers = [dict(match=dict(name='head'), preconditioner=other), entry]
        return Preconditioned(params, model=net, rule=case.rule, layers=layers)
    if case.via:
        return Preconditioned(params, model=net, rule=case.rule, layers=[entry])
    rule = {key: value for key, value in case.rule.items() if key not in ('type', 'decay')}
    more = dict(rule='Adan') if case.rule['type'] == 'Adan' else {}
    return getattr(optimizers, case.kind)(
        params, model=net, **rule, **more, **case.settings, settings='published'
    )


class Run:
    """A network in training; `odd` names things done beside it (see `Run.beside`)."""

    def __init__(self, case: Case, odd: dict[str, int] | None = None) -> None:
        self.case, self.odd, self.net = case, odd or {}, Net(case)
        freeze(case, self.net, 0)
        self.optimizer = optimizer_of(case, self.net)
        self.scaler = torch.amp.GradScaler('cpu', 1024.0) if case.amp == 'scaler' else None

    def step(self, t: int) -> None:
        freeze(self.case, self.net, t)
        if t == self.case.overflow:
            self.backward(t, float('inf'))
            if self.scaler:
                self.scaler.step(self.optimizer)
                self.scaler.update()
        self.clear()
        self.beside('before', t)
        scale = self.backward(t)
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            for p in self.net.parameters():
                if p.grad is not None:
                    p.grad /= scale
            self.optimizer.step()
        assert self.optimizer.t == t + 1
        self.beside('after', t)

    def clear(self) -> None:
        (self.optimizer if self.case.cleared == 'optimizer' else self.net).zero_grad()

    def backward(self, t: int, factor: float = 1.0) -> float:
        scale = 3.0 * 2.0**t if self.case.amp == 'number' else 1.0
        self.optimizer.loss_scale = self.scaler or (scale if self.case.amp else None)
        for k, loss in enumerate(losses(self.case, t)):
            value = factor * scale * loss(self.net)
            if k == 0:
                self.beside('late', t)
            (self.scaler.scale(value) if self.scaler else value).backward()
            self.beside('between', t)
        return scale

    def beside(self, place: str, t: int) -> None:
        """What may come at any place, and what clears gradients and comes before a step alone."""
        events = self.odd.get(place, 0) >> t % 3
        other = losses(self.case, t + 20)[0]
        if events & 1:
            with torch.no_grad():
                other(self.net)
        if events & 2:
            self.net.eval()
            other(self.net)
            self.net.train()
        if events & 4:
            copy.deepcopy(self.net)
            twin = copy.deepcopy(self.net)
            other(twin).backward()
        if events & 8:
            kept = other(self.net)  # a graph that is never walked
            del kept
        if place in ('before', 'late') and events & 16:
            self.clear()
        if place == 'before' and events & 32:
            other(self.net).backward()
            self.clear()


# ------------------------------------------------------------------- the references


def reference_overrides(case: Case, net: Net) -> dict[str, dict[str, Any]]:
    """What the user sets, and precondition=False for what the package leaves to the plain rule."""
    found = copy.deepcopy(overrides_of(case, net))
    names = {p: name for name, p in net.named_parameters()}

    def leave(p: nn.Parameter | None) -> None:
        if p is not None:
            found.setdefault(names[p], {})['precondition'] = False

    def takes(p: nn.Parameter | None) -> bool:
        return p is not None and found.get(names[p], {}).get('precondition', True)

    if net.embed is not None and net.head.weight is net.embed.weight:
        leave(net.head.weight)
    for unit in net.units:
        if unit.part.extra == 'own bias' and unit.part.bias:
            leave(unit.main.weight)
        if unit.part.extra == 'bias alone' or unit.part.frozen == 'bias' and case.frozen[0] == 0:
            leave(unit.main.bias)  # of two weights, or frozen when the optimizer was built
    for name, module in net.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            head = bool(case.head) and name == 'head'
            settings = case.head_settings if head else case.settings
            kind = METHODS[case.head if head else case.kind]
            sides = [module.weight[0].numel() + takes(module.bias)]
            if not kind.endswith('Feature'):
                sides.append(len(module.weight) // getattr(module, 'groups', 1))
            if max(sides) > settings['max_dim']:
                leave(module.weight)
    return found


def reference_of(
    kind: str,
    model: nn.Module,
    case: Case,
    overrides: dict[str, dict[str, Any]],
    settings: dict[str, Any],
) -> ReferenceNKFAC:
    rule = {key: value for key, value in case.rule.items() if key not in ('type', 'decay')}
    settings = {key: value for key, value in settings.items() if key != 'max_dim'}
    if METHODS[kind].endswith('Feature'):
        steps: ReferenceRule
        if rule.get('betas') is None:
            steps = ReferenceSGDM(rule['momentum'])
        else:
            steps = {2: ReferenceAdamW, 3: ReferenceAdan}[len(rule['betas'])](
                rule['betas'], rule['eps']
            )
        return ReferenceFeature(
            model, steps, rule['lr'], rule['weight_decay'], overrides=overrides, **settings
        )
    found = dict(
        NewtonKronecker=ReferenceNKFAC, FisherKronecker=ReferenceKFAC, KroneckerRoot=ReferenceRoot
    )[METHODS[kind]]
    return found(model, **rule, overrides=overrides, **settings)


class Slow:
    """The references of a case: one, or one for the head and one for all else."""

    def __init__(self, case: Case, net: Net) -> None:
        overrides = reference_overrides(case, net)
        make = lambda kind, settings, others: reference_of(
            kind,
            self._copy(net),
            case,
            {
                name: overrides.get(name, {}) | (dict(precondition=False) if name in others else {})
                for name, _ in net.named_parameters()
            },
            settings,
        )
        heads = {name for name, _ in net.named_parameters() if name.startswith('head')}
        rest = {name for name, _ in net.named_parameters()} - heads
        self.references = [make(case.kind, case.settings, heads if case.head else ())]
        self.owned: list[set[str]] = [rest, heads]
        if case.head:
            self.references.append(make(case.head, case.head_settings, rest))

    @staticmethod
    def _copy(net: Net) -> Net:
        model: Any = plain_copy(net)
        for unit in model.units:
            unit.plain = True
        return model

    @property
    def layers(self) -> int:
        return sum(len(reference.layers) for reference in self.references)

    def step(self, case: Case, t: int) -> None:
        steps: list[Loss] = losses(case, t)
        for reference in self.references:
            freeze(case, reference.model, t)
            try:
                reference.step(*steps)
            except (ZeroDivisionError, torch.linalg.LinAlgError):
                reject()  # a block of zeros
        if case.head:
            with torch.no_grad():
                for name, p in self.references[1].model.named_parameters():
                    other = self.references[0].model.get_parameter(name)
                    (p.copy_(other) if name in self.owned[0] else other.copy_(p))

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.references[0].model.named_parameters())


def against_references(case: Case) -> None:
    net = Net(case)
    freeze(case, net, 0)
    slow = Slow(case, net)
    if not slow.layers:
        with pytest.raises(ValueError, match='found no layer'):
            Run(case)
        return
    run = Run(case)
    for t in range(case.steps):
        run.step(t)
        slow.step(case, t)
        theirs = slow.parameters()
        for name, p in run.net.named_parameters():
            wanted = theirs[name].detach()
            size = 1 + float(wanted.abs().max())
            error = float((p.detach() - wanted).abs().max())
            assert error <= 1e-7 * size, (name, t, error)
