"""Curvature of a model: statistics of its layers, their operators, preconditioned gradients."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..curvature import Capture, Layer, Statistic, unwrap_measured
from ..distributed import rank, world_size
from ..linalg import matmul_precision
from ..preconditioners import Preconditioner
from . import checkpoint, report
from .assignment import Assignment
from .basis import BasisSnapshot, snapshot
from .clipping import clip_norm, kl_clip
from .coverage import assign_methods
from .damping import Dampings
from .directions import recover_norms, transform, transform_all
from .failures import FailurePolicy
from .inspection import LayerView, view_layer
from .intervals import IntervalControl
from .memory import check_memory_budget, forecast, held_megabytes
from .monitor import Monitor
from .options import CurvatureOptions
from .overview import overview
from .refresh import finish_refresh, start_refresh
from .samples import SampleCollector, by_hooks, to_host
from .schedule import Schedule
from .sharding import Sharding
from .stack import LayerStack
from .warm_up import WarmUp

logger = logging.getLogger('mmprecond')


class Curvature:
    """Layers of a model with their statistics, operators and schedule.

    Args:
        model: The model, wrapped in DistributedDataParallel or not.
        groups: The optimizer's parameter groups.
        method: The preconditioner of every supported layer, or one for each by an assignment.
        owner: The optimizer's name, for errors.
        options: Settings for all layers.

    Attributes:
        layers: Stack of each preconditioned layer.
        stacks: All stacks, each once.
        coverage: What is preconditioned of the model, and what is not.
        left_out: Modules that take the plain rule, with the reasons.
        dampings: Dampings of the layers, which the parameter groups may change.
        schedule: Steps at which layers are measured and refreshed.
        capture: Hooks, with the sums that they measured since the last step.
        warm_up: Progress of the learning rate's warm-up.
        monitor: Monitor that reports refreshes, or None (see `watch_refreshes`).

    Raises:
        ValueError: If the model has no supported layer, or if its statistics and operators do
            not fit into memory.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[dict[str, Any]],
        method: Preconditioner | Assignment,
        owner: str,
        options: CurvatureOptions,
    ) -> None:
        self.options = options
        self.sharding = Sharding(options.sharding, options.save_curvature)
        self.monitor: Monitor | None = None
        self.warm_up = WarmUp()
        self._failures = FailurePolicy()
        own_model = unwrap_measured(model)
        self.model_name = type(own_model).__name__
        self.coverage = assign_methods(own_model, groups, method, owner, options)
        methods, self.left_out = self.coverage.methods, self.coverage.left_out
        self._owners = self.sharding.assign(methods)
        self.layers: dict[Layer, LayerStack] = {}
        self.stacks: list[LayerStack] = []
        for layer, chosen in methods.items():
            self._add_layer(layer, chosen)
        self.dampings = Dampings(groups, methods)
        self.schedule = Schedule(methods, options.stagger, options.start_step)
        self._intervals = IntervalControl(
            options.intervals, options.overhead, options.start_step, methods
        )
        if options.check_memory:
            check_memory_budget(self.layers, self.sharding, owner)
        self.capture = Capture(partial(matmul_precision, options.matmul_precision))
        self._samples = SampleCollector(self.capture, options.fallback == 'gradient')

    @property
    def dropped(self) -> int:
        """Number of samples that were dropped because they were not finite."""
        return self._samples.dropped

    # ---------------------------------------------------------------- construction

    def _add_layer(self, layer: Layer, method: Preconditioner) -> None:
        """Puts a layer into the stack with an equal key, or into a new stack."""
        stack = LayerStack(method, layer, self._owners[layer])
        self.layers[layer] = next((known for known in self.stacks if known.key == stack.key), stack)
        self.stacks = list(dict.fromkeys(self.layers.values()))

    def reassign(self, layer: Layer, method: Preconditioner) -> None:
        """Gives a layer another preconditioner and restarts its statistics."""
        self.layers[layer].leave(layer)
        self._add_layer(layer, method)
        self.layers[layer].change_intervals(self._intervals.applied)

    def _take_gradients(self, layers: Iterable[Layer]) -> list[Layer]:
        """Gives layers that no hook sees their method on the gradient matrix; returns those."""
        taken = []
        for layer in layers:
            if (method := self.layers[layer].original.with_gradient_source()) is not None:
                self.reassign(layer, method)
                taken.append(layer)
        return taken

    def precompute(
        self, layer: Layer, method: Preconditioner, statistics: dict[str, Tensor]
    ) -> None:
        """Gives a layer a preconditioner with known statistics, which are never measured.

        Args:
            layer: The layer.
            method: The preconditioner.
            statistics: Statistics of the layer (b, n, m) by tensor name.
        """
        self.reassign(layer, method)
        self.layers[layer].merge({layer: statistics})

    def _change_intervals(self) -> None:
        """Captures and refreshes at other intervals from the next step on."""
        for stack in self.stacks:
            stack.change_intervals(self._intervals.applied)
        methods = {layer: stack.method for layer, stack in self.layers.items()}
        # While times are measured, all layers are captured at the same steps.
        self.schedule.plan(methods, self.options.stagger and not self._intervals.searching)

    def watch_refreshes(self, monitor: Monitor | None) -> None:
        """Sets the monitor that reports refreshes; None stops the reports."""
        self.monitor = monitor

    # ---------------------------------------------------------------- measuring

    def due(self, step: int) -> dict[Layer, tuple[Statistic, ...]]:
        """Layers that a step measures, with the statistics to measure."""
        return {
            layer: stack.kept
            for layer, stack in self.layers.items()
            if self.schedule.captures(stack, layer, step)
        }

    def arm(self, step: int, *, at_forward: bool = False) -> None:
        """Installs hooks on the layers that a step measures, if there are any.

        Args:
            step: The step.
            at_forward: True to put them there when the step's forward pass begins.
        """
        seed, share = step * world_size() + rank(), (rank(), world_size())
        self.capture.arm(by_hooks(self.due(step)), seed, share, at_forward=at_forward)

    def expect(self, step: int) -> None:
        """Prepares compiled models for a step that is armed later (see `Capture.expect`)."""
        self.capture.expect(by_hooks(self.due(step)))

    def disarm(self) -> None:
        """Removes the hooks; the measured sums stay until the step."""
        self.capture.disarm()

    def update(
        self,
        step: int,
        groups: Sequence[Mapping[str, Any]],
        gradients: Callable[[], Mapping[Tensor, Tensor]] = dict,
    ) -> list[BasisSnapshot]:
        """Takes the statistics measured for a step, then refreshes the operators that are due.

        Args:
            step: The step.
            groups: The optimizer's parameter groups, whose learning rates may be warming up.
            gradients: Function that returns the gradients by parameter.

        Returns:
            Snapshots, from before the refresh, of stacks whose basis may change (see `rotate`).
        """
        if self.monitor is not None:
            self.monitor.begin()
        self._intervals.begin(step)
        measured, matrices = self.start_merge(step)
        known = all(self.layers[layer].holds(layer) for layer in measured)
        if measured and (not known or self.schedule.stacks_to_refresh(self.stacks, step)):
            self.finish_merge()
        matrices += self._take_gradients(self._samples.take_uncalled())
        if matrices:
            with matmul_precision(self.options.matmul_precision):
                self._samples.take_matrices(matrices, self.layers, step, gradients())
        self.warm_up.update(groups)
        if self._intervals.searching:
            self._intervals.note(
                bool(measured or matrices),
                bool(self.schedule.stacks_to_refresh(self.stacks, step)),
            )
        return self.refresh(step, groups)

    def start_merge(self, step: int) -> tuple[list[Layer], list[Layer]]:
        """Starts to sum what hooks measured for a step over ranks.

        Returns:
            The layers that hooks measured, and those whose gradient matrix is due.
        """
        due = self.due(step)
        measured = list(by_hooks(due))
        if due:
            self.schedule.recapture(())  # this step includes the pending recaptures
        if measured:
            self._samples.start(measured, self.layers, step)
        return measured, [layer for layer, kept in due.items() if kept[0].of_matrix]

    def finish_merge(self) -> None:
        """Merges the statistics of the step, whose sums over ranks may be under way."""
        self._samples.finish()

    def finish_step(self, step: int) -> None:
        """Ends a step and prepares the next one.

        Statistics that no refresh needed are merged here: their sums over ranks travel during the
        rest of the step.

        Args:
            step: The next step.
        """
        self.finish_merge()
        self._samples.finish_late()
        if self._intervals.end(step):
            self._change_intervals()

    def refresh(self, step: int, groups: Sequence[Mapping[str, Any]] = ()) -> list[BasisSnapshot]:
        """Refreshes the operators that are due; returns the same snapshots as `update`."""
        due = self.schedule.stacks_to_refresh(self.stacks, step)
        if not due:
            return []
        self.sharding.check_ranks()
        self.dampings.advance()
        snapshots = [saved for stack, _ in due if (saved := snapshot(stack)) is not None]
        error: Exception | None = None
        outcomes = [[False] * len(positions) for _, positions in due]
        try:
            with matmul_precision('highest'):
                outcomes = self._refresh_own_stacks(due, self.dampings.current(groups))
        except Exception as raised:  # the other ranks must hear of it first
            error = raised
        agreed = self.sharding.agree(outcomes, error, next(iter(self.layers)).weight.device)
        for (stack, positions), succeeded in zip(due, agreed, strict=True):
            self._failures.count(stack, positions, succeeded)
        self.sharding.exchange_operators([stack for stack, _ in due])
        if self.monitor is not None:
            held = held_megabytes(self.stacks, self.sharding)
            self.monitor.refreshed(step, due, held, report.count(self.layers, self.left_out))
        return snapshots

    def _refresh_own_stacks(
        self, due: Sequence[tuple[LayerStack, list[int]]], dampings: Mapping[Layer, float]
    ) -> list[list[bool]]:
        """Refreshes this rank's stacks, with one wait for the device; returns the successes."""
        reached = self.warm_up.reached
        started = [
            start_refresh(stack, positions, reached, dampings)
            if self.sharding.mine(stack)
            else None
            for stack, positions in due
        ]
        flags = iter(to_host([outcome for outcome in started if outcome is not None]))
        return [
            [False] * len(positions)
            if outcome is None
            else finish_refresh(
                stack, positions, [bool(next(flags)) for _ in positions], reached, dampings
            )
            for (stack, positions), outcome in zip(due, started, strict=True)
        ]

    # ---------------------------------------------------------------- directions and updates

    def precondition(
        self, gradients: Mapping[Tensor, Tensor], groups: Iterable[Mapping[str, Any]]
    ) -> dict[Tensor, Tensor]:
        """Returns the directions: gradients, preconditioned where a layer has an operator.

        Args:
            gradients: Gradients by parameter.
            groups: The optimizer's parameter groups; a KL clip reads their learning rates.
        """
        directions = dict(gradients)
        with matmul_precision(self.options.matmul_precision):
            held = [stack for stack in self.stacks if self.sharding.holds(stack)]
            batches = transform_all(held, directions)
        recover_norms(batches, self.warm_up.reached)
        for batch in batches:
            batch.write(directions)
        self.sharding.exchange_directions(self.stacks, directions)
        self._samples.hold_back(directions)
        if self.monitor is not None:
            self.monitor.record_directions(gradients, directions)
        self._clip(gradients, directions, groups)
        return directions

    def restore(self, updates: dict[Tensor, Tensor]) -> None:
        """Transforms the rule's updates, in the dict, for methods that act after the rule."""
        with matmul_precision(self.options.matmul_precision):
            for stack in self.stacks:
                if stack.method.acts_after_rule:
                    for batch in transform(stack, stack.method.restore, updates):
                        batch.write(updates)

    def _clip(
        self,
        gradients: Mapping[Tensor, Tensor],
        directions: dict[Tensor, Tensor],
        groups: Iterable[Mapping[str, Any]],
    ) -> None:
        """Clips by the methods' KL bound, then by `clip_update`."""
        methods = {stack: stack.method.clip for stack in self.stacks if stack.method.clip}
        if methods:
            layers = [layer for stack in methods for _, layer in stack.ready()]
            rates = {p: float(group['lr']) for group in groups for p in group['params']}
            # Where methods of several bounds are mixed, the least counts.
            kl_clip(min(methods.values()), layers, rates, gradients, directions)
        if self.options.clip_update is not None:
            clip_norm(directions, self.options.clip_update)

    # ---------------------------------------------------------------- state and report

    def state_dict(self, steps: int) -> dict[str, Any]:
        """State after a number of steps: tensors, numbers and strings by parameter name."""
        complete = self.options.save_curvature
        state = checkpoint.export(self.layers, self.sharding, steps, self.warm_up.share, complete)
        state |= self.schedule.state_dict() | self._intervals.state_dict()
        return state | self.dampings.state_dict()

    def load_state_dict(self, saved: Mapping[str, Any] | None) -> checkpoint.Restored:
        """Loads a state; missing statistics are measured at the next step.

        Returns:
            Number of steps taken, layers whose state does not fit, layers whose moments are lost.
        """
        self.capture.restart()
        if self.options.fallback == 'gradient':
            self._take_gradients(checkpoint.of_gradients(self.layers, saved))
        restored = checkpoint.restore(self.layers, self.sharding, saved)
        self.warm_up.restore(restored.share)
        self.schedule.restart(restored.start)
        self.dampings.load_state_dict(saved)
        if self._intervals.load_state_dict(saved):
            self._change_intervals()
        # These layers had statistics in the saved run, so they are measured at once.
        self.schedule.recapture(
            layer for layer in restored.unfit if self.layers[layer].method.refresh_on_first_sample
        )
        return restored

    def summary(self, groups: Iterable[Mapping[str, Any]]) -> str:
        """One sentence: methods with their layers, parameters covered, forecast cost."""
        return report.summary(self.model_name, self.layers, self.coverage, self.sharding, groups)

    def description(self) -> list[str]:
        """A line for each method, with its number of layers and its intervals."""
        return report.describe_methods(self.layers) + self.options.notes()

    def overview(self) -> str:
        """Lines for the log: modules that are left out, the stages of the model, the norms."""
        return overview(self.layers, self.coverage, self.sharding)

    def table(self) -> str:
        """Table of all modules with parameters: preconditioner or reason, factors, memory."""
        return report.table(self.layers, self.coverage, self.sharding)

    def layer(self, name: str) -> LayerView:
        """Copies of one layer's statistics and operators, to look at.

        Args:
            name: Name of the module or of its weight: 'backbone.layer4.0.conv1'.

        Raises:
            ValueError: If no such layer is preconditioned, or it was never measured.
        """
        return view_layer(self.layers, name)

    def forecast(self) -> dict[torch.device, tuple[float, float]]:
        """Megabytes by device: memory kept between steps, and extra memory of a refresh."""
        return forecast(self.layers, self.sharding)
