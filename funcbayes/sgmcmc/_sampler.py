"""What samplers share: how a chain starts, the noise of a step, and how leaves are moved."""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import optree
import torch
from torch import Tensor

from .._hashing import signed
from .._random import Seed, fold, normal
from .._tree import Fixed, Params, is_parameter, map_leaves, map_named, named_leaves
from ..covariances._flat import at_least_single
from ._scalars import plus


class ChainState(Protocol):
    """What every state of a chain has.

    Attributes:
        params: Where the chain is, in at least float32: a model of half precision is evaluated at them in its
            own dtypes.
        step: How many steps it has taken, an int64 scalar.
        seed: Of its noise, an int64 scalar.
    """

    @property
    def params(self) -> Params:
        """Where the chain is."""
        ...

    @property
    def step(self) -> Tensor:
        """How many steps it has taken."""
        ...

    @property
    def seed(self) -> Tensor:
        """Of its noise."""
        ...


State = TypeVar("State", bound=ChainState)


class Sampler(NamedTuple, Generic[State]):
    """A pair of pure functions that make a chain.

    States are pytrees of tensors. Those of several chains can be stacked, every leaf with a leading axis,
    and updated at once: as they are, or under ``torch.func.vmap``. The noise of a step is a function of the
    chain's seed, the number of the step and the paths of the leaves that move: a chain goes on from a saved
    state as if it had never stopped. Nothing is written in place, and no state shares memory with another.

    Attributes:
        init: ``(params, seed) -> state``. ``params`` are copied, in at least float32; integers and ``Fixed``
            leaves stay as they are. ``seed`` is an int or an int64 scalar tensor. Int64 ``(M,)`` starts ``M``
            chains at once, at params whose leaves have a leading axis ``M``.
        update: ``(state, gradients) -> state``, one step. ``gradients`` are those of the potential energy,
            **summed** over the data (see :func:`potential`), at ``state.params``, in a tree of the same
            paths. Leaves that have none are held.
    """

    init: Callable[[Params, Seed], State]
    update: Callable[[State, Params], State]


def start(params: Params, seed: Any, call: str) -> tuple[Params, Tensor, Tensor]:
    """Copies of the parameters, the number of the step, and the seed as a tensor."""
    key = _seed_tensor(seed, f"{call}.init(params, seed)")
    leaves = named_leaves(params)
    if not any(map(is_parameter, leaves.values())):
        raise ValueError(f"`{call}.init(params, seed)` should have a leaf of floating point, got none.")
    for name, leaf in leaves.items():
        value = leaf.tensor if isinstance(leaf, Fixed) else leaf
        if not isinstance(value, Tensor):
            raise TypeError(
                f"`{call}.init(params, seed)` should have tensors as leaves; {name!r} is "
                f"{type(value).__name__}. Write `torch.as_tensor(value)`."
            )
        if value.shape[: key.ndim] != key.shape:
            raise ValueError(
                f"`{call}.init(params, seed)` with seeds of shape {tuple(key.shape)} should have leaves with "
                f"that leading axis; {name!r} has shape {tuple(value.shape)}."
            )
    moving = map_named(lambda _, leaf: _widened(leaf) if is_parameter(leaf) else leaf, params)
    return map_leaves(_copy, moving), torch.zeros_like(key), key


def _widened(leaf: Tensor) -> Tensor:
    # In half precision a step shorter than the distance between two numbers would be none, or a longer one.
    return leaf.to(at_least_single(leaf.dtype))


def _copy(leaf: Tensor) -> Tensor:
    return leaf.detach().clone(memory_format=torch.contiguous_format)


def _seed_tensor(seed: Any, call: str) -> Tensor:
    if isinstance(seed, Tensor):
        if seed.is_floating_point() or seed.is_complex() or seed.dtype == torch.bool or seed.ndim > 1:
            raise TypeError(
                f"`{call}` should be given an int or an int64 tensor, a scalar or one entry a chain, got "
                f"{seed.dtype}, shape {tuple(seed.shape)}."
            )
        return seed.detach().long().clone()
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise TypeError(f"`{call}` should be given an int or an int64 tensor, got {type(seed).__name__}.")
    return torch.tensor(signed(operator.index(seed)))


