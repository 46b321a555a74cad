"""Optimizers with their schedulers: one for the stacked leaves of all networks, or one a network."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ._batch import Batch, RaggedBatch
from ._networks import Gradients, Networks, joined
from ._options import Options


@dataclass
class Mover:
    """An optimizer, its scheduler, and the leaves they move: of one network, or stacked of all."""

    leaves: list[Tensor]
    optimizer: Optimizer
    scheduler: LRScheduler | None

    @classmethod
    def of(cls, leaves: Sequence[Tensor], options: Options) -> "Mover":
        """Make the optimizer and scheduler of ``options`` for ``leaves``, which they write into."""
        own = [leaf.detach().requires_grad_() for leaf in leaves]
        optimizer = _made_optimizer(own, options)
        scheduler = options.scheduler and options.scheduler(optimizer)
        if scheduler is not None and not isinstance(scheduler, LRScheduler):
            raise TypeError(
                f"`{options.call}(scheduler=...)` should make a torch.optim.lr_scheduler.LRScheduler, got "
                f"{type(scheduler).__name__}."
            )
        return cls(own, optimizer, scheduler)

    def set_gradients(self, grads: Sequence[Tensor | None]) -> None:
        """Put gradients where the optimizer looks for them."""
        for leaf, grad in zip(self.leaves, grads, strict=True):
            if grad is not None and grad.stride() != leaf.stride():
                # Gradients of a batched product come transposed, which every operation of the
                # optimizer would pay for.
                grad = torch.empty_like(leaf).copy_(grad)
            leaf.grad = grad

    def schedule(self, losses: Tensor, k: int) -> None:
        """Step the scheduler; one that watches the loss is told that of network ``k``."""
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(losses[k].item())
        elif self.scheduler is not None:
            self.scheduler.step()


def _made_optimizer(leaves: list[Tensor], options: Options) -> Optimizer:
    optimizer = options.optimizer(list(leaves))
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"`{options.call}(optimizer=...)` should make a torch.optim.Optimizer from a list of leaves, got "
            f"{type(optimizer).__name__}. Write `functools.partial(torch.optim.Adam, lr=1e-3)`, say."
        )
    ours = {id(leaf) for leaf in leaves}
    if any(id(p) not in ours for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            f"`{options.call}(optimizer=...)` should make an optimizer of the leaves it is given, got one of "
            "other tensors. Write `lambda leaves: torch.optim.Adam(leaves)`, say."
        )
    return optimizer


class Movers:
    """The optimizers of all networks: one for the stacked leaves, or one a network for its slices of them.

    Attributes:
        movers: One, or one a network.
        is_stacked: Whether it is one.
    """

    def __init__(self, leaves: Sequence[Tensor], options: Options, *, stacked: bool) -> None:
        """Make them for copies of ``leaves``, ``(K, *s)`` each."""
        self._leaves = [leaf.detach().clone() for leaf in leaves]
        # Of each optimizer, the parts of the leaves that it moves.
        self._places = (
            [self._leaves] if stacked else [[x[k] for x in self._leaves] for k in range(len(leaves[0]))]
        )
        self.movers = [Mover.of(own, options) for own in self._places]
        self.is_stacked = stacked
        self.max_grad_norm = options.max_grad_norm
        self._inspect = options.inspect or _accept
        self._needs_closure = _needs_closure(self.movers[0].optimizer)

    @classmethod
    def separate(cls, leaves: Sequence[Tensor], options: Options) -> "Movers":
        """Make one optimizer a network."""
        return cls(leaves, options, stacked=False)

    def leaves(self) -> list[Tensor]:
        """The present values, ``(K, *s)`` each."""
        for mover, places in zip(self.movers, self._places, strict=True):
            for own, place in zip(mover.leaves, places, strict=True):
                if own.data_ptr() != place.data_ptr():  # an optimizer may give `.data` another tensor
                    place.copy_(own.detach())
        return self._leaves

    def step(self, gradients: Gradients, networks: Networks, batch: Batch | RaggedBatch) -> Tensor:
        """Move all networks by one step; their losses ``(K,)`` before it."""
        if self._needs_closure:
            losses = joined([self._move_alone(k, networks, batch) for k in range(networks.num_members)])
            self._inspect(networks, self.leaves(), batch, losses)
            return losses
        losses, grads = gradients(networks, self.leaves(), batch)
        self._inspect(networks, self.leaves(), batch, losses)
        self._move(self._shortened(grads))
        return losses

    def _move(self, grads: Sequence[Tensor | None]) -> None:
        """Step the optimizers along gradients ``(K, *s)``."""
        for k, mover in enumerate(self.movers):
            mover.set_gradients(grads if self.is_stacked else _of_one(grads, k))
            mover.optimizer.step()

    def _move_alone(self, k: int, networks: Networks, batch: Batch | RaggedBatch) -> Tensor:
        """One step of an optimizer that evaluates the loss itself, as often as it likes."""
        mover, losses = self.movers[k], []

        def closure() -> Tensor:
            loss, grads = networks.gradient(k, mover.leaves, batch)
            stacked = [None if g is None else g.unsqueeze(0) for g in grads]
            mover.set_gradients(_of_one(self._shortened(stacked), 0))
            losses.append(loss)
            return loss

        mover.optimizer.step(closure)  # type: ignore[arg-type]  # torch's stub asks for a float
        return losses[0]

    def _shortened(self, grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Scale each network's gradient to a norm of at most the given one, as ``clip_grad_norm_`` does."""
        if self.max_grad_norm is None:
            return grads
        squares = [g.reshape(len(g), -1).square().sum(1) for g in grads if g is not None]
        norm = torch.stack(squares).sum(0).sqrt()
        scale = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        return [None if g is None else g * scale.view(-1, *(1 for _ in g.shape[1:])) for g in grads]

    def schedule(self, losses: Tensor) -> None:
        """Step the schedulers, for losses ``(K,)``."""
        for k, mover in enumerate(self.movers):
            mover.schedule(losses, k)


def _accept(networks: Networks, leaves: list[Tensor], batch: Batch | RaggedBatch, losses: Tensor) -> None:
    """Let any losses pass."""


def _needs_closure(optimizer: Optimizer) -> bool:
    parameter = inspect.signature(type(optimizer).step).parameters.get("closure")
    return parameter is not None and parameter.default is inspect.Parameter.empty


def _of_one(grads: Sequence[Tensor | None], k: int) -> list[Tensor | None]:
    return [None if g is None else g[k] for g in grads]
