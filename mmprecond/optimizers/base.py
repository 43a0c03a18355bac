"""Optimizers that measure curvature: statistics, refreshes, preconditioned gradients."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_choice, check_flag, check_number
from ..core import LayerStack, checkpoint, moments, report
from ..core.assignment import Assignment
from ..core.clipping import clip_norm, kl_clip
from ..core.memory import refuse_what_does_not_fit
from ..core.monitor import Monitor
from ..core.sharding import SHARDINGS, Sharding
from ..core.stagger import take_turns
from ..curvature import COLUMNS, Capture, Layer, LeftOut, find_layers, unwrap
from ..distributed import rank, sum_over_ranks, world_size
from ..linalg import PRECISIONS
from ..linalg import matmul_precision as precision
from ..preconditioners import Preconditioner
from ..preconditioners.sides import Stacked
from ..rules import Rule
from .rule_optimizer import RuleOptimizer

logger = logging.getLogger('mmprecond')


class PreconditionedOptimizer(RuleOptimizer):
    """A rule that works on preconditioned gradients.

    Plain PyTorch needs no further call: hooks are put on the model for the steps that measure
    statistics and taken off again. Under a `GradScaler`, set ``optimizer.loss_scale = scaler``.

    Args:
        params: Parameters or groups, as in torch, with `model`; or the module itself. A group may
            hold ``precondition=False`` or ``damping=...`` for its weights.
        model: The module that owns the parameters, wrapped in DistributedDataParallel or not.
        rule: The rule.
        method: The preconditioner of every supported layer, or one for each by an assignment.
        defaults: The rule's hyper-parameters; plain numbers.
        capture_mb: Limit in megabytes for laid-out convolution patches.
        save_curvature: Whether `state_dict` holds statistics and operators. Without, a resumed run
            measures and refreshes at its first step.
        sharding: Of data-parallel ranks: 'none': each does all refreshes; 'refresh': each does its
            share and gets the others' operators; 'apply': each holds the operators of its share
            and preconditions that part of the gradients at every step.
        clip_update: Largest norm of all directions together, after preconditioning and before
            momentum and weight decay (of what acts after the rule, AdaAct and AdaFisher, before
            it too); None for no limit.
        check_memory: Whether to refuse statistics and operators that exceed the free memory.
        stagger: Whether layers take turns over the steps of an interval to be measured and
            refreshed, rather than all at once. A layer's first statistics then come up to
            `stat_interval` steps later (AdamR's first bases up to `refresh_interval`); until then
            it takes the plain rule.
        matmul_precision: Of float32 products that measure statistics and precondition gradients,
            in torch's words: 'highest'; 'high', TensorFloat-32 on a GPU; 'medium', beside that
            bfloat16 on a CPU, which gains where it has units for it (AMX). Refreshes, and
            statistics of attention, are always 'highest'.

    Attributes:
        left_out: Modules that take the plain rule, and why.
        auto_arm: Whether the optimizer arms itself; MMEngine's wrapper arms it instead.
        dropped: Samples of layers that were not finite, since the start.
        monitor: Reports refreshes, where someone wants to know (see `Monitor`); or None.

    Raises:
        ValueError: For a missing model, a model without a supported layer, bad values, or more
            statistics and operators than fit into memory.
    """

    needs = 'capture'

    def __init__(self, params: Any, *, model: nn.Module | None, rule: Rule,
                 method: Preconditioner | Assignment, defaults: dict[str, Any],
                 capture_mb: float = 64., save_curvature: bool = True, sharding: str = 'none',
                 clip_update: float | None = None, check_memory: bool = True,
                 stagger: bool = False, matmul_precision: str = 'highest') -> None:
        if isinstance(params, nn.Module):
            model, params = params, params.parameters()
        if model is None:
            raise ValueError(
                f'{type(self).__name__} needs the model that owns the parameters: pass model=..., '
                "or in a config set constructor='PrecondOptimWrapperConstructor' in optim_wrapper")
        check_flag('stagger', stagger)
        check_choice('matmul_precision', matmul_precision, PRECISIONS)
        check_number('capture_mb', capture_mb, open_low=True, finite=False)
        check_choice('sharding', sharding, SHARDINGS)
        check_number('clip_update', 1. if clip_update is None else clip_update, open_low=True)
        super().__init__(params, rule, defaults)
        self.save_curvature = save_curvature
        self.clip_update = clip_update
        self.matmul_precision = matmul_precision
        self.dropped = 0
        self.monitor: Monitor | None = None
        self.sharding = Sharding(sharding, save_curvature)
        self._noted: set[Layer] = set()
        self._catch_up: set[Layer] = set()
        self.auto_arm = True
        self.left_out: list[LeftOut] = []
        self.layers = self._assign(unwrap(model), method, capture_mb)
        if stagger:
            take_turns({layer: stack.method for layer, stack in self.layers.items()})
        if check_memory:
            refuse_what_does_not_fit(self)
        self._capture = Capture({layer: stack.requires for layer, stack in self.layers.items()},
                                partial(precision, matmul_precision))
        self._arm_if_automatic()

    # ---------------------------------------------------------------- construction

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, as in torch; they take the plain rule."""
        super().add_param_group(param_group)
        damping = self.param_groups[-1].get('damping')
        if damping is not None:
            check_number('damping', damping, open_low=True)

    def _assign(self, model: nn.Module, method: Preconditioner | Assignment,
                capture_mb: float) -> dict[Layer, LayerStack]:
        """Gives each layer its preconditioner and its place in a stack."""
        assignment = method if isinstance(method, Assignment) else Assignment(method)
        bound = assignment.bind(model)

        def windows(name: str) -> int:
            chosen = bound.method(name)
            return chosen.attention_windows if chosen else 0

        def with_bias(name: str) -> bool:
            chosen = bound.method(name)
            return chosen is not None and chosen.attention_bias

        layers, self.left_out = find_layers(model, self.param_groups, capture_mb=capture_mb,
                                            attention_windows=windows, attention_bias=with_bias)
        bound.check_use(list(layers))
        taken: dict[Layer, Preconditioner] = {}
        for name, layer in layers.items():
            chosen = bound.method(name)
            for option, value in (chosen.layer_options if chosen else {}).items():
                setattr(layer, option, value)
            reason = _reason_against(layer, chosen, bound.entry(name) is not None)
            if chosen is None or reason:
                self.left_out.append(LeftOut(name, type(layer.modules[0]).__name__, reason))
                continue
            taken[layer] = chosen
        if not taken:
            raise ValueError(f'{type(self).__name__} found no layer to precondition: '
                             f'{_why_none(layers, self.left_out)}')
        return self._stack(taken)

    def _stack(self, taken: dict[Layer, Preconditioner]) -> dict[Layer, LayerStack]:
        """Puts layers that are alike, and belong to one rank, into stacks."""
        stacks: dict[Any, LayerStack] = {}
        assigned: dict[Layer, LayerStack] = {}
        for layer, owner in self.sharding.assign(taken).items():
            method, requires = taken[layer], taken[layer].required(layer)
            key = (method, layer.shape, tuple(method.operator_shapes(layer).items()), requires,
                   tuple(map(layer.statistic_shape, requires)), layer.working_dtype,
                   layer.weight.device, owner)
            assigned[layer] = stacks.setdefault(key, LayerStack(method, requires, owner))
        self.stacks = list(stacks.values())
        return assigned

    # ---------------------------------------------------------------- capture

    @property
    def loss_scale(self) -> Any:
        """By what the loss is multiplied: None, a number, or a `torch.amp.GradScaler`."""
        return self._capture.loss_scale

    @loss_scale.setter
    def loss_scale(self, scale: Any) -> None:
        self._capture.loss_scale = scale

    def arm(self) -> None:
        """Puts hooks on the layers whose statistics this step measures, if it does."""
        self._capture.arm(self._due(), seed=self.t * world_size() + rank(),
                          share=(rank(), world_size()))

    def disarm(self) -> None:
        """Takes the hooks off; what was measured stays until the step."""
        self._capture.disarm()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears gradients and the statistics measured with them."""
        super().zero_grad(set_to_none)
        self._capture.drop()

    def _due(self) -> list[Layer]:
        return [layer for layer, stack in self.layers.items()
                if layer in self._catch_up or stack.captures(layer, self.t)]

    def _arm_if_automatic(self) -> None:
        if self.auto_arm:
            self.arm()

    # ---------------------------------------------------------------- step

    def _measure(self) -> None:
        if self.monitor is not None:
            self.monitor.begin()
        self._merge_statistics()
        with precision('highest'):
            self._refresh()

    def _after_step(self) -> None:
        self._arm_if_automatic()

    def _merge_statistics(self) -> None:
        """Sums what was measured over ranks and merges it, layer by layer, where it is sound.

        Waits for the device once: for the norms that tell sound samples from others.
        """
        due = self._due()
        if not due:
            return
        self._catch_up.clear()
        samples = self._samples(due)
        sums = [s for sample in samples.values() for s in sample.values()]
        norms = iter(_to_host(torch._foreach_norm(sums) if sums else []))
        sizes = {layer: {name: next(norms) for name in sample} for layer, sample in samples.items()}
        for layer in list(samples):
            if not all(size < float('inf') for size in sizes[layer].values()):
                self.dropped += 1
                logger.warning('%s: non-finite statistics at step %d were dropped (%d so far)',
                               layer.name, self.t, self.dropped)
                del samples[layer]
            # A zero sample (a dropped block, no positives) tells nothing.
            elif not all(sizes[layer][name]
                         for name in self.layers[layer].method.essential(layer)):
                self._note_zero(layer)
                del samples[layer]
        for stack in self.stacks:
            stack.merge({layer: samples.pop(layer) for layer in list(samples)
                         if self.layers[layer] is stack}, sizes)

    def _samples(self, due: list[Layer]) -> dict[Layer, dict[str, Tensor]]:
        """Joint statistics of all ranks: L = sum g'g of the joint loss, all others means."""
        staged = self._capture.staged
        ranks = world_size()
        rows = [float(staged[layer].rows) if layer in staged else 0. for layer in due]
        if ranks > 1:
            counts = torch.tensor(rows, dtype=torch.float64, device=due[0].weight.device)
            sum_over_ranks([counts])
            rows = counts.tolist()
        samples: dict[Layer, dict[str, Tensor]] = {}
        for layer, count in zip(due, rows, strict=True):
            if not count:
                self._warn_unseen(layer)
            else:
                sums = staged.pop(layer).sums if layer in staged else {}
                samples[layer] = {name: sums[name] if name in sums else layer.empty(name)
                                  for name in self.layers[layer].requires}
        self._capture.drop()
        sum_over_ranks([s for sample in samples.values() for s in sample.values()])
        counted = dict(zip(due, rows, strict=True))
        for layer, sample in samples.items():
            for name, total in sample.items():
                # A rank's loss is a share 1 / ranks of the joint mean loss.
                if name.startswith('gradient'):
                    method = self.layers[layer].method
                    factor = method.gradient_factor(counted[layer]) / ranks**2
                else:
                    factor = 1 / counted[layer]
                total *= factor**0.5 if COLUMNS in name else factor
        return samples

    def _note_zero(self, layer: Layer) -> None:
        """Says once that a layer's first statistics tell nothing."""
        if layer not in self._noted and not self.layers[layer].holds(layer):
            logger.info('%s: its statistics at step %d are zero; it takes the plain rule until '
                        'they are not', layer.name, self.t)
        self._noted.add(layer)

    def _warn_unseen(self, layer: Layer) -> None:
        """Says once that a weight is trained although its module is never called."""
        seen = self._capture.seen
        if seen and layer not in seen and layer.weight.grad is not None:
            seen.add(layer)
            logger.warning('%s: it has a gradient although its module was not called (its weight '
                           'is used elsewhere); without statistics it takes the plain rule',
                           layer.name)

    def _refresh(self) -> None:
        """Refreshes the stacks that are due, and layers that have statistics but no operator."""
        due = [(stack, positions, moments.remember(stack)) for stack in self.stacks
               if (positions := stack.due(self.t))]
        if not due:
            return
        self.sharding.check_ranks()
        error: Exception | None = None
        good = [[False] * len(positions) for _, positions, _ in due]
        try:
            good = self._compute([(stack, positions) for stack, positions, _ in due])
        except Exception as raised:  # the other ranks must hear of it first
            error = raised
        device = next(iter(self.layers)).weight.device
        for (stack, positions, _), fine in zip(due, self.sharding.agree(good, error, device),
                                               strict=True):
            stack.count_refresh(positions, fine)
        self.sharding.exchange_operators([stack for stack, *_ in due])
        for stack, _, before in due:
            if before:
                moments.carry(self, stack, before)
        if self.monitor is not None:
            self.monitor.refreshed(self, [(stack, positions) for stack, positions, _ in due])

    def _compute(self, due: list[tuple[LayerStack, list[int]]]) -> list[list[bool]]:
        """Refreshes this rank's stacks, waiting for the device once; says what succeeded."""
        started = [stack.start_refresh(positions) if self.sharding.mine(stack) else None
                   for stack, positions in due]
        flags = iter(_to_host([good for good in started if good is not None]))
        return [[False] * len(positions) if good is None else
                stack.finish_refresh(positions, [bool(next(flags)) for _ in positions])
                for (stack, positions), good in zip(due, started, strict=True)]

    def _directions(self, gradients: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """The gradients, preconditioned where a layer has an operator."""
        directions = dict(gradients)
        with precision(self.matmul_precision):
            for stack in self.stacks:
                if self.sharding.holds(stack):
                    self._transform(stack, stack.method.apply, directions)
        self.sharding.exchange_directions(self.stacks, directions)
        if self.monitor is not None:
            self.monitor.moved(gradients, directions)
        kl_clip(self, gradients, directions)
        if self.clip_update is not None:
            clip_norm(directions, self.clip_update)
        return directions

    def _turn_back(self, directions: dict[Tensor, Tensor]) -> None:
        """Out of the rotated spaces, and by what scales directions after the rule."""
        with precision(self.matmul_precision):
            for stack in self.stacks:
                if stack.method.restores:
                    self._transform(stack, stack.method.restore, directions)

    @staticmethod
    def _transform(stack: LayerStack, function: Callable[[Stacked, Tensor], Tensor],
                   tensors: dict[Tensor, Tensor]) -> None:
        """Replaces what belongs to a stack's parameters by a function of its matrix form."""
        ready = [(k, layer) for k, layer in stack.ready() if layer.weight in tensors]
        if not ready:
            return
        positions, layers = zip(*ready, strict=True)
        matrices = _stacked([layer.join(*(tensors.get(p) for p in layer.parameters))
                             for layer in layers])
        results = function(stack.operators(list(positions)), matrices)
        for layer, matrix in zip(layers, results, strict=True):
            pieces = zip(layer.parameters, layer.split(matrix), strict=True)
            tensors.update((p, piece) for p, piece in pieces if p in tensors)

    # ---------------------------------------------------------------- state and report

    def state_dict(self) -> dict[str, Any]:
        """Torch's state with one more key, 'precond': plain tensors, numbers and strings.

        Under sharding='apply' only the first rank's is whole, and only it can be loaded.
        """
        state = super().state_dict()
        state[checkpoint.KEY] = checkpoint.export(self)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state; what it lacks of the curvature is measured at the next step."""
        rest = {key: value for key, value in state_dict.items() if key != checkpoint.KEY}
        super().load_state_dict(rest)
        self._capture.restart()
        unfit = checkpoint.restore(self, state_dict.get(checkpoint.KEY))
        # They had statistics by now, and are measured at once.
        self._catch_up = {layer for layer in unfit if self.layers[layer].method.eager
                          and not self.layers[layer].method.given}
        self._arm_if_automatic()

    def table(self) -> str:
        """Every module with parameters: its preconditioner or why not, factors, memory."""
        return report.table(self)


def _reason_against(layer: Layer, method: Preconditioner | None, matched: bool) -> str:
    """Why a layer takes the plain rule, or ''."""
    if method is None:
        return 'preconditioner=None' if matched else 'no entry of layers matches it'
    if not method.required(layer):
        return f'{layer.rows} x {layer.columns} is over max_dim={method.max_dim}'
    return ''


def _why_none(layers: dict[str, Layer], left_out: Sequence[LeftOut]) -> str:
    """Why a model has nothing to precondition."""
    if layers:
        reasons = sorted({left.reason for left in left_out if left.name in layers})
        return f'all {len(layers)} are left to the plain rule ({"; ".join(reasons)})'
    found = sorted({f'{left.kind}: {left.reason}' for left in left_out})
    return (f'its modules with parameters are {"; ".join(found) or "none"}; it needs a Linear or '
            'Conv2d whose weight is in params')


def _stacked(matrices: list[Tensor]) -> Tensor:
    """Matrices as one stack; a single one is not copied, and must not be written to."""
    return torch.stack(matrices) if len(matrices) > 1 else matrices[0][None]


def _to_host(values: Sequence[Tensor]) -> list[float]:
    """The numbers in some small tensors, with one wait for the device."""
    if not values:
        return []
    flat = [value.reshape(-1).to(values[0].device, torch.float64) for value in values]
    return torch.cat(flat).tolist()
