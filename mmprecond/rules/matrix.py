"""Base class of rules with special updates for matrices, and AdamW for all else."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Iterator, Mapping
from typing import ClassVar

from torch import Tensor

from ..checks import check_count, first_names
from ..linalg import at_least_float32
from .adam import AdamW
from .base import Group, State

#: Matrices are stacked until they hold this many numbers (256 MB in float32).
STACKED = 2**26


class MatrixRule(AdamW):
    """AdamW, except for matrices, whose updates a subclass computes.

    A parameter with two or more dimensions is a matrix: its first dimension by all others. A matrix
    takes AdamW if it is too large, or if its group has ``precondition=False``. Weight decay is
    decoupled for all parameters.

    Args:
        max_dim: Larger matrices take AdamW; a subclass says which side counts.
    """

    elementwise: ClassVar[bool] = False

    def __init__(self, max_dim: int) -> None:
        super().__init__()
        check_count('max_dim', max_dim)
        self.max_dim = max_dim

    def key(self, group: Group, state: State) -> Hashable:
        return super().key(group, state), bool(group.get('precondition', True))

    @abstractmethod
    def too_large(self, shape: tuple[int, int], group: Group) -> str:
        """Name of the side of a matrix that is over `max_dim`, or ''."""

    @abstractmethod
    def matrix_updates(self, directions: list[Tensor], states: list[State], group: Group) -> Tensor:
        """Updates (k, o, i) of matrices, from directions (o, i) in at least float32."""

    @abstractmethod
    def state_shapes(self, shape: tuple[int, int], group: Group) -> dict[str, tuple[int, ...]]:
        """Shapes by name of the state tensors of a matrix."""

    def compute_updates(
        self, params: list[Tensor], directions: list[Tensor], states: list[State], group: Group
    ) -> list[Tensor]:
        updates: dict[int, Tensor] = {}
        batches: dict[tuple[int, int], list[int]] = {}
        plain = [k for k, p in enumerate(params) if self.fallback_reason(p, group) is not None]
        for k in sorted(set(range(len(params))) - set(plain)):
            batches.setdefault(matrix_shape(params[k]), []).append(k)
        if plain:
            updates.update(
                zip(
                    plain,
                    super().compute_updates(
                        [params[k] for k in plain],
                        [directions[k] for k in plain],
                        [states[k] for k in plain],
                        group,
                    ),
                    strict=True,
                )
            )
        for shape, members in batches.items():
            for part in _chunks(members, shape):
                matrices = [_upcast(directions[k].reshape(shape)) for k in part]
                results = self.matrix_updates(matrices, [states[k] for k in part], group)
                for k, result in zip(part, results, strict=True):
                    updates[k] = result.to(params[k].dtype).reshape(params[k].shape)
        return [updates[k] for k in range(len(params))]

    def check_state(self, param: Tensor, state: State, group: Group) -> None:
        if self.fallback_reason(param, group) is not None:
            shapes: dict[str, tuple[int, ...]] = {'exp_avg': tuple(param.shape)}
        else:
            shapes = self.state_shapes(matrix_shape(param), group)
        for name, shape in shapes.items():
            if name not in state or tuple(state[name].shape) != shape:
                has = tuple(state[name].shape) if name in state else 'missing'
                raise ValueError(
                    f'the saved {name} of a parameter of shape {tuple(param.shape)} is {has}, not '
                    f'{shape}: it was saved under another rule or other settings; set them as they '
                    'were, or start afresh from the weights alone (load_from without resume)'
                )

    def fallback_reason(self, param: Tensor, group: Group) -> str | None:
        """Reason why a parameter takes AdamW ('' if it is no matrix), or None."""
        if param.dim() < 2 or not param.numel():
            return ''
        if not group.get('precondition', True):
            return 'precondition=False'
        reason = self.too_large(matrix_shape(param), group)
        return f'{reason} is over max_dim={self.max_dim}' if reason else None

    def notes(self, groups: list[Group], names: Mapping[Tensor, str]) -> list[str]:
        excluded: dict[str, list[str]] = {}
        for group in groups:
            for p in group['params']:
                reason = self.fallback_reason(p, group)
                if reason:
                    size = ' x '.join(map(str, p.shape))
                    name = f'{names[p]} ({size})' if p in names else f'one of {size}'
                    excluded.setdefault(reason, []).append(name)
        return [
            f'{len(members)} matrices take AdamW, as {reason}: {first_names(members)}'
            for reason, members in excluded.items()
        ]


def matrix_shape(param: Tensor) -> tuple[int, int]:
    """Numbers of rows and columns of a parameter as a matrix."""
    return param.shape[0], param.numel() // param.shape[0]


def _upcast(matrix: Tensor) -> Tensor:
    """The matrix in at least float32."""
    return matrix.to(at_least_float32(matrix.dtype))


def _chunks(members: list[int], shape: tuple[int, int]) -> Iterator[list[int]]:
    """Parts of a batch that may be stacked."""
    count = max(1, STACKED // (shape[0] * shape[1]))
    for start in range(0, len(members), count):
        yield members[start : start + count]
