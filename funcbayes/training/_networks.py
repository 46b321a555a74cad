"""The networks being trained, and their losses and gradients one by one."""

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import optree
import torch
from torch import Tensor

from .._allocator import keep_large_blocks
from .._compiled import compiled, refuse_random_numbers
from .._functional import FunctionalModule
from .._global_random import forked, watched
from .._random import Seed, fold
from .._recording import Recorded
from .._remember import Remembered
from .._tree import (
    Fixed,
    Params,
    Where,
    index,
    is_parameter,
    map_leaves,
    matcher,
    merge,
    named_leaves,
    select,
)
from ._batch import Batch, RaggedBatch, ready
from ._fixed import FixedValues
from ._objective import NO_RULES, Objective

_recorded: Remembered[Recorded] = Remembered()


def _recorded_of(objective: Objective, spec: Hashable) -> Recorded:
    """Steps that were recorded, in other trainings too if they had the same objective."""
    rest = objective.rest()
    if rest is None:
        return Recorded(FunctionalModule)
    key = type(objective), rest, spec
    return _recorded.get(objective.fn, key, lambda: Recorded(FunctionalModule))


class Networks:
    """The ``K`` networks being trained, but for their trained leaves, which optimizers own.

    Trees of ``members`` have a leading axis ``K`` on every leaf. In ``seeds`` each network has its own,
    for the noise of its training. The fixed values of a network change as it is evaluated. Tensors
    of the user's are read only: optimizers copy the leaves they move.
    """

    def __init__(
        self,
        objective: Objective,
        members: Params,
        seeds: Sequence[int],
        where: Where | None,
        call: str,
        *,
        compile: bool = False,
    ) -> None:
        members = map_leaves(lambda leaf: ready(leaf, None), members)
        chosen = matcher(where)
        trained = {
            name for name, leaf in named_leaves(members).items() if is_parameter(leaf) and chosen(name, leaf)
        }
        if not trained:
            raise ValueError(
                f"`{call}(params, ...)` should have a leaf of floating point to train"
                + (", got none." if where is None else f", got none that `where={where!r}` chooses.")
            )
        self.num_members = len(seeds)
        self.objective = objective
        self.call, self.compile = call, compile
        self.members = members
        self.leaves, self._spec = optree.tree_flatten(select(members, lambda name, _: name in trained))
        self.held = select(members, lambda name, leaf: name not in trained and not isinstance(leaf, Fixed))
        fixed = select(members, lambda _, leaf: isinstance(leaf, Fixed))
        self.fixed = FixedValues([index(fixed, k) for k in range(self.num_members)])
        self.keys = [fold(seed, "dropout") for seed in seeds]
        self.num_steps = 0  # taken so far
        # Found by `probe`: noise from torch's global state, buffers that training adds.
        self.draws_globally = False
        self.adds_buffers = False
        self.recorded = _recorded_of(objective, self._spec)
        self._held = [index(self.held, k) for k in range(self.num_members)]
        if self.device.type == "cpu":
            keep_large_blocks()

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.leaves[0].device

    def loss(
        self,
        objective: Objective,
        leaves: Sequence[Tensor],
        held: Params,
        fixed: Params,
        pair: tuple[Any, Tensor],
        key: Seed,
        rules: AbstractContextManager[Any] = NO_RULES,
    ) -> tuple[Tensor, Params]:
        """Loss of one network and its fixed values afterwards: a pure function."""
        params = merge(merge(held, self._spec.unflatten(leaves)), fixed)
        loss, changed = objective(params, *pair, key, rules=rules)
        return loss, merge(fixed, changed) if changed else fixed

    def run(self, key: Hashable, function: Callable[[Objective, Any], Any], given: Any) -> Any:
        """A pure function of the objective and a tree; compiled where that is asked for, else recorded.

        Args:
            key: What the function depends on beside its arguments and what stays the same in training.
            function: Gives a tree without gradients.
            given: A tree of tensors, and what else there is.
        """
        if self.num_steps == 0 and (self.adds_buffers or not self.compile):
            return function(self.objective, given)

        def evaluate(numbers: Params, given: Any) -> Any:
            return function(self.objective.at(numbers), given)

        numbers = self.objective.numbers()
        if self.compile:
            return compiled(self, key, lambda tree: evaluate(*tree), (numbers, given))
        found = None
        if self.recorded.is_possible(self.objective.fn):
            with torch.no_grad():
                found = self.recorded.evaluate(key, self.objective.fn, evaluate, numbers, given)
        return function(self.objective, given) if found is None else found

    def gradient(
        self, k: int, leaves: Sequence[Tensor], batch: Batch | RaggedBatch
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        """Loss of network ``k`` alone, and its gradient in ``leaves``, ``None`` where it has none."""
        key = fold(self.keys[k], self.num_steps)
        own: Any = [leaf.detach() for leaf in leaves]
        pair = batch.member(k)
        # As a plain number a key is hashed faster, but it would be a part of a program.
        is_program = self.compile or self.recorded.is_possible(self.objective.fn)
        given = own, self._held[k], self.fixed.of(k), pair, torch.tensor(key) if is_program else key
        with self._noise(key):
            loss, grads, fixed = self.run("one", self._gradient, given)
        self.fixed.put(k, fixed)
        return loss, grads

    def _gradient(self, objective: Objective, given: Any) -> tuple[Tensor, Sequence[Tensor | None], Params]:
        leaves, *rest = given
        own = [leaf.detach().requires_grad_() for leaf in leaves]
        with torch.enable_grad():
            loss, fixed = self.loss(objective, own, *rest)
            grads = torch.autograd.grad(loss, own, allow_unused=True)
        return loss.detach(), grads, fixed

    def _noise(self, key: int) -> AbstractContextManager[None]:
        """Noise other than dropout's comes from torch's global state: then that is seeded for the step."""
        return forked(fold(key, "global")) if self.draws_globally else nullcontext()

    def probe(self, batch: Batch | RaggedBatch) -> None:
        """Evaluate the first network once, without effect, to see what training it will need.

        Bad outputs and targets are refused here, where values can be looked at.
        """
        params = merge(index(self.members, 0), self.fixed.of(0))
        with torch.no_grad(), forked(self.keys[0]):
            (_, changed), self.draws_globally = watched(
                lambda: self.objective(params, *batch.member(0), self.keys[0], True)
            )
        self.adds_buffers = not named_leaves(changed).keys() <= named_leaves(self.fixed.of(0)).keys()
        if self.compile and self.draws_globally:
            refuse_random_numbers(self.call)

    def present(self, leaves: Sequence[Tensor]) -> Params:
        """Members with these trained leaves ``(K, *s)`` and the present fixed values."""
        trained = self._spec.unflatten([leaf.detach() for leaf in leaves])
        return merge(merge(self.members, trained), self.fixed.all())

    def assemble(self, leaves: Sequence[Tensor]) -> Params:
        """What :meth:`present` gives, as new tensors."""
        return map_leaves(
            lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, self.present(leaves)
        )


# How losses (K,) and gradients, (K, *s) each, are found for all networks at leaves (K, *s).
Gradients = Callable[[Networks, list[Tensor], Batch | RaggedBatch], tuple[Tensor, Sequence[Tensor | None]]]


def one_by_one(
    networks: Networks, leaves: list[Tensor], batch: Batch | RaggedBatch
) -> tuple[Tensor, Sequence[Tensor | None]]:
    """Evaluate the networks in a loop."""
    found = [networks.gradient(k, [leaf[k] for leaf in leaves], batch) for k in range(networks.num_members)]
    losses, grads = zip(*found, strict=True)
    return joined(losses), [_joined_gradients(of_leaf) for of_leaf in zip(*grads, strict=True)]


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Stack; one tensor is not copied."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))


def _joined_gradients(grads: Sequence[Tensor | None]) -> Tensor | None:
    known = next((g for g in grads if g is not None), None)
    if known is None:
        return None
    return joined([torch.zeros_like(known) if g is None else g for g in grads])
