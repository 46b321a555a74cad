"""Where chains start: which leaves they move, and what stays as it is."""

from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from .._checks import positive_int
from .._hashing import signed
from .._random import resolve_seed
from .._tree import (
    Fixed,
    Params,
    Where,
    is_parameter,
    map_leaves,
    matcher,
    merge,
    named_leaves,
    select,
)
from ..training._batch import ready
from ..training._several import count_members, member_seeds


@dataclass(frozen=True)
class Start:
    """The parameters of ``M`` chains, in those that move and the rest.

    Attributes:
        covered: What moves, leaves ``(M, *s)``.
        held: The rest; with a leading axis ``M`` if ``is_stacked``.
        is_stacked: Whether chains were given parameters of their own.
        num_chains: ``M``.
    """

    covered: Params
    held: Params
    is_stacked: bool
    num_chains: int

    @classmethod
    def of(cls, params: Params, where: Where | None, num_chains: int, stacked: bool, call: str) -> "Start":
        """Divide the parameters that a public function was given."""
        num_chains = positive_int(num_chains, f"{call}(num_chains=...)")
        if stacked:
            given = count_members(params, f"{call}(fn, params, ..., stacked=True)")
            if num_chains not in (1, given):
                raise ValueError(
                    f"`{call}(num_chains=...)` should be left out with `stacked=True`, where `params` are "
                    f"those of {given} chains, got {num_chains}."
                )
            num_chains = given
        params = map_leaves(lambda leaf: ready(leaf, None), params)
        chosen = matcher(where)
        covered = {
            name for name, leaf in named_leaves(params).items() if is_parameter(leaf) and chosen(name, leaf)
        }
        if not covered:
            raise ValueError(
                f"`{call}(fn, params, ...)` should have a leaf of floating point to move"
                + (", got none." if where is None else f", got none that `where={where!r}` chooses.")
            )
        moving = select(params, lambda name, _: name in covered)
        if not stacked:
            moving = map_leaves(lambda leaf: leaf.expand(num_chains, *leaf.shape), moving)
        return cls(moving, select(params, lambda name, _: name not in covered), stacked, num_chains)

    def seeds(self, seed: int | None) -> tuple[int, ...]:
        """One seed a chain; that of a single chain is the one given."""
        seed = int(resolve_seed(seed))
        alone = self.num_chains == 1 and not self.is_stacked
        return (seed,) if alone else member_seeds(seed, self.num_chains)

    @property
    def leaves(self) -> list[Tensor]:
        """What moves, in the order of paths."""
        return optree.tree_leaves(self.covered)

    @property
    def structure(self) -> Any:
        """Of what moves."""
        return optree.tree_structure(self.covered)

    def with_held(self, drawn: Params, num_draws: int) -> Params:
        """Kept states, leaves ``(M, T, *s)``, with what belongs to them beside what moved.

        What all chains hold alike is left to the parameters of the model, but for ``Fixed`` leaves.
        """

        def spread(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            own = leaf if self.is_stacked else leaf.expand(self.num_chains, *leaf.shape)
            return own.unsqueeze(1).expand(own.shape[0], num_draws, *own.shape[1:]).clone()

        belonging = select(self.held, lambda _, leaf: self.is_stacked or isinstance(leaf, Fixed))
        if not named_leaves(belonging):
            return drawn
        return merge(drawn, map_leaves(spread, belonging))


def check_chunk(chunk_size: int | None, call: str) -> int | None:
    """How many chains at a time, refused if it is no count."""
    return None if chunk_size is None else positive_int(chunk_size, f"{call}(chunk_size=...)")


def as_seeds(seeds: tuple[int, ...]) -> Tensor:
    """Seeds as a tensor, which no integer overflows."""
    return torch.tensor([signed(seed) for seed in seeds])
