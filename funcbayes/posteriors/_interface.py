"""What a posterior is: something that can be sampled, one numbered draw at a time."""

from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import optree
import torch
from torch import Tensor

from .._checks import positive_int
from .._linearize import Linearization
from .._random import Seed, resolve_seed
from .._tree import Fixed, Params, concatenate, index, named_leaves, pytree_dataclass


@pytree_dataclass
class Draw:
    """One draw of a posterior, or several with a leading axis on every leaf.

    Attributes:
        leaves: The parameters that the posterior covers; others are absent (``MISSING`` in
            containers other than dicts).
        effects: Changes to how the model is called: :class:`funcbayes._intercept.DropoutMasks`, and
            :class:`funcbayes._linearize.Linearization`.
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

    def forms(self) -> list[Draw]:
        """What draws look like: one of each structure, without the axis of draws.

        Only paths, shapes and dtypes mean something. Most posteriors have one form; a mixture of
        posteriors that cover different leaves has several.
        """
        return [index(self.draws(torch.zeros(1, dtype=torch.int64), 0), 0)]

    def structures(self, indices: Tensor, seed: Seed) -> dict[Hashable, Tensor]:
        """Group draws that cover the same leaves by the same effects.

        Args:
            indices: Draw numbers, int64 ``(S,)``.
            seed: As in :meth:`draws`.

        Returns:
            Positions in ``indices`` for each structure that occurs (:func:`structure_of` a draw); every
            position once, in any order. :meth:`draws` may be asked for any part of one group.
        """
        (form,) = self.forms()
        return {structure_of(form): torch.arange(len(indices))}

    def atoms(self) -> list[tuple[Draw, Tensor]] | None:
        """All values and their weights, for a posterior that has finitely many.

        Returns:
            For each structure its values and their probabilities ``(S,)``, which sum to 1 over all of them;
            ``None`` if there are infinitely many.
        """
        return None

    def log_prob(self, params: Params) -> Tensor:
        """Log density of the covered parameters, a scalar."""
        raise NotImplementedError(
            f"`log_prob` is not defined for {type(self).__name__}, which has no density."
        )

    def sample(self, num_samples: int, seed: Seed | None = None) -> Params:
        """Sample parameters.

        Args:
            num_samples: Number of draws ``S``, at least 1.
            seed: Draws are a function of it; ``None`` takes one number from torch's global state.

        Returns:
            Parameters with a leading axis, leaves ``(S, *s)``.

        Raises:
            ValueError: If ``num_samples`` is below 1.
            TypeError: If leaves alone do not say what a draw is: for dropout, and for a mixture whose
                components cover different leaves.
        """
        num_samples = positive_int(num_samples, "sample(num_samples=...)")
        indices, seed = torch.arange(num_samples), resolve_seed(seed)
        for form in self.forms():
            if form.effects and not named_leaves(form.leaves):
                raise TypeError(
                    f"`sample` has nothing to return for {type(self).__name__}: its draws change how the "
                    "model is called and hold no parameters. Use `predict(fn, params, posterior, x)`."
                )
        if len({optree.tree_structure(form.leaves) for form in self.forms()}) > 1:
            raise TypeError(
                f"`sample` has no tree to return for {type(self).__name__}: its draws cover different "
                "leaves. Use `predict(fn, params, posterior, x)`, or sample its components."
            )
        groups = self.structures(indices, seed).values()
        return in_order([(at, self.draws(indices[at], seed).leaves) for at in groups])


def structure_of(draw: Draw) -> Hashable:
    """What draws of one vectorised pass have in common: the leaves they cover, and their effects."""
    whole: Any = draw
    return optree.tree_structure(whole)


def labelled(draw: Draw, k: int) -> Draw:
    """A draw of component ``k`` of a mixture: what it is linearised around is that of the component."""
    effects = tuple(e.of_component(k) if isinstance(e, Linearization) else e for e in draw.effects)
    return Draw(draw.leaves, effects)


def unlabelled(draw: Draw) -> Draw:
    """Undo :func:`labelled`, however often it was applied."""
    effects = tuple(replace(e, label=()) if isinstance(e, Linearization) else e for e in draw.effects)
    return Draw(draw.leaves, effects)


def moment_of(posterior: Posterior, name: str) -> Params:
    """``posterior.mean`` or ``posterior.variance``, where its family has them."""
    try:
        return getattr(posterior, name)
    except AttributeError as err:
        raise NotImplementedError(f"`{name}` is not defined for {type(posterior).__name__}.") from err


def covered_leaves(posterior: Posterior) -> dict[str, Tensor | Fixed]:
    """Leaves by path that draws may hold; only shapes and dtypes mean something."""
    leaves: dict[str, Tensor | Fixed] = {}
    for form in posterior.forms():
        leaves |= named_leaves(form.leaves)
    return leaves


def in_order(parts: list[tuple[Tensor, Any]]) -> Any:
    """Put trees of draws, given with their positions, together in the order of the positions."""
    positions = torch.cat([at for at, _ in parts])
    whole = concatenate([tree for _, tree in parts])
    if bool((positions[1:] > positions[:-1]).all()):
        return whole
    return index(whole, positions.argsort())


def check_tensors(tree: Params, call: str) -> None:
    """Refuse leaves that are no tensors."""
    for name, leaf in named_leaves(tree).items():
        if not isinstance(leaf, Tensor | Fixed):
            raise TypeError(
                f"`{call}` should have tensors as leaves; {name!r} is {type(leaf).__name__}. "
                "Write `torch.as_tensor(value)`."
            )
