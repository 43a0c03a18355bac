"""SGDPH: SGD with a partial Hessian, on the 1-D parameters of normalisation layers and biases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..checks import (
    argument_names,
    check_choice,
    check_count,
    check_number,
    reject_unexpected,
)
from ..curvature import Eager
from ..rules.partial_hessian import PartialHessianSGDM
from ..second_order import (
    detach_gradients,
    differentiate_again,
    fill_missing,
    is_vector,
    mean_over_ranks,
    refuse_single_backward,
)
from .rule_optimizer import RuleOptimizer, split_module
from .settings import takes_settings

REFRESHES = ('round_robin', 'all')


class SGDPH(RuleOptimizer):
    """SGD with momentum that divides updates of 1-D parameters by a diagonal of the Hessian.

    For a 1-D parameter p with gradient g, d is the moving average of ``|d<g, 1> / dp|``. These are
    the row sums of the parameter's Hessian block. They equal its diagonal if the block is diagonal
    (in the last such layer before a separable loss), and approximate it elsewhere.

    On steps where `needs_graph` is true, call ``loss.backward(create_graph=True)``. MMEngine's
    wrapper does so. The dtype must be float32 or float64, without automatic mixed precision.

    Source: thesis chapter 2, (2.3)-(2.7). The averages, the round-robin, the factor
    (1 - momentum^n), the plain rule for the last 1-D parameter and ``decay='published'`` follow
    the published code.

    Args:
        params: Parameters or groups, or the module itself.
        lr: Learning rate.
        momentum: Heavy-ball momentum.
        weight_decay: L2 decay. For 1-D parameters it is added after the division by the Hessian;
            for all others see `decay`.
        decay: Place of the weight decay of all other parameters. 'published' adds it to the
            gradient, so that it enters the momentum, and is 1 / (1 - momentum) times as strong as
            printed. 'decoupled' adds it after the momentum (2.7).
        model: The module, to refuse modules without second derivatives in advance.
        hessian_decay: Weight of the old diagonal, in [0, 1).
        hessian_lr: tau.
        eps: Added to the diagonal.
        refresh: 'round_robin' refreshes one 1-D parameter at a time, as published. 'all' refreshes
            all of them, from `probes` products in which each parameter's block has a random sign.
        interval: Steps between refreshes.
        probes: Number of products in a refresh of 'all'.
        settings: 'default', or 'published' for the literal settings of the source.
        **unexpected: Other arguments, which are refused.

    Raises:
        ValueError: If a value is out of range, there is no 1-D parameter, or a module of the model
            has no second derivative.
    """

    rule: PartialHessianSGDM
    needs = 'graph'
    adds_to_state = True

    published: ClassVar[dict[str, Any]] = dict(
        hessian_decay=0.9,
        hessian_lr=1e-3,
        eps=1e-4,
        decay='published',
        refresh='round_robin',
        interval=1,
        probes=4,
    )

    @takes_settings
    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        model: nn.Module | None = None,
        hessian_decay: float = 0.9,
        hessian_lr: float = 1e-3,
        eps: float = 1e-4,
        decay: str = 'published',
        refresh: str = 'round_robin',
        interval: int = 1,
        probes: int = 4,
        **unexpected: Any,
    ) -> None:
        reject_unexpected('SGDPH', unexpected, argument_names(SGDPH))
        model, params = split_module(params, model)
        if model is not None:
            refuse_single_backward(model, 'SGDPH')
        check_number('hessian_decay', hessian_decay, high=1)
        check_number('hessian_lr', hessian_lr)
        check_number('eps', eps, open_low=True)
        check_choice('refresh', refresh, REFRESHES)
        check_count('interval', interval)
        check_count('probes', probes)
        self.hessian_decay = hessian_decay
        self.refresh = refresh
        self.interval = interval
        self.probes = probes
        super().__init__(
            params,
            PartialHessianSGDM(hessian_lr, eps, decay),
            dict(lr=lr, momentum=momentum, weight_decay=weight_decay),
        )
        self.vectors = [
            p
            for group in self.param_groups
            for p in group['params']
            if is_vector(p) and p.requires_grad and p.numel()
        ]
        if not self.vectors:
            raise ValueError(
                'SGDPH found no 1-D parameter that is trained; for a network without normalisation '
                'call mmprecond.optimizers.weight_norm(model) before, or in a config '
                "give the backbone conv_cfg=dict(type='WeightNormConv2d')"
            )
        self._measured = False
        self._eager = Eager()
        self._filled: set[Tensor] = set()
        self._prepare_next_step()

    @property
    def needs_graph(self) -> bool:
        """True if this step's backward pass must be differentiable."""
        return self.t % self.interval == 0

    def _drop_measured(self) -> None:
        self._measured = False

    def measure(self) -> None:
        """Computes the Hessian from the gradients' graph and frees the graph.

        `step` calls the method if nobody else did. With several ranks it averages gradients and
        products over them, so backward passes must run without synchronisation (`no_sync`).
        """
        if self._measured:
            return
        self._prepare_hessians()
        self._filled = fill_missing(self.param_groups)
        rows = self._row_sums() if self.needs_graph else {}
        mean_over_ranks([*detach_gradients(self.param_groups), *rows.values()])
        for p, row in rows.items():
            hessian = self.state[p].get('hessian')
            if hessian is not None:  # a NaN would never leave the average
                known = torch.where(row.isfinite(), row.abs(), hessian)
                hessian.lerp_(known, 1 - self.hessian_decay)
        self._measured = True

    def _prepare_hessians(self) -> None:
        """Every 1-D parameter but the last one has a Hessian, of its own dtype and device."""
        for p in self.vectors[:-1]:
            state = self.state[p]
            if 'hessian' not in state:
                state['hessian'] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state['hessian'] = state['hessian'].to(p.device, p.dtype)

    def table(self) -> str:
        """Summary of the preconditioned parameters in one line."""
        count = sum(p.numel() for p in self.vectors[:-1])
        return (
            f'{len(self.vectors) - 1} 1-D parameters ({count} numbers) are divided by their '
            f'Hessian diagonal, refreshed {self.refresh}; the last one and all others take '
            'plain SGD with momentum'
        )

    def state_dict(self) -> dict[str, Any]:
        """Torch's state with the number of steps."""
        return {**super().state_dict(), 'steps': self.t}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state; a Hessian that it lacks, as torch's own SGD's does, starts anew."""
        super().load_state_dict({k: v for k, v in state_dict.items() if k != 'steps'})
        self.t = int(state_dict.get('steps', 0))
        self._prepare_next_step()

    def _prepare_next_step(self) -> None:
        """Compiled code has no second derivatives: a model runs eagerly where they are needed."""
        if self.needs_graph:
            self._eager.enter()
        else:
            self._eager.leave()

    def _update_curvature(self) -> None:
        self.measure()
        self._measured = False
        refreshes = 1 if self.refresh == 'all' else len(self.vectors)
        self.rule.begin_cycle((self.t + 1) // (refreshes * self.interval) + 1)

    def _row_sums(self) -> dict[Tensor, Tensor]:
        """Products of Hessian blocks with ones, for the parameters of this refresh."""
        if self.refresh == 'round_robin':
            param = self.vectors[self.t // self.interval % len(self.vectors)]
            return {param: self._products([param], [1.0])[0]} if param.grad is not None else {}
        present = [p for p in self.vectors if p.grad is not None]
        generator = torch.Generator().manual_seed(self.t)
        rows = [torch.zeros_like(p) for p in present]
        for probe in range(self.probes):
            signs = (torch.randint(2, (len(present),), generator=generator) * 2 - 1).tolist()
            products = self._products(present, signs, keep=probe + 1 < self.probes)
            for row, product, sign in zip(rows, products, signs, strict=True):
                row += product * (sign / self.probes)
        return dict(zip(present, rows, strict=True))

    def _products(
        self, params: Sequence[Tensor], signs: Sequence[float], keep: bool = False
    ) -> list[Tensor]:
        """Gradients of ``sum sign <g, 1>`` over the parameters, with respect to them."""
        used: list[tuple[Any, float]] = [
            (p.grad, sign) for p, sign in zip(params, signs, strict=True) if p not in self._filled
        ]
        if not all(g.requires_grad for g, _ in used):
            raise ValueError(
                'the gradients have no graph; call loss.backward(create_graph=True) '
                'where optimizer.needs_graph is true, and checkpoint with use_reentrant=False'
            )
        if not used:
            return [torch.zeros_like(p) for p in params]
        ones = [torch.full_like(g, sign) for g, sign in used]
        with torch.enable_grad():
            products = differentiate_again([g for g, _ in used], params, ones, keep)
        return [
            torch.zeros_like(p) if product is None else product
            for p, product in zip(params, products, strict=True)
        ]
