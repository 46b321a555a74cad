"""Checks of the trees that covariances are made of."""

import math
import numbers
from typing import Any

import optree
import torch
from torch import Tensor

from .._functorch import is_concrete
from .._tree import Params, difference, is_parameter, named_leaves
from ._flat import without_columns


def check_leaves(tree: Params, call: str) -> None:
    """Refuse leaves that are no tensors of floating point."""
    for name, leaf in named_leaves(tree).items():
        if not is_parameter(leaf):
            raise TypeError(
                f"`{call}` should have floating-point tensors as leaves; {name!r} is "
                f"{getattr(leaf, 'dtype', type(leaf).__name__)}. Leave out what is not a parameter."
            )


def check_variance(tree: Params, call: str) -> None:
    """Refuse variances that are negative or not finite."""
    check_leaves(tree, call)
    for name, leaf in named_leaves(tree).items():
        low, high = _range(leaf)
        if not (low >= 0 and high < math.inf):
            raise ValueError(
                f"`{call}` should be finite and not negative; {name!r} has a smallest entry of {low:.3g} "
                f"and a largest of {high:.3g}."
            )


def check_precision(tree: Params, call: str) -> None:
    """Refuse precisions that are not positive or not finite."""
    check_leaves(tree, call)
    for name, leaf in named_leaves(tree).items():
        low, high = _range(leaf)
        if not (low > 0 and high < math.inf):
            raise ValueError(
                f"`{call}` should be finite and positive; {name!r} has a smallest entry of {low:.3g} and a "
                f"largest of {high:.3g}. A larger `prior_precision` helps."
            )


def check_factors(tree: Params, call: str, like: Params | None = None) -> None:
    """Refuse factors that are not ``(*s, R)`` with one ``R``, or not finite, or not like ``like``."""
    check_leaves(tree, call)
    leaves = named_leaves(tree)
    for name, leaf in leaves.items():
        if not leaf.ndim:
            raise ValueError(
                f"`{call}` should have factors of shape `(*s, R)`, `s` that of the parameter; {name!r} has "
                "shape (). Write `factors.unsqueeze(-1)` for a rank of one."
            )
    differing = difference(without_columns(tree), like) if like is not None else None
    if differing:
        raise ValueError(
            f"`{call}` should have factors of shape `(*s, R)` for each leaf `s` of the first argument; "
            f"without the last axis {differing}."
        )
    ranks = {name: leaf.shape[-1] for name, leaf in leaves.items()}
    first = next(iter(ranks), "")
    for name, rank in ranks.items():
        if rank != ranks[first]:
            raise ValueError(
                f"`{call}` should have factors of one rank, the length of their last axis; {name!r} has "
                f"{rank} where {first!r} has {ranks[first]}. Fill up with zeros what has fewer."
            )
    check_finite(tree, call)


def check_matrices(tree: Params, lengths: dict[str, int], call: str) -> None:
    """Refuse what is neither ``(d, d)`` nor ``(d,)``, with ``d`` by path, or not finite."""
    check_leaves(tree, call)
    given = named_leaves(tree)
    expected = {
        name: torch.empty((d,) if name in given and given[name].ndim == 1 else (d, d), device="meta")
        for name, d in lengths.items()
    }
    differing = difference(tree, expected)
    if differing:
        raise ValueError(
            f"`{call}` should have a square matrix for each leaf, of the length of its first axis for "
            "outputs and the product of its others for inputs, or the diagonal of one as a vector; "
            f"{differing}."
        )
    check_finite(tree, call)


def check_bases(tree: Params, lengths: dict[str, int], call: str) -> None:
    """Refuse what is not ``(d, d)``, with ``d`` by path, or not finite; bases may be missing."""
    whole: Any = tree
    if any(leaf is None for leaf in optree.tree_leaves(whole, none_is_leaf=True)):
        raise TypeError(
            f"`{call}` should not have None in it. For an identity leave the leaf out of a dict, or write "
            "`funcbayes.MISSING`; `{}` if all are identities."
        )
    check_leaves(tree, call)
    given = named_leaves(tree)
    expected = {name: torch.empty(d, d, device="meta") for name, d in lengths.items() if name in given}
    differing = difference(tree, expected)
    if differing:
        raise ValueError(
            f"`{call}` should have square matrices, of the length of a leaf's first axis for outputs and the "
            f"product of its others for inputs; {differing}. A leaf may be missing, for an identity."
        )
    check_finite(tree, call)


def check_finite(tree: Params, call: str) -> None:
    """Refuse numbers that are not finite."""
    for name, leaf in named_leaves(tree).items():
        if not all(map(math.isfinite, _range(leaf))):
            raise ValueError(f"`{call}` should be finite; {name!r} has entries that are not.")


def zero_variance(tree: Params) -> str | None:
    """In words where a variance is zero."""
    for name, leaf in named_leaves(tree).items():
        if is_concrete(leaf) and bool((leaf == 0).any()):
            return f"the variance of {name!r} is zero somewhere"
    return None


def positive_factor(factor: float | Tensor) -> float | Tensor:
    """The argument of ``scaled``, refused if it is no positive number."""
    is_tensor = isinstance(factor, Tensor)
    kind = str(factor.dtype) if is_tensor else type(factor).__name__
    if kind in ("bool", "torch.bool") or not (is_tensor or isinstance(factor, numbers.Real)):
        raise TypeError(f"`scaled(factor)` should be a number, got {kind}.")
    if isinstance(factor, Tensor):
        if factor.ndim:
            raise ValueError(f"`scaled(factor)` should be one number, got shape {tuple(factor.shape)}.")
        number = float(factor.detach()) if is_concrete(factor) else 1.0
    else:
        number = factor = float(factor)
    if not 0 < number < math.inf:
        raise ValueError(f"`scaled(factor)` should be positive and finite, got {number:.3g}.")
    return factor


def _range(leaf: Tensor) -> tuple[float, float]:
    """Smallest and largest entry, both NaN if one is; harmless numbers where they cannot be seen."""
    if not is_concrete(leaf) or not leaf.numel():
        return 1.0, 1.0
    low, high = torch.aminmax(leaf.detach())
    return float(low), float(high)
