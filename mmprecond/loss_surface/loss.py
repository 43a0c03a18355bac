"""A loss as a function of a model's trainable parameters, with its first and second derivatives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..checks import check_choice
from ..graph import graph_nodes
from ..linalg import flatten_like, unflatten_like
from .randomness import isolated_rng

#: Modes of batch normalisation and dropout.
MODES = ('eval', 'train')


class OutputLoss(NamedTuple):
    """A batch's loss, as a criterion of a network's outputs.

    Attributes:
        network: Module that maps inputs to outputs (samples, ...); it has the model's parameters.
        criterion: Function of outputs and targets that returns the batch's loss, a scalar.
        inputs: Argument of the network.
        targets: Second argument of the criterion.
    """

    network: nn.Module
    criterion: Callable[[Any, Any], Tensor]
    inputs: Any
    targets: Any


class Loss:
    """A loss on fixed batches, as a function of a model's trainable parameters.

    The value is the mean over the batches. Each evaluation starts from the same random state and
    leaves the model's buffers as they were, so that equal parameters give equal values.

    Args:
        model: The model. Its trainable parameters, flattened and joined, are a vector (n,).
        closures: A function without arguments for each batch. It returns the loss of the batch, a
            scalar with a graph.
        mode: 'eval' (default): batch normalisation by running statistics, no dropout. 'train': by
            the statistics of each batch, with dropout. The model's own mode comes back.
        output_losses: The same losses as criteria of outputs, which the Gauss-Newton matrix needs.

    Raises:
        ValueError: If the model has no trainable parameter, or there is no batch.
    """

    def __init__(
        self,
        model: nn.Module,
        closures: Sequence[Callable[[], Tensor]],
        mode: str = 'eval',
        output_losses: Sequence[OutputLoss] = (),
    ) -> None:
        check_choice('mode', mode, MODES)
        self.model = model
        self.closures = tuple(closures)
        self.output_losses = tuple(output_losses)
        self.mode = mode
        self.params: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        if not self.params:
            raise ValueError('the model has no trainable parameter')
        if not self.closures:
            raise ValueError('a loss needs at least one batch')
        half = [str(p.dtype) for p in self.params if p.dtype.itemsize < 4]
        if half:
            raise ValueError(f'parameters are in {half[0]}; derivatives need float32 or float64')
        self.size = sum(p.numel() for p in self.params)

    @classmethod
    def of_batches(
        cls,
        model: nn.Module,
        loss_function: Callable[[Any, Any], Tensor],
        batches: Iterable[tuple[Any, Any]],
        mode: str = 'eval',
    ) -> Loss:
        """Loss of a plain PyTorch model: ``loss_function(model(inputs), targets)``."""
        return cls.of_output_losses(
            model, [OutputLoss(model, loss_function, *pair) for pair in batches], mode
        )

    @classmethod
    def of_output_losses(
        cls, model: nn.Module, output_losses: Sequence[OutputLoss], mode: str = 'eval'
    ) -> Loss:
        """Loss that is a criterion of a network's outputs on each batch."""

        def closure(part: OutputLoss) -> Callable[[], Tensor]:
            return lambda: part.criterion(part.network(part.inputs), part.targets)

        return cls(model, [closure(part) for part in output_losses], mode, output_losses)

    def value(self) -> float:
        """Mean loss of the batches."""
        with self._evaluating(), torch.no_grad():
            return sum(float(closure()) for closure in self.closures) / len(self.closures)

    def gradient(self) -> Tensor:
        """Gradient (n,)."""
        with self._evaluating():
            return self._mean(self._derivative(closure()) for closure in self.closures)

    def hessian_vector_product(self, vector: Tensor) -> Tensor:
        """Product (n,) of the Hessian and a vector (n,), by a second backward pass.

        Raises:
            RuntimeError: If an operation has no second derivative, such as RoIAlign.
        """
        with self._evaluating():
            return self._mean(self._hessian_vector(closure(), vector) for closure in self.closures)

    def gauss_newton_vector_product(self, vector: Tensor) -> Tensor:
        """Product (n,) of the generalised Gauss-Newton matrix and a vector (n,), by curvlinops.

        The matrix is the mean of ``J' L J``, with the Jacobian J of the outputs and the Hessian L
        of the criterion. It is positive semi-definite for a convex criterion.

        Raises:
            ValueError: If the loss is not known as a criterion of outputs.
        """
        self.check_output_losses()
        with self._evaluating():
            return self._mean(self._gauss_newton(part) @ vector for part in self.output_losses)

    def check_output_losses(self) -> None:
        """Raises ValueError if the loss has no Gauss-Newton matrix."""
        if not self.output_losses:
            raise ValueError(
                "the Gauss-Newton matrix needs a loss of a network's outputs: a classifier of "
                'MMPretrain, or Loss.of_batches; take the Hessian'
            )

    def _gauss_newton(self, part: OutputLoss) -> Any:
        from curvlinops import GGNLinearOperator

        batch = [(part.inputs, part.targets)]
        criterion = _Criterion(part.criterion)
        return GGNLinearOperator(
            part.network, criterion, self.params, batch, check_deterministic=False
        )

    def difference_vector_product(self, vector: Tensor, share: float = 1.0) -> Tensor:
        """Product (n,) of the Hessian and a vector (n,), by a central difference of gradients.

        The distance of the two points from the parameters is the cube root of the dtype's rounding
        error, relative to the length of the parameters.

        Args:
            vector: The vector (n,).
            share: Factor of the distance; default: 1.
        """
        length = vector.norm()
        if length == 0:
            return torch.zeros_like(vector)
        step = share * torch.finfo(vector.dtype).eps ** (1 / 3)
        scale = step * max(1.0, float(self.parameter_vector().norm())) / float(length)
        with self.displaced(scale * vector):
            ahead = self.gradient()
        with self.displaced(-scale * vector):
            behind = self.gradient()
        return (ahead - behind) / (2 * scale)

    def custom_operations(self) -> set[str]:
        """Names of the operations with a backward pass in Python, which may not be differentiable.

        Torch's own operations either have a second derivative or raise an error.
        """
        with self._evaluating():
            nodes = [node for closure in self.closures for node in graph_nodes(closure())]
        kind = torch.autograd.function.BackwardCFunction
        return {
            type(node).__name__.removesuffix('Backward') for node in nodes if isinstance(node, kind)
        }

    def parameter_vector(self) -> Tensor:
        """Copy (n,) of the parameters."""
        return self.flatten([p.detach() for p in self.params])

    def flatten(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Vector (n,) of tensors in the shapes of the parameters; None counts as zeros."""
        return flatten_like(tensors, self.params)

    def unflatten(self, vector: Tensor) -> list[Tensor]:
        """Tensors in the shapes of the parameters from a vector (n,)."""
        return unflatten_like(vector, self.params)

    @contextmanager
    def displaced(self, offset: Tensor) -> Iterator[None]:
        """Moves the parameters by a vector (n,) and restores them to the bit."""
        before = [p.detach().clone() for p in self.params]
        try:
            with torch.no_grad():
                torch._foreach_add_(self.params, self.unflatten(offset))
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.params, before)

    def _derivative(self, loss: Tensor, graph: bool = False) -> Tensor:
        return self.flatten(
            torch.autograd.grad(loss, self.params, create_graph=graph, allow_unused=True)
        )

    def _hessian_vector(self, loss: Tensor, vector: Tensor) -> Tensor:
        product = self._derivative(loss, graph=True) @ vector
        if not product.requires_grad:  # the gradient is constant
            return torch.zeros_like(vector)
        _refuse_lost_paths(product)
        return self._derivative(product)

    def _mean(self, vectors: Iterable[Tensor]) -> Tensor:
        total = self.params[0].new_zeros(self.size)
        for vector in vectors:
            total += vector.detach()
        return total / len(self.closures)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Sets the mode and the random state, and restores them and the buffers."""
        modes = {module: module.training for module in self.model.modules()}
        buffers = {buffer: buffer.detach().clone() for buffer in self.model.buffers()}
        norms = [m for m in modes if isinstance(m, _BatchNorm) and m.track_running_stats]
        with isolated_rng(0, (p.device for p in self.params)):
            self.model.train(self.mode == 'train')
            if self.mode == 'train':  # batch statistics alone: curvlinops allows no updates
                for norm in norms:
                    norm.track_running_stats = False
            try:
                yield
            finally:
                for norm in norms:
                    norm.track_running_stats = True
                for module, training in modes.items():
                    module.train(training)  # of its children too, which follow
                with torch.no_grad():
                    for buffer, value in buffers.items():
                        buffer.copy_(value)


class _Criterion(nn.Module):
    """A criterion that says how it reduces, as curvlinops asks."""

    reduction = 'mean'

    def __init__(self, function: Callable[[Any, Any], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, outputs: Tensor, targets: Any) -> Tensor:
        return self.function(outputs, targets)


def _refuse_lost_paths(tensor: Tensor) -> None:
    """Raises RuntimeError if a path of the graph ends in an operation without a second derivative.

    Such an operation (``once_differentiable``) leaves an error node, which torch never reaches when
    it is asked for derivatives by some parameters: it would leave the path out in silence.
    """
    for node in graph_nodes(tensor):
        if node.name().rsplit('::', 1)[-1] == 'Error':
            raise RuntimeError('an operation of the model can be differentiated only once')
