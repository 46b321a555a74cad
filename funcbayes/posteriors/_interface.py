"""What a posterior is: something that can be sampled, one numbered draw at a time."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from .._checks import positive_int
from .._random import Seed, resolve_seed
from .._tree import Fixed, Params, named_leaves, pytree_dataclass


@pytree_dataclass
class Draw:
    """One draw of a posterior, or several with a leading axis on every leaf.

    Attributes:
        leaves: The parameters that the posterior covers; others are absent (``MISSING`` in
            containers other than dicts).
        effects: Changes to how the model is called, such as
            :class:`funcbayes._intercept.DropoutMasks`.
    """

    leaves: Params
    effects: tuple[Any, ...] = ()


class Posterior(ABC):
    """A distribution over some or all of the parameters of a model.

    A posterior has to say what its numbered draws are; everything else follows from that.
    """

    @abstractmethod
    def draws(self, indices: Tensor, seed: Seed) -> Draw:
        """Make the draws with the given numbers.

        Draw ``i`` depends on the posterior, ``seed`` and ``i`` alone: not on which other draws are
        asked for, nor on when.

        Args:
            indices: Draw numbers, int64 ``(S,)``, all of one structure (see :meth:`structures`).
            seed: Int, or int64 scalar tensor.

        Returns:
            Draw whose leaves and effects have a leading axis of length ``S``.
        """

    def structures(self, indices: Tensor, seed: Seed) -> list[Tensor]:
        """Group draws that cover the same leaves by the same effects.

        Args:
            indices: Draw numbers, int64 ``(S,)``.
            seed: As in :meth:`draws`.

        Returns:
            Positions in ``indices``, one tensor a group, every position once. :meth:`draws` may be
            asked for any part of one group.
        """
        return [torch.arange(len(indices))]

    def atoms(self) -> tuple[Draw, Tensor] | None:
        """All values and their weights ``(S,)``, for a posterior that has finitely many."""
        return None

    def sample(self, num_samples: int, seed: Seed | None = None) -> Params:
        """Sample parameters.

        Args:
            num_samples: Number of draws ``S``, at least 1.
            seed: Draws are a function of it; ``None`` takes one number from torch's global state.

        Returns:
            Parameters with a leading axis, leaves ``(S, *s)``.

        Raises:
            ValueError: If ``num_samples`` is below 1.
            TypeError: If leaves alone do not say what a draw is, as for dropout.
        """
        num_samples = positive_int(num_samples, "sample(num_samples=...)")
        draw = self.draws(torch.arange(num_samples), resolve_seed(seed))
        if draw.effects and not named_leaves(draw.leaves):
            raise TypeError(
                f"`sample` has nothing to return for {type(self).__name__}: its draws change how the model "
                "is called and hold no parameters. Use `predict(fn, params, posterior, x)`."
            )
        return draw.leaves


def check_tensors(tree: Params, call: str) -> None:
    """Refuse leaves that are no tensors."""
    for name, leaf in named_leaves(tree).items():
        if not isinstance(leaf, Tensor | Fixed):
            raise TypeError(
                f"`{call}` should have tensors as leaves; {name!r} is {type(leaf).__name__}. "
                "Write `torch.as_tensor(value)`."
            )
