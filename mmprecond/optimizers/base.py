"""Optimizers that measure curvature and apply a rule to preconditioned gradients."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from ..checks import (
    check_count,
    check_number,
    plain_numbers,
    reject_unexpected,
)
from ..core import (
    Assignment,
    Curvature,
    CurvatureOptions,
    Monitor,
    checkpoint,
    frozen_parts,
    rotate,
)
from ..curvature import LeftOut
from ..linalg import matmul_precision
from ..preconditioners import Preconditioner
from ..rules import Rule
from .groups import GROUP_KEYS
from .loss_input import LossInput
from .rule_optimizer import Batch, RuleOptimizer, split_module
from .settings import FullSignature

#: Entries of a parameter group that choose layers when the optimizer is built, and not later.
ATTACHING = ('precondition', 'input_positions')


class PreconditionedOptimizer(LossInput, RuleOptimizer):
    """Optimizer that applies a rule to preconditioned gradients.

    Plain PyTorch needs no further call. The optimizer installs hooks on the model for steps that
    measure statistics, and removes them afterwards. Under a `GradScaler`, set
    ``optimizer.loss_scale = scaler``.

    Args:
        params: Parameters or groups, as in torch, with `model`; or the module itself. A group may
            hold ``precondition=False`` or ``damping=...`` for its weights. All groups then have the
            entry 'damping', which a scheduler may change: the next refresh takes it. In a group of
            several methods their dampings keep their ratios. ``input_positions=49`` says that
            linear layers read a flattened feature map of 49 positions, for their `input_factor`.
            Box heads of MMDetection say so themselves. Groups that are added later take the plain
            rule, and 'precondition' and 'input_positions' must not change.
        model: The module that owns the parameters, wrapped in DistributedDataParallel or not.
        rule: The rule.
        method: The preconditioner of every supported layer, or one for each by an assignment.
        defaults: The rule's hyper-parameters; plain numbers.
        capture_mb: Limit in megabytes for laid-out convolution patches (default 64).
        save_curvature: Whether `state_dict` holds statistics and operators (default True). If not,
            a resumed run measures and refreshes at its first step.
        sharding: Division of the work among data-parallel ranks. 'none' (default): each rank does
            all refreshes. 'refresh': each rank does its share and receives the other operators.
            'apply': each rank holds the operators of its share, and preconditions that part of the
            gradients at every step.
        clip_update: Largest joint norm of all directions, or None (default) for no limit. The clip
            comes after preconditioning and before momentum and weight decay. With Shampoo, AdaAct
            and AdaFisher, which act after the rule, it comes before preconditioning too.
        check_memory: Whether to refuse statistics and operators that exceed the free memory
            (default True).
        stagger: Whether to distribute the captures and refreshes of layers over the steps of an
            interval (default False). A layer's first statistics then come up to `stat_interval`
            steps later (AdamR's first bases up to `refresh_interval`). Until then the layer takes
            the plain rule.
        overhead: Share of an iteration's time that captures and refreshes may add per iteration, in
            (0, 1); default: None. If set, times of 36 to 70 iterations choose the intervals, within
            5 to 200 steps for captures and 25 to 2000 for refreshes. Given intervals stay. All
            ranks and resumed runs use the intervals that were found. The log has them.
        intervals: Entries (step, stat_interval, refresh_interval) with increasing steps, such as
            ``[(0, 5, 25), (1000, 20, 200)]``: intervals of all methods from a step on. Before the
            first entry methods have their own (default: no entries).
        start_step: First step that captures and refreshes (default 0); intervals count from there.
            All layers take the plain rule before.
        fallback: Treatment of matrices that capture cannot read (weights that are used by hand,
            `nn.MultiheadAttention.out_proj`, deformable convolutions, embeddings, scripted
            modules). 'rule' (default): they take the plain rule. 'gradient': they take their
            method on statistics of the gradient matrix, if it has such a form (NKFAC, AdaBK,
            AdamR, FSGD). Methods with source='gradient' always do so.
        matmul_precision: Precision of the float32 products that measure statistics and precondition
            gradients, by torch's names. 'highest': float32; 'high': TensorFloat-32 on a GPU;
            'medium': also bfloat16 on a CPU; 'auto' (default): 'medium' on a CPU with units for
            bfloat16 (AMX, AVX-512), else 'high'. Refreshes and statistics of attention always use
            'highest'.

    Attributes:
        curvature: Owner of layers, statistics and operators.
        left_out: Modules that take the plain rule, with the reasons.
        dropped: Number of samples that were dropped because they were not finite.
        monitor: Monitor that reports refreshes, or None.
        auto_arm: Whether the optimizer arms itself; if not, MMEngine's wrapper arms it.

    Raises:
        ValueError: If a value is out of range, the model is missing or has no supported layer, or
            statistics and operators do not fit into memory.
    """

    needs = 'capture'
    adds_to_state = True
    group_keys = GROUP_KEYS
    #: Settings whose default differs from the preconditioner's own.
    preset: ClassVar[dict[str, Any]] = {}
    __signature__ = FullSignature()

    def __init__(
        self,
        params: Any,
        *,
        model: nn.Module | None,
        rule: Rule,
        method: Preconditioner | Assignment,
        defaults: dict[str, Any],
        **options: Any,
    ) -> None:
        model, params = split_module(params, model)
        if model is None:
            raise ValueError(
                f'{type(self).__name__} needs the model that owns the parameters: pass model=..., '
                "or in a config set constructor='PrecondOptimWrapperConstructor' in optim_wrapper"
            )
        unknown = CurvatureOptions.unknown(options)
        reject_unexpected(type(self).__name__, unknown, CurvatureOptions.names())
        chosen = CurvatureOptions(**options)
        methods = [method] if isinstance(method, Preconditioner) else method.methods
        own = {name for each in methods for name in each.options()}
        self._layer_settings = {*own, *CurvatureOptions.names()}
        self._chosen: dict[Tensor, dict[str, Any]] = {}  # by the first parameter of a group
        super().__init__(params, rule, defaults)
        self._arms_itself = True
        self.curvature = Curvature(model, self.param_groups, method, type(self).__name__, chosen)
        self.curvature.dampings.complete(self.param_groups)
        self.defaults.update(self.curvature.dampings.default)  # of groups that are added later
        self._prepare_next_step()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, as in torch; a group that is added later is not attached.

        Raises:
            ValueError: As of other optimizers, and for entries that ask for preconditioning in a
                group that is added later.
        """
        if hasattr(self, 'curvature'):
            asked = [
                key
                for key in ('precondition', 'damping', 'input_positions')
                if param_group.get(key) not in (None, False, *self._values_now(key))
            ]
            if asked:
                raise ValueError(
                    f'a parameter group that is added later has {", ".join(asked)}, but takes the '
                    'plain rule: give the group to the constructor, or leave the entries out'
                )
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        self._chosen.update({p: _choice(group) for p in group['params'][:1]})

    def _values_now(self, key: str) -> list[Any]:
        """Dampings of the groups, which a copied group may have; other entries are requests."""
        held = (self.defaults, *self.param_groups) if key == 'damping' else ()
        return [group[key] for group in held if key in group]

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if group.get('damping') is not None:
            check_number('damping', group['damping'], open_low=True)
        if group.get('input_positions') is not None:
            group['input_positions'] = plain_numbers(group['input_positions'])
            check_count('input_positions', group['input_positions'])

    def _common_settings(self) -> dict[str, str]:
        place = (
            'pass it to the optimizer, or give the layers a method of their own in a list '
            "layers=[dict(match=dict(name='...'), preconditioner=dict(type=...))], in a "
            'config precondition=[...]'
        )
        return super()._common_settings() | dict.fromkeys(self._layer_settings, place)

    # ---------------------------------------------------------------- capture

    @property
    def loss_scale(self) -> Any:
        """Factor of the loss: None, a number, a tensor of one, or a `torch.amp.GradScaler`."""
        return self.curvature.capture.loss_scale

    @loss_scale.setter
    def loss_scale(self, scale: Any) -> None:
        self.take_loss_scale(scale)

    def take_loss_scale(self, scale: Any) -> None:
        """Takes the factor of the loss (see `loss_scale`)."""
        self.curvature.capture.scale_by(scale)

    @property
    def left_out(self) -> list[LeftOut]:
        """Modules that take the plain rule, with the reasons."""
        return self.curvature.left_out

    @property
    def dropped(self) -> int:
        """Number of samples that were dropped because they were not finite."""
        return self.curvature.dropped

    @property
    def monitor(self) -> Monitor | None:
        """Monitor that reports refreshes, or None."""
        return self.curvature.monitor

    @monitor.setter
    def monitor(self, monitor: Monitor | None) -> None:
        self.curvature.watch_refreshes(monitor)

    @property
    def auto_arm(self) -> bool:
        """True if the optimizer arms itself; if not, MMEngine's wrapper arms it."""
        return self._arms_itself

    def arm_by_hand(self) -> None:
        """Leaves `arm` and `disarm` to the caller, who brackets training steps with them."""
        self._arms_itself = False
        self.disarm()

    def arm(self) -> None:
        """Installs hooks on the layers that this step measures, if there are any."""
        self.curvature.arm(self.t)

    def disarm(self) -> None:
        """Removes the hooks; the measured sums stay until the step."""
        self.curvature.disarm()

    def _drop_measured(self) -> None:
        self.curvature.capture.drop()

    # ---------------------------------------------------------------- step

    @property
    def needs_loss(self) -> bool:
        """True if a step needs the loss: for ``damping_form='gradient'``."""
        return self.curvature.dampings.gradient is not None

    def _update_curvature(self) -> None:
        self._refuse_late_choices()
        if (control := self.curvature.dampings.gradient) is not None:
            gradients = list(self._gradients().values())
            device = next(iter(self.curvature.layers)).weight.device
            loss = self._use_loss("damping_form='gradient'", device)
            if gradients:
                control.record_gradients(gradients, loss)
        snapshots = self.curvature.update(self.t, self.param_groups, self._gradients)
        if not snapshots:
            return
        with matmul_precision('highest'):
            for snapshot in snapshots:
                rotate(snapshot, self.state, self.rule.linear_moments, self.rule.quadratic_moments)

    def _refuse_late_choices(self) -> None:
        """Raises ValueError if a group's choice of layers was changed after it was read."""
        for group in self.param_groups:
            first = next(iter(group['params']), None)
            chosen = self._chosen.get(first) if first is not None else None
            if chosen is not None and (now := _choice(group)) != chosen:
                key = next(key for key in ATTACHING if now[key] != chosen[key])
                raise ValueError(
                    f'{key} of a parameter group was changed from {chosen[key]} to {now[key]}, but '
                    f'{type(self).__name__} reads it when it is built: build another optimizer'
                )

    def _precondition(self, gradients: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        frozen = frozen_parts(self.curvature.layers, gradients)
        return self.curvature.precondition(gradients | frozen, self.param_groups)

    def _restore_updates(self, updates: dict[Tensor, Tensor]) -> None:
        self.curvature.restore(updates)

    def _apply_updates(self, batches: list[Batch], updates: dict[Tensor, Tensor]) -> None:
        # Frozen parts of a rotated layer had updates, for the others' sake; they do not move.
        trained = [batch.with_gradients() for batch in batches]
        batches = [batch for batch in trained if batch.params]
        if (control := self.curvature.dampings.gradient) is not None:
            scaled = self.rule.scales_by_rate
            rates = [b.group['lr'] if scaled else 1.0 for b in batches for _ in b.params]
            if rates:
                control.record_updates(
                    [updates[p] for batch in batches for p in batch.params], rates
                )
        super()._apply_updates(batches, updates)

    def _prepare_next_step(self) -> None:
        self.curvature.finish_step(self.t)
        if self._arms_itself:
            self.curvature.arm(self.t, at_forward=True)
        else:
            self.curvature.expect(self.t)

    # ---------------------------------------------------------------- state and report

    def state_dict(self) -> dict[str, Any]:
        """Torch's state with one more key, 'precond': plain tensors, numbers and strings.

        Under sharding='apply' only the first rank's state is complete and can be loaded.
        """
        state, curvature = super().state_dict(), self.curvature
        saved = state[checkpoint.CURVATURE_KEY] = curvature.state_dict(self.t)
        positions = checkpoint.rotated_positions(saved, curvature.layers, self._params)
        saved.update({checkpoint.ROTATED_KEY: positions} if positions else {})
        return state

    @property
    def _params(self) -> list[Tensor]:
        """Parameters in the order of their numbers in `state_dict`."""
        return [p for group in self.param_groups for p in group['params']]

    def check_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError for a state that `load_state_dict` refuses."""
        super().check_state_dict(state_dict)
        checkpoint.refuse_partial(state_dict.get(checkpoint.CURVATURE_KEY))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state; missing curvature is measured at the next step."""
        self.check_state_dict(state_dict)
        rest = {key: value for key, value in state_dict.items() if key != checkpoint.CURVATURE_KEY}
        own = [dict(group) for group in self.param_groups]
        super().load_state_dict(rest)
        for group, before in zip(self.param_groups, own, strict=True):
            for key in ATTACHING:  # layers are attached by this optimizer's groups
                group.pop(key, None)
                group.update({key: before[key]} if key in before else {})
        self.curvature.dampings.restore(self.param_groups, own)
        saved = state_dict.get(checkpoint.CURVATURE_KEY)
        restored = self.curvature.load_state_dict(saved)
        self.t = restored.steps
        for p in checkpoint.lost_parameters(saved, restored, self._params):
            self.state.pop(p, None)
        self._prepare_next_step()

    def _description(self) -> list[str]:
        return [*self.curvature.description(), *super()._description()]

    def summary(self) -> str:
        """One sentence: methods with their layers, parameters covered, forecast cost."""
        return self.curvature.summary(self.param_groups)

    def report(self) -> str:
        """The summary, and what is attached by stage of the model; `table` has every module."""
        return '\n'.join([self.summary(), self.curvature.overview(), *self._notes()])

    def table(self) -> str:
        """Table of all modules with parameters: preconditioner or reason, factors, memory."""
        return '\n'.join([self.curvature.table(), *self._notes()])

    def _notes(self) -> list[str]:
        names: dict[Tensor, str] = {layer.weight: layer.name for layer in self.curvature.layers}
        return self.rule.notes(self.param_groups, names)


def _choice(group: dict[str, Any]) -> dict[str, Any]:
    """A group's entries that choose layers, with their defaults."""
    return {'precondition': group.get('precondition', True), 'input_positions': None} | {
        key: group[key] for key in ATTACHING if key in group
    }
