"""Inference over a part of a network at the level of single parameters.

A sub-network is a model of its own, with one vector of parameters. Whatever finds a posterior over the
parameters of a model finds one over those of a sub-network, with all correlations if they are few. Which
parameters these are, masks say: Daxberger, Nalisnick, Allingham, Antoran & Hernandez-Lobato (2021), "Bayesian
deep learning via subnetwork inference", https://arxiv.org/abs/2010.14689.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._checks import check_model, positive_int
from .._functional import Model
from .._random import Seed, fold, permutation, resolve_seed
from .._tree import (
    Fixed,
    Params,
    Where,
    difference,
    is_parameter,
    map_leaves,
    map_named,
    matcher,
    merge,
    named_leaves,
    parameters_of,
    select,
)

NAME = "subnetwork"  # of the one leaf that a sub-network's parameters have


def subnetwork(fn: Model, params: Params, mask: Params) -> tuple["SubnetworkModel", dict[str, Tensor]]:
    """Make a model of the parameters that a mask chooses; the others stay as they are.

    Args:
        fn: Pure model ``fn(params, x) -> outputs``.
        params: Its parameters. ``Fixed`` leaves and those of integers stay as they are, too.
        mask: Tree like ``params`` with tensors of bool, true for what is chosen. A leaf that is missing
            chooses nothing.

    Returns:
        ``fn_sub(params_sub, x)``, a pure model, and ``params_sub = {"subnetwork": vector}`` with the ``S``
        chosen entries: leaves in the order of their sorted paths, each of them row-major.

    Raises:
        TypeError: If ``fn`` is not a function of ``(params, x)``, or the mask is not of bool.
        ValueError: If the mask has leaves that ``params`` lacks or other shapes, or chooses nothing, or
            something that is no parameter.

    Example:
        >>> import torch, funcbayes as fb
        >>> from funcbayes.laplace._subnetwork import largest_magnitude, subnetwork
        >>> params = {"w": torch.tensor([3.0, -0.5, 2.0]), "b": torch.tensor(-4.0)}
        >>> fn = lambda params, x: x @ params["w"] + params["b"]
        >>> fn_sub, params_sub = subnetwork(fn, params, largest_magnitude(params, 2))
        >>> params_sub
        {'subnetwork': tensor([-4.,  3.])}
        >>> fn_sub({"subnetwork": torch.tensor([0.0, 1.0])}, torch.ones(3))  # 1 - 0.5 + 2
        tensor(2.5000)
    """
    check_model(fn, "subnetwork")
    leaves, places = named_leaves(params), _places(params, mask)
    entries = [leaves[name].reshape(-1)[at] for name, at in places.items()]
    vector = torch.cat([entry.to(entries[0].device) for entry in entries])
    return SubnetworkModel(fn, params, places, vector.dtype, vector.device), {NAME: vector}


@dataclass(frozen=True, eq=False)
class SubnetworkModel:
    """A model of some of the parameters of another, made by :func:`subnetwork`.

    Attributes:
        fn: The whole model.
        params: Its parameters; the entries that are chosen do not count.
        places: Of the chosen entries in the flattened leaf, int64, by path.
        dtype: Of the vector of chosen entries.
        device: Of the vector of chosen entries.
    """

    fn: Model
    params: Params
    places: dict[str, Tensor]
    dtype: torch.dtype
    device: torch.device

    def __repr__(self) -> str:
        return f"<{self.num_params} parameters of {self.fn!r}>"

    @property
    def num_params(self) -> int:
        """Number of chosen parameters, ``S``."""
        return sum(len(at) for at in self.places.values())

    def __call__(self, params: Params, x: Any) -> Any:
        """Evaluate the whole model at :meth:`whole` of ``params``."""
        return self.fn(self.whole(params), x)

    def whole(self, params: Params) -> Params:
        """Parameters of the whole model.

        Args:
            params: ``{"subnetwork": vector}`` with a vector ``(S,)``. If it is of another dtype or on another
                device than what :func:`subnetwork` gave, the other parameters of its dtype follow. ``Fixed``
                leaves beside it are passed on.

        Returns:
            A tree like that of the whole model, with copies of the leaves that the vector changes.

        Raises:
            ValueError: If the vector is missing or has another length.
        """
        given = parameters_of(params)
        differing = difference(given, {NAME: torch.empty(self.num_params, device="meta")})
        if differing:
            raise ValueError(
                f"`fn_sub(params, x)` should be given {{{NAME!r}: vector}} with the {self.num_params} "
                f"parameters that were chosen, and nothing else but `Fixed` leaves; {differing}."
            )
        vector = given[NAME]
        parts = vector.split([len(at) for at in self.places.values()])
        values = dict(zip(self.places, parts, strict=True))

        def moved(leaf: Tensor) -> Tensor:
            return leaf.to(vector.device, vector.dtype if leaf.dtype == self.dtype else leaf.dtype)

        def filled(name: str, leaf: Any) -> Any:
            if name not in values:
                return leaf
            value, at = values[name].to(leaf), self.places[name].to(leaf.device)
            if len(at) == leaf.numel():
                return value.reshape(leaf.shape)
            return leaf.reshape(-1).scatter(0, at, value).reshape(leaf.shape)

        is_moved = (vector.dtype, vector.device) != (self.dtype, self.device)
        whole = map_named(filled, map_leaves(moved, self.params) if is_moved else self.params)
        fixed = {name: leaf for name, leaf in params.items() if name != NAME}
        return merge(whole, fixed) if fixed else whole


def largest_magnitude(params: Params, num_params: int, *, where: Where | None = None) -> Params:
    """Choose the parameters that are farthest from zero.

    Args:
        params: Parameters of a model.
        num_params: How many to choose, ``S``. Of equal ones those that come first in the order of the
            sorted paths are chosen.
        where: Leaves to choose from: a glob on the path, a sequence of globs, or a predicate
            ``(path, leaf)``; ``None`` for all.

    Returns:
        Mask for :func:`subnetwork`: bool tensors like the leaves to choose from, ``S`` entries are true.

    Raises:
        TypeError: If ``num_params`` is no int.
        ValueError: If ``num_params`` is below 1 or above the number of parameters to choose from, or a
            parameter is NaN.
    """
    candidates = _candidates(params, where, "largest_magnitude")
    return _largest(map_leaves(torch.abs, candidates), num_params, "largest_magnitude")


def largest_variance(posterior: Any, num_params: int, *, where: Where | None = None) -> Params:
    """Choose the parameters that are least certain.

    Among sub-networks of ``S`` parameters this has the posterior that is closest, in Wasserstein distance, to
    a diagonal Gaussian over all of them: Daxberger et al. (2021), who take the variances of a diagonal
    Laplace approximation.

    Args:
        posterior: Anything with a tree of variances, ``posterior.variance``: a Gaussian that is cheap to
            find, say.
        num_params: How many to choose, ``S``; as in :func:`largest_magnitude`.
        where: Leaves to choose from, of those that the posterior covers; likewise.

    Returns:
        Mask for :func:`subnetwork`, as :func:`largest_magnitude` gives it.

    Raises:
        TypeError: If ``posterior`` has no variance, or ``num_params`` is no int.
        ValueError: If ``num_params`` is below 1 or above the number of parameters to choose from, or a
            variance is NaN.
    """
    variance = getattr(posterior, "variance", None)
    if variance is None:
        raise TypeError(
            "`largest_variance(posterior, ...)` should be given a posterior with a `variance` of each "
            f"parameter, got {type(posterior).__name__}. A Gaussian has them, whatever its covariance."
        )
    candidates = _candidates(variance, where, "largest_variance")
    return _largest(candidates, num_params, "largest_variance")


def random_mask(
    params: Params, num_params: int, seed: Seed | None = None, *, where: Where | None = None
) -> Params:
    """Choose parameters by chance, each as likely as any other.

    Args:
        params: Parameters of a model.
        num_params: How many to choose, ``S``.
        seed: The choice is a function of it; ``None`` takes one number from torch's global state.
        where: Leaves to choose from, as in :func:`largest_magnitude`.

    Returns:
        Mask for :func:`subnetwork`, as :func:`largest_magnitude` gives it.

    Raises:
        TypeError: If ``num_params`` is no int.
        ValueError: If ``num_params`` is below 1 or above the number of parameters to choose from.
    """
    candidates = _candidates(params, where, "random_mask")
    count, total = _count(candidates, num_params, "random_mask")
    flat = torch.zeros(total, dtype=torch.bool)
    flat[permutation(fold(int(resolve_seed(seed)), NAME), total)[:count]] = True
    return _as_mask(flat, candidates)


def _places(params: Params, mask: Params) -> dict[str, Tensor]:
    """Places of the chosen entries in the flattened leaf, by path; leaves without any are left out."""
    call, leaves, masks = "subnetwork(fn, params, mask)", named_leaves(params), named_leaves(mask)
    differing = difference(masks, {name: leaf for name, leaf in leaves.items() if name in masks})
    if differing:
        raise ValueError(f"`mask` in `{call}` should have leaves like those of `params`; {differing}.")
    found = {}
    for name, leaf in masks.items():
        choices = leaf.tensor if isinstance(leaf, Fixed) else leaf
        if not isinstance(choices, Tensor) or choices.dtype != torch.bool:
            what = getattr(choices, "dtype", type(choices).__name__)
            raise TypeError(f"`mask` in `{call}` should have tensors of bool as leaves; {name!r} is {what}.")
        at = choices.reshape(-1).nonzero()[:, 0]
        if len(at) and not is_parameter(leaves[name]):
            what = getattr(leaves[name], "dtype", type(leaves[name]).__name__)
            raise ValueError(f"`mask` in `{call}` should choose parameters only; {name!r} is {what}.")
        if len(at):
            found[name] = at.to(leaves[name].device)
    if not found:
        raise ValueError(f"`mask` in `{call}` should choose at least one parameter, got none.")
    return {name: found[name] for name in leaves if name in found}


def _candidates(params: Params, where: Where | None, call: str) -> Params:
    """The leaves to choose from."""
    is_chosen = matcher(where)
    candidates = select(params, lambda name, leaf: is_parameter(leaf) and is_chosen(name, leaf))
    if not named_leaves(candidates):
        among = "" if where is None else f" that `where={where!r}` chooses"
        raise ValueError(f"`{call}(...)` should have parameters to choose from, got none{among}.")
    return candidates


def _count(candidates: Params, num_params: int, call: str) -> tuple[int, int]:
    """How many to choose, of how many."""
    count = positive_int(num_params, f"{call}(num_params=...)")
    total = sum(leaf.numel() for leaf in named_leaves(candidates).values())
    if count > total:
        raise ValueError(
            f"`{call}(num_params=...)` should be at most {total}, the number of parameters to choose from, "
            f"got {count}."
        )
    return count, total


def _largest(scores: Params, num_params: int, call: str) -> Params:
    """Mask of the largest scores."""
    count, _ = _count(scores, num_params, call)
    leaves = named_leaves(scores)
    for name, leaf in leaves.items():
        if bool(leaf.isnan().any()):
            raise ValueError(
                f"`{call}(...)` should have numbers to compare; {name!r} has entries that are NaN."
            )
    device = next(iter(leaves.values())).device
    flat = torch.cat([leaf.detach().reshape(-1).to(device) for leaf in leaves.values()])
    # Not the places that `topk` gives: which of equal entries it takes is left open.
    least = flat.topk(count).values[-1]
    above, equal = flat > least, flat == least
    return _as_mask(above | (equal & (equal.cumsum(0) <= count - above.sum())), scores)


def _as_mask(flat: Tensor, like: Params) -> Params:
    leaves = named_leaves(like)
    parts = dict(zip(leaves, flat.split([leaf.numel() for leaf in leaves.values()]), strict=True))
    return map_named(lambda name, leaf: parts[name].reshape(leaf.shape).to(leaf.device), like)