@dataclass(frozen=True)
class Moving:
    """The leaves that a step moves, all in one order.

    Attributes:
        names: Paths.
        leaves: Where they are.
        gradients: Of the potential energy, in the dtypes of the leaves.
    """

    names: list[str]
    leaves: list[Tensor]
    gradients: list[Tensor]

    @classmethod
    def of(cls, params: Params, gradients: Params, call: str) -> "Moving":
        """Pair leaves with their gradients by path."""
        there, given = named_leaves(params), named_leaves(gradients)
        for name in given:
            if name not in there:
                raise ValueError(_misfit(call, f"{name!r} is not expected"))
        names = [n for n, leaf in there.items() if is_parameter(leaf) and is_parameter(given.get(n))]
        if not names:
            raise ValueError(_misfit(call, "there is none"))
        leaves, found = [there[name] for name in names], [given[name].detach() for name in names]
        for name, leaf, gradient in zip(names, leaves, found, strict=True):
            if gradient.shape != leaf.shape:
                words = f"{name!r} has shape {tuple(gradient.shape)}, not {tuple(leaf.shape)}"
                raise ValueError(_misfit(call, words))
        pairs = zip(leaves, found, strict=True)
        return cls(names, leaves, [gradient.to(leaf.dtype) for leaf, gradient in pairs])

    def like(self, tree: Params) -> list[Tensor]:
        """The leaves of the same paths of a tree like the parameters."""
        named = named_leaves(tree)
        return [named[name] for name in self.names]

    def with_noise(
        self,
        means: list[Tensor],
        variance: float | Tensor,
        state: ChainState,
        scales: list[Tensor] | None = None,
    ) -> list[Tensor]:
        """Add normal noise, a function of seed, step and paths.

        Args:
            means: What it is added to, like the leaves.
            variance: Of the noise; an exact 0 costs nothing.
            state: Of the chain.
            scales: Further factors of its standard deviation, like the leaves.
        """
        if not isinstance(variance, Tensor) and variance == 0:
            return means
        noise, deviation = self._normals(state), variance**0.5
        if scales is not None:
            noise = [scale * z for scale, z in zip(scales, noise, strict=True)]
        return [plus(mean, deviation, z) for mean, z in zip(means, noise, strict=True)]

    def _normals(self, state: ChainState) -> list[Tensor]:
        """Standard normals like the leaves."""
        kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for i, leaf in enumerate(self.leaves):
            kinds.setdefault((leaf.dtype, leaf.device), []).append(i)
        found: dict[int, Tensor] = {}
        for (dtype, device), places in kinds.items():
            # One generator a chain, not one a leaf: seeding them would take longer than a small network.
            paths = fold(0, ",".join(self.names[i] for i in places))
            key = fold(state.seed, state.step + paths)
            shapes = [self.leaves[i].shape[key.ndim :] for i in places]
            sizes = [math.prod(shape) for shape in shapes]
            parts = normal(key, (sum(sizes),), dtype=dtype, device=device).split(sizes, -1)
            for i, part, shape in zip(places, parts, shapes, strict=True):
                found[i] = part.reshape((*key.shape, *shape))
        return [found[i] for i in range(len(self.leaves))]

    def placed(self, tree: Params, leaves: list[Tensor]) -> Params:
        """A tree like the parameters with these leaves, and copies of the others."""
        moved = dict(zip(self.names, leaves, strict=True))
        whole: Any = tree
        structure = optree.tree_structure(whole)
        if structure.num_leaves == len(moved):  # all of them, which come in the order of the tree
            return structure.unflatten(leaves)
        return map_named(
            lambda name, leaf: moved[name] if name in moved else map_leaves(torch.clone, leaf), tree
        )


def _misfit(call: str, words: str) -> str:
    return (
        f"`{call}.update(state, gradients)` should be given gradients like `state.params`, or of some of its "
        f"leaves; in them {words}."
    )
