"""Sharded refreshes: each rank refreshes its share of the layers, and the ranks exchange results.

With 'refresh' every rank receives all operators. With 'apply' a rank holds the operators of its
share only. It preconditions the gradients of that share, and the ranks exchange the directions at
every step. The first rank keeps copies of all operators in host memory, so that it can write
checkpoints without the other ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..curvature import Layer
from ..distributed import (
    broadcast_from,
    longest_first,
    rank,
    send_to_first,
    share_objects,
    sum_over_ranks,
    world_size,
)
from ..linalg import Operators
from ..preconditioners import Preconditioner
from .stack import LayerStack

SHARDINGS = ('none', 'refresh', 'apply')


class Sharding:
    """Distribution of the layers over ranks, and the exchanges among ranks.

    Args:
        mode: 'none', 'refresh' or 'apply'.
        archive: Whether the first rank keeps all operators for its checkpoints.
        ranks: Number of ranks; default: those that run.
    """

    def __init__(self, mode: str, archive: bool, ranks: int | None = None) -> None:
        self.requested = mode
        self.ranks = ranks or world_size()
        self.mode = mode if self.ranks > 1 else 'none'
        self.archive = archive

    def assign(self, chosen: Mapping[Layer, Preconditioner]) -> dict[Layer, int | None]:
        """Assigns an owner to each layer, by the cost of its refreshes and steps, or None for all.

        Raises:
            ValueError: If 'apply' is set for a method that acts after the rule.
        """
        for method in chosen.values():
            if self.requested == 'apply' and method.acts_after_rule:
                raise ValueError(
                    f"{type(method).__name__} works with sharding='refresh' or "
                    "'none', not 'apply': it acts on the rule's updates, so that every rank "
                    'needs all its operators'
                )
        if self.mode == 'none':
            return dict.fromkeys(chosen)
        costs = [self._layer_cost(layer, method) for layer, method in chosen.items()]
        return dict(zip(chosen, longest_first(costs, self.ranks), strict=True))

    def check_ranks(self) -> None:
        """Raises RuntimeError if the number of ranks has changed since the construction."""
        if self.requested != 'none' and self.ranks != world_size():
            raise RuntimeError(
                f'sharding={self.requested!r}: the optimizer was built for '
                f'{self.ranks} ranks and runs on {world_size()}; build it after '
                'torch.distributed.init_process_group'
            )

    def mine(self, stack: LayerStack) -> bool:
        """True if this rank refreshes a stack."""
        return stack.owner in (None, rank())

    def holds(self, stack: LayerStack) -> bool:
        """True if this rank has a stack's operators."""
        return self.mode != 'apply' or self.mine(stack)

    def agree(
        self, outcomes: Sequence[Sequence[bool]], error: Exception | None, device: torch.device
    ) -> list[list[bool]]:
        """Collects the outcomes of all ranks; an error on one rank ends all ranks.

        Raises:
            RuntimeError: If another rank had an error. A rank with an error raises that error.
        """
        if self.mode == 'none':
            if error is not None:
                raise error
            return [list(stack_outcomes) for stack_outcomes in outcomes]
        flags = torch.tensor(
            [
                float(error is not None),
                *(float(succeeded) for stack_outcomes in outcomes for succeeded in stack_outcomes),
            ],
            device=device,
        )
        sum_over_ranks([flags])
        failed, *known = flags.tolist()
        if error is not None:
            raise error
        if failed:
            raise RuntimeError('a refresh ended in an error on another rank, whose log has it')
        flag = iter(known)
        return [[next(flag) > 0 for _ in stack_outcomes] for stack_outcomes in outcomes]

    def exchange_operators(self, stacks: Sequence[LayerStack]) -> None:
        """Sends the operators of refreshed stacks to all ranks, or to the first rank's archive."""
        if self.mode == 'none' or self.mode == 'apply' and not self.archive:
            return
        forms = share_objects(
            [_operator_layouts(stack.operators) if self.mine(stack) else None for stack in stacks],
            [stack.owner or 0 for stack in stacks],
        )
        if self.mode == 'apply':
            for stack, known in zip(stacks, forms, strict=True):
                self._archive_operators(stack, known)
            return
        owned: list[tuple[int, Tensor]] = []
        for stack, known in zip(stacks, forms, strict=True):
            if not self.mine(stack):
                stack.receive(
                    {
                        slot: form(*map(stack.like.new_empty, shapes))
                        for slot, (form, shapes) in known.items()
                    }
                )
            owned += [(stack.owner or 0, tensor) for tensor in stack.operator_tensors.values()]
        broadcast_from([owner for owner, _ in owned], [tensor for _, tensor in owned])

    def exchange_directions(
        self, stacks: Sequence[LayerStack], directions: dict[Tensor, Tensor]
    ) -> None:
        """Receives the directions of layers that other ranks hold, in the dict."""
        if self.mode != 'apply':
            return
        owners: list[int] = []
        tensors: list[Tensor] = []
        for stack in stacks:
            for _, layer in stack.ready():
                if layer.weight not in directions:
                    continue
                for p in layer.parameters:
                    if p in directions:
                        # One layout on all ranks, so that sums over directions round equally.
                        directions[p] = (
                            directions[p].contiguous()
                            if self.mine(stack)
                            else torch.empty_like(
                                directions[p], memory_format=torch.contiguous_format
                            )
                        )
                        owners.append(stack.owner or 0)
                        tensors.append(directions[p])
        broadcast_from(owners, tensors)

    def is_whole(self) -> bool:
        """True if this rank's state dict has all operators."""
        return self.mode != 'apply' or rank() == 0 and self.archive

    def _layer_cost(self, layer: Layer, method: Preconditioner) -> float:
        """Approximate FLOPs of a step, including its share of a refresh."""
        if not layer.weight.requires_grad:
            return 0.0
        refresh = method.refresh_flops(layer)
        if self.mode == 'refresh':
            return refresh
        return method.apply_flops(layer) + refresh / method.refresh_interval

    @staticmethod
    def _archive_operators(stack: LayerStack, forms: dict[str, Any]) -> None:
        """Puts a copy of another rank's operators into the first rank's archive."""
        if not stack.owner:
            return
        archive: Operators = {}
        for slot, (form, shapes) in forms.items():
            held = (
                stack.operators[slot].tensors if slot in stack.operators else [None] * len(shapes)
            )
            arrived = [
                send_to_first(stack.owner, tensor, shape, stack.like)
                for tensor, shape in zip(held, shapes, strict=True)
            ]
            if rank() == 0:
                archive[slot] = form(*arrived)
        stack.receive(archive, archive=True)


def _operator_layouts(operators: Operators) -> dict[str, Any]:
    """Type and shapes of each operator."""
    return {
        slot: (type(operator), [tuple(tensor.shape) for tensor in operator.tensors])
        for slot, operator in operators.items()
    }
