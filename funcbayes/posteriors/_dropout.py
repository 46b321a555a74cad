"""MC dropout: the model's own dropout as a posterior."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._intercept import DropoutMasks
from .._random import Seed, fold
from .._tree import Where, pytree_dataclass, static
from ._interface import Draw, Posterior


@pytree_dataclass
class Dropout(Posterior):
    """The distribution over networks that dropout with random masks gives, Gal & Ghahramani (2016).

    It covers no parameters; its draws switch the model's dropout on and leave everything else, such as
    BatchNorm, in evaluation mode. Found are all layers of ``torch.nn`` that drop, dropout inside
    attention and between recurrent layers, and calls of functions such as
    ``torch.nn.functional.dropout``. Whether a model has any is known when it is evaluated: one that
    drops nothing is refused then.

    Attributes:
        rate: Probability of dropping a unit, in ``(0, 1)``; ``None`` keeps the model's rates. It replaces
            the rates that attention and recurrent layers have only where these are positive.
        where: Chooses modules by path: a glob (``"encoder.*"``), a sequence of globs, or a predicate
            ``(path, None) -> bool``; only for models made by ``make_functional``.
        shared_mask: Use one mask for all rows, so that a draw is one function of ``x``, whatever else is
            in the batch. Otherwise each row has its own.

    Raises:
        ValueError: If ``rate`` is not inside ``(0, 1)``.

    Example:
        >>> import torch, funcbayes as fb
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 2))
        >>> fn, params = fb.make_functional(net)
        >>> fb.predict(fn, params, fb.Dropout(), torch.ones(5, 3), num_samples=16, seed=0).samples.shape
        torch.Size([16, 5, 2])
    """

    rate: float | None = static(default=None)
    where: Where | None = static(default=None)
    shared_mask: bool = static(default=False)

    def __post_init__(self) -> None:
        if self.rate is not None and (isinstance(self.rate, bool) or not isinstance(self.rate, float | int)):
            raise TypeError(f"`Dropout(rate=...)` should be a number, got {type(self.rate).__name__}.")
        if self.where is not None and not callable(self.where) and not isinstance(self.where, Sequence):
            raise TypeError(
                "`Dropout(where=...)` should be a glob, a sequence of globs or a predicate, got "
                f"{type(self.where).__name__}."
            )
        if self.rate is not None and not (math.isfinite(self.rate) and 0 < self.rate < 1):
            raise ValueError(
                f"`Dropout(rate=...)` should be inside (0, 1), got {self.rate}. "
                "Leave it out to keep the model's own rates."
            )
        if self.where is not None and not isinstance(self.where, str) and not callable(self.where):
            object.__setattr__(self, "where", tuple(self.where))  # structure has to be hashable

    def forms(self) -> list[Draw]:
        """No leaves, and masks."""
        key = torch.tensor(0)
        return [Draw({}, (DropoutMasks(key, self.rate, self.where, self.shared_mask),))]

    def draws(self, indices: Tensor, seed: Seed) -> Draw:
        """No leaves; as effect, masks keyed by the draw."""
        key = fold(fold(seed, "dropout masks"), indices)
        return Draw({}, (DropoutMasks(key, self.rate, self.where, self.shared_mask),))
