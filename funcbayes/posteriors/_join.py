"""Independent posteriors over different parts of one model."""

import functools
import itertools
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._intercept import DropoutMasks
from .._random import Seed
from .._tree import MISSING, Params, is_missing, map_leaves, merge, pytree_dataclass, repeated
from ._interface import Draw, Posterior, covered_leaves, moment_of, structure_of, unlabelled


@pytree_dataclass
class Join(Posterior):
    """Independent posteriors over disjoint leaves, drawn together; made by :func:`join`.

    Draw ``i`` holds draw ``i`` of every part.

    Attributes:
        parts: The posteriors, at least one.
    """

    parts: tuple[Posterior, ...]

    def __post_init__(self) -> None:
        owners: dict[str, int] = {}
        for k, part in enumerate(self.parts):
            for name in covered_leaves(part):
                if owners.setdefault(name, k) != k:
                    raise ValueError(
                        f"`join(*posteriors)` should be given posteriors over different leaves; {name!r} is "
                        f"covered by {owners[name]} and {k}. `restrict(posterior, where)` leaves leaves out."
                    )
        for form in self.forms():
            masks = [effect for effect in form.effects if isinstance(effect, DropoutMasks)]
            if len(masks) > 1 and any(mask.where is None for mask in masks):
                raise ValueError(
                    "`join(*posteriors)` should be given one dropout, or several that act on different "
                    "layers; one of these acts on all. Write `Dropout(where=...)` for each."
                )

    def forms(self) -> list[Draw]:
        """All combinations of the parts'."""
        return [_joined(forms) for forms in itertools.product(*(part.forms() for part in self.parts))]

    def structures(self, indices: Tensor, seed: Seed) -> dict[Hashable, Tensor]:
        """Draws are alike if they are alike in every part."""
        forms = self.forms()
        if len(forms) == 1:
            return {structure_of(forms[0]): torch.arange(len(indices))}
        combined: list[tuple[list[Draw], Tensor]] = [([], torch.arange(len(indices)))]
        for part in self.parts:
            forms = [*map(unlabelled, part.forms()), *part.forms()]  # as draws are inside of transforms
            form_of = {structure_of(form): form for form in forms}
            groups = part.structures(indices, seed).items()
            combined = [
                ([*chosen, form_of[structure]], at[torch.isin(at, positions)])
                for chosen, at in combined
                for structure, positions in groups
            ]
        return {structure_of(_joined(chosen)): at for chosen, at in combined if len(at)}

    def draws(self, indices: Tensor, seed: Seed) -> Draw:
        """Draws of all parts, leaves ``(S, *s)``."""
        return _joined([part.draws(indices, seed) for part in self.parts])

    def atoms(self) -> list[tuple[Draw, Tensor]] | None:
        """Those of the part that has several, if all others have one; not all combinations of many."""
        found = [part.atoms() for part in self.parts]
        several = [k for k, atoms in enumerate(found) if atoms is None or sum(len(w) for _, w in atoms) > 1]
        if len(several) > 1 or any(found[k] is None for k in several):
            return None
        main = several[0] if several else 0
        singles = [atoms[0][0] for atoms in found if atoms is not None]  # the main part's is replaced

        def joined(draw: Draw, num: int) -> Draw:
            parts = [map_leaves(lambda leaf: repeated(leaf[0], num), single) for single in singles]
            return _joined([*parts[:main], draw, *parts[main + 1 :]])

        return [(joined(draw, len(weights)), weights) for draw, weights in found[main] or ()]

    @property
    def mean(self) -> Params:
        """Mean of the covered parameters, leaves ``s``."""
        return self._moment("mean")

    @property
    def variance(self) -> Params:
        """Variance of each covered parameter, leaves ``s``."""
        return self._moment("variance")

    def _moment(self, name: str) -> Params:
        return _merged([moment_of(part, name) for part in self.parts if covered_leaves(part)])

    def log_prob(self, params: Params) -> Tensor:
        """Log density of the covered parameters, a scalar: the sum of the parts'."""
        return torch.stack([part.log_prob(params) for part in self.parts if covered_leaves(part)]).sum()


def join(*posteriors: Posterior) -> Posterior:
    """Put posteriors over different leaves of one model together, independent of each other.

    A Gaussian over the last layer and MC dropout before it, say.

    Args:
        *posteriors: Posteriors that cover no leaf twice; :class:`~funcbayes.Dropout` covers none. Of several
            dropouts that choose the same layer by ``where`` the first acts on it.

    Returns:
        A :class:`Join`; of a single posterior, that one.

    Raises:
        TypeError: If something else than posteriors is given.
        ValueError: If there are none, two cover the same leaf, or one of several dropouts acts on all layers.

    Example:
        >>> import torch, funcbayes as fb
        >>> head = fb.Gaussian({"head": torch.zeros(2)}, fb.covariances.Diagonal({"head": torch.ones(2)}))
        >>> joined = fb.join(head, fb.Dropout(rate=0.1))
        >>> joined.sample(4, seed=0)["head"].shape
        torch.Size([4, 2])
    """
    for posterior in posteriors:
        if not isinstance(posterior, Posterior):
            raise TypeError(
                f"`join(*posteriors)` should be given posteriors, got {type(posterior).__name__}. For one "
                "value of the parameters use `Point(params)`."
            )
    if not posteriors:
        raise ValueError("`join(*posteriors)` should be given at least one posterior, got none.")
    if len(posteriors) == 1:
        return posteriors[0]
    parts = [part for p in posteriors for part in (p.parts if isinstance(p, Join) else (p,))]
    return Join(tuple(parts))


def _joined(draws: Sequence[Draw]) -> Draw:
    leaves = _merged([draw.leaves for draw in draws])
    return Draw(leaves, tuple(effect for draw in draws for effect in draw.effects))


def _merged(trees: Sequence[Params]) -> Params:
    whole: Any = functools.reduce(merge, trees, MISSING)
    return {} if is_missing(whole) else whole
