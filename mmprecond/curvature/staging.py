"""Staging of measured sums: they count once the backward pass reaches the weight's gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from .calls import Tap
from .form import Slots
from .layer import Layer
from .statistic import Statistic


@dataclass
class Staged:
    """Sums over the calls of one layer since the last step.

    Attributes:
        sums: Sums by tensor name, shaped as the layer's `shapes`.
        rows: Number of input rows.
        calls: Number of calls with rows.
        slots: Where columns were placed, by tensor name.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    rows: int = 0
    calls: int = 0
    slots: dict[str, Slots] = field(default_factory=dict)
    _gradient: Tensor | None = None
    _version: int = 0

    def add(self, sums: Mapping[str, Tensor], rows: int, calls: int = 0) -> None:
        """Adds the sums over so many rows, of so many calls."""
        for key, total in sums.items():
            if key in self.sums:
                self.sums[key] += total
            else:
                self.sums[key] = total
        self.rows += rows
        self.calls += calls

    def note_gradient(self, gradient: Tensor | None) -> None:
        """Remembers the weight's gradient that belongs to the sums."""
        self._gradient, self._version = gradient, 0 if gradient is None else gradient._version

    def was_cleared(self, gradient: Tensor | None) -> bool:
        """True if the weight's gradient was cleared since, by None or by zeros."""
        if gradient is None:
            return True
        untouched = gradient is self._gradient and gradient._version == self._version
        return not untouched and not bool(gradient.any())


class Visit:
    """One forward call whose output's gradient is awaited.

    Attributes:
        saved: The node that holds the call's tensors, until its graph is freed; or None.
        counted: True once a backward pass through the call counted.
    """

    def __init__(self, saved: Tensor) -> None:
        self.saved: Tensor | None = saved
        self.counted = False

    def count(self) -> None:
        """Notes that a backward pass through the call counts."""
        self.counted = True

    def take(self) -> Tensor | None:
        """The node; it stays where the graph is kept for another backward pass."""
        saved = self.saved
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            self.saved = None
        return saved


@dataclass
class _Pending:
    """Sums of one layer in one backward pass that has not reached its weight's gradient."""

    sums: Staged = field(default_factory=Staged)
    columns: list[tuple[Statistic, str, int, Tensor]] = field(default_factory=list)
    visits: list[Visit] = field(default_factory=list)


class Staging:
    """Sums of the layers since the last step.

    A backward pass is told by autograd's number of its graph task. What it measures of a layer
    waits until the same pass accumulates into the weight's ``.grad``; at its end the rest is
    forgotten. So `torch.autograd.grad` and ``backward(inputs=[x])`` leave nothing behind.

    Attributes:
        staged: Sums that count, by layer.
    """

    def __init__(self) -> None:
        self.staged: dict[Layer, Staged] = {}
        self._draws = torch.Generator()
        self._signs = torch.Generator()
        self._seed: int | None = None
        self._share = (0, 1)
        self._pending: dict[tuple[Layer, int], _Pending] = {}
        self._listeners: dict[Layer, RemovableHandle] = {}
        self._tasks: set[int] = set()

    def seed(self, seed: int, share: tuple[int, int]) -> None:
        """Seeds what is drawn; the micro-batches of one step have one seed."""
        self._share = share
        if seed != self._seed:
            self._seed = seed
            self._signs.manual_seed(seed ^ 0x5BD1E995)  # other numbers than the positions'

    def restart(self) -> None:
        """Forgets what was measured and drawn."""
        self._seed = None
        self.drop()

    def drop(self) -> None:
        """Forgets what was measured, and what is awaited."""
        self.staged.clear()
        self._pending.clear()
        for listener in self._listeners.values():
            listener.remove()
        self._listeners.clear()

    def listen(self, layer: Layer) -> None:
        """Waits for the gradient of a layer's weight, which is trained."""
        if layer not in self._listeners:
            hook = Tap(lambda _: self.commit(layer))
            self._listeners[layer] = layer.weight.register_post_accumulate_grad_hook(hook)

    def drop_cleared(self) -> None:
        """Forgets what was measured if all its gradients were cleared since."""
        if self.staged and all(
            staged.was_cleared(layer.weight.grad) for layer, staged in self.staged.items()
        ):
            self.drop()

    def add(
        self,
        visit: Visit,
        layer: Layer,
        sums: Mapping[str, Tensor],
        rows: int,
        statistics: Sequence[Statistic],
    ) -> None:
        """Adds the sums of a call, measured in the backward pass that runs now."""
        task = torch._C._current_graph_task_id()
        pending = self._pending.setdefault((layer, task), _Pending())
        placed = {
            key: (statistic, key, width, sums[key])
            for statistic in statistics
            if statistic.form.is_placed
            for key, (_, _, width) in layer.shapes(statistic).items()
        }
        pending.columns.extend(placed.values())
        pending.visits.append(visit)
        rest = {key: value for key, value in sums.items() if key not in placed}
        pending.sums.add(rest, rows, calls=int(rows > 0))  # empty calls change no draws

    def draws(self, layer: Layer) -> torch.Generator:
        """Generator for a call of a layer, seeded by the number of its calls that count before.

        Passes that do not count, or that fail, therefore change no draws.
        """
        pending = self._pending.get((layer, torch._C._current_graph_task_id()))
        staged = self.staged.get(layer)
        calls = (pending.sums.calls if pending else 0) + (staged.calls if staged else 0)
        seed = layer.seed_of(f'draws {self._seed} {calls}')
        return self._draws.manual_seed(seed)

    def begin(self) -> None:
        """Opens the backward pass that runs now, before its first measurement."""
        task = torch._C._current_graph_task_id()
        if task not in self._tasks:
            self._tasks.add(task)
            engine = torch.autograd.Variable._execution_engine
            engine.queue_callback(lambda: self._end(task))

    def commit(self, layer: Layer) -> None:
        """Counts what the backward pass that runs now measured of a layer."""
        task = torch._C._current_graph_task_id()
        pending = self._pending.pop((layer, task), None)
        if pending is None:
            return
        staged = self.staged.setdefault(layer, Staged())
        for statistic, key, width, columns in pending.columns:
            slots = self._slots(staged, key, width)
            staged.add({key: statistic.form.stage(columns, slots)}, 0)
        staged.add(pending.sums.sums, pending.sums.rows, pending.sums.calls)
        staged.note_gradient(layer.weight.grad)
        for visit in pending.visits:
            visit.count()

    def _end(self, task: int) -> None:
        self._tasks.discard(task)
        for key in [key for key in self._pending if key[1] == task]:
            del self._pending[key]

    def _slots(self, staged: Staged, key: str, width: int) -> Slots:
        """Slots for the columns of a statistic, from this rank's share of them on."""
        if key not in staged.slots:
            rank, ranks = self._share
            staged.slots[key] = Slots(width, rank * width // ranks, self._signs)
        return staged.slots[key]
