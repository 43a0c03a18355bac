"""Optimizer with any rule and any preconditioners, chosen layer by layer."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..checks import reject_unexpected
from ..core import Assignment, CurvatureOptions, parse_layers
from ..preconditioners import METHODS, Preconditioner
from ..rules import RULES, Rule, build_rule, rule_name
from .base import PreconditionedOptimizer


class Preconditioned(PreconditionedOptimizer):
    """Rule with preconditioners that are chosen layer by layer.

    The two examples are the same: AFOpt on attention modules and NKFAC elsewhere::

        rule = dict(type='AdamW', lr=1e-4, weight_decay=0.05)
        Preconditioned(model, rule=rule, layers='AFOpt+NKFAC')
        Preconditioned(model, rule=rule, layers=[
            dict(match=dict(attention=True), preconditioner=dict(type='AttentionFeature')),
            dict(preconditioner=dict(type='NewtonKronecker'))])

    Args:
        params: Parameters or groups, with `model`; or the module itself.
        model: The module that owns the parameters.
        rule: ``dict(type=..., lr=..., ...)`` with the rule's hyper-parameters and options; its type
            is 'SGDM', 'EMASGD', 'AdamW', 'Adan', 'AdaGrad', 'RAdam', 'AdaBelief', 'ARO',
            'DCTAdamW' or 'RAMDA'.
        layers: 'NKFAC' for all layers; or 'AFOpt+NKFAC', where the first method takes all layers of
            attention modules that can be read as a whole. A model without any takes the second for
            all layers, and the log says so. With settings:
            ``dict(attention='AFOpt', elsewhere=dict(type='NKFAC', damping=0.02))``.
            Or a list of entries ``dict(match=..., preconditioner=...)``, of which the first that
            matches a layer wins. `match` has `module_type` (one or several class names), `name` (a
            pattern as in `fnmatch`), ``attention=True``, or several of them. They apply to the
            layer's module and to the modules around it. An entry without `match` applies to all
            remaining layers. `preconditioner` is ``dict(type=..., **settings)``, or None for the
            plain rule. A type is a class ('NewtonKronecker') or the method's name ('NKFAC').
        **options: All options of `PreconditionedOptimizer`, such as `clip_update`.

    Raises:
        ValueError: If a type or setting is unknown, an entry matches nothing, a preconditioner does
            not work with the rule, or the model is missing.
    """

    place_of_rule = 'write it in rule=dict(type=..., ...)'

    def __init__(
        self,
        params: Any,
        *,
        rule: dict[str, Any] | None = None,
        layers: str | dict[str, Any] | list[dict[str, Any]] | None = None,
        model: nn.Module | None = None,
        **options: Any,
    ) -> None:
        built, defaults, assignment = read_settings(rule, layers, options)
        super().__init__(
            params, model=model, rule=built, method=assignment, defaults=defaults, **options
        )


def read_settings(
    rule: dict[str, Any] | None, layers: Any, options: dict[str, Any]
) -> tuple[Rule, dict[str, Any], Assignment]:
    """Reads the settings of `Preconditioned`, as its constructor does.

    Returns:
        The rule, its hyper-parameters, and the methods.

    Raises:
        ValueError: If a type or value is invalid, or a preconditioner does not work with the rule.
        TypeError: If an option is unknown.
    """
    unexpected = CurvatureOptions.unknown(options)
    if isinstance(rule, dict) and set(unexpected) & set(rule):
        keys = ', '.join(sorted(unexpected))
        raise TypeError(
            f'Preconditioned does not take {keys} beside rule and layers, its rule '
            'does (write optimizer.rule.lr and the like); if a base config left '
            'the key behind, add `_delete_=True` to the optimizer of your config'
        )
    takers = [m for m in METHODS.values() if m.word and set(unexpected) <= set(m.options())]
    if unexpected and takers:
        word = next((m.word for m in takers if m.word == 'NKFAC'), takers[0].word)
        settings = ', '.join(f'{key}={value!r}' for key, value in unexpected.items())
        raise TypeError(
            f'Preconditioned does not take {", ".join(unexpected)}, its methods do; write '
            f"layers=dict(elsewhere=dict(type='{word}', {settings})); if a base config left the "
            'key behind, add `_delete_=True` to the optimizer of your config'
        )
    reject_unexpected('Preconditioned', unexpected, ['rule', 'layers', *CurvatureOptions.names()])
    built, defaults = build_rule(rule)
    assignment = parse_layers(layers)
    _check_rule(built, assignment)
    CurvatureOptions(**options)
    return built, defaults, assignment


def _check_rule(rule: Rule, assignment: Assignment) -> None:
    """Raises ValueError if a preconditioner does not work with the rule."""
    bound = [
        (method, names) for method in assignment.methods if (names := _supported_rules(method))
    ]
    possible = set.intersection(*(set(names) for _, names in bound)) if bound else set()
    name = rule_name(type(rule))
    for method, names in bound:
        if name in names:
            continue
        others = ', '.join(f'{m.title} with {" or ".join(names)}' for m, names in bound)
        advice = 'no rule suits them all; drop one of them'
        if possible:
            first = min(possible, key=list(RULES).index)
            advice = (
                f"write rule=dict(type='{first}', ...), or give a config the optimizer "
                f'{first.replace("SGDM", "SGD")} with a learning rate of its own'
            )
        raise ValueError(f'{method.title} does not work with the rule {name} ({others}); {advice}')


def _supported_rules(method: Preconditioner) -> list[str]:
    """Names of the rules that a preconditioner needs; an empty list means all."""
    if method.rotates:
        return [name for name, rule in RULES.items() if rule.elementwise]
    return list(method.rules)
