"""What IVON remembers from one step to the next."""

from typing import Any

import torch
from torch import Tensor

from .._checks import positive_number
from .._tree import (
    Fixed,
    Params,
    Where,
    is_parameter,
    map_leaves,
    map_named,
    matcher,
    named_leaves,
    pytree_dataclass,
    select,
    static,
)
from ..covariances._flat import at_least_single


@pytree_dataclass
class IVONState:
    """A Gaussian on its way: all that a run needs to go on, so that saving it is a checkpoint.

    Trees of numbers have the covered parameters as leaves, of shape ``s``, in at least float32. The state of
    several networks has a leading axis on every tensor.

    Attributes:
        mean: Location ``m`` of the Gaussian.
        momentum: Moving average ``g`` of gradients of the mean loss, before its bias is corrected.
        hessian: Moving average ``h`` of the diagonal of the Hessian of the mean loss; an entry may be
            negative, ``h + delta`` is not.
        fixed: Buffers of the model as ``Fixed``, those that updates changed (BatchNorm's statistics) as they
            are now.
        step: How many updates there were, int64 scalar. Noise and the correction of the bias depend on it.
        hess_init: What ``hessian`` began with, by which learning rates are scaled.
        dtypes: Names of the dtypes in which the model has the covered parameters, in the order of leaves.
    """

    mean: Params
    momentum: Params
    hessian: Params
    fixed: Params
    step: Tensor
    hess_init: float = static(default=1.0)
    dtypes: tuple[str, ...] = static(default=())


def init(params: Params, *, hess_init: float = 1.0, where: Where | None = None) -> IVONState:
    """Begin with a Gaussian around some parameters.

    Args:
        params: Where the mean starts, of a network at random or one that is trained; not changed. ``Fixed``
            leaves are carried along, integers passed by.
        hess_init: The Hessian ``h`` of the mean loss that is assumed at first, for every parameter: the
            larger, the closer are the first draws to the mean. Below 1 where the loss is flat. A run of far
            fewer than ``1 / (1 - beta2)`` steps ends with the variances that this says.
        where: Which leaves are moved and uncertain: a glob on the path, a sequence of globs, or a predicate
            ``(path, leaf)``; ``None`` for all.

    Returns:
        A state: new tensors.

    Raises:
        TypeError: If ``hess_init`` is no number.
        ValueError: If ``hess_init`` is not positive, or ``where`` chooses no leaf of floating point.

    Example:
        >>> import torch, funcbayes as fb
        >>> state = fb.ivon.init({"w": torch.zeros(2, 3), "b": torch.ones(2)}, where="b")
        >>> state.mean, state.step
        ({'b': tensor([1., 1.])}, tensor(0))
    """
    hess_init = positive_number(hess_init, "ivon.init(hess_init=...)")
    chosen = matcher(where)
    covered = select(params, lambda name, leaf: is_parameter(leaf) and chosen(name, leaf))
    leaves = named_leaves(covered)
    if not leaves:
        raise ValueError(
            "`ivon.init(params, ...)` should have a leaf of floating point"
            + (", got none." if where is None else f" that `where={where!r}` chooses, got none.")
        )
    with torch.inference_mode(False), torch.no_grad():
        mean = map_leaves(_wide_copy, covered)
        return IVONState(
            mean,
            map_leaves(torch.zeros_like, mean),
            map_leaves(lambda leaf: torch.full_like(leaf, hess_init), mean),
            map_leaves(torch.clone, select(params, lambda _, leaf: isinstance(leaf, Fixed))),
            torch.zeros((), dtype=torch.int64),
            hess_init,
            tuple(str(leaf.dtype).removeprefix("torch.") for leaf in leaves.values()),
        )


def _wide_copy(leaf: Tensor) -> Tensor:
    # In half precision an average that moves by 1e-5 of its value would not move at all.
    wide = leaf.detach().to(at_least_single(leaf.dtype))
    return wide.clone(memory_format=torch.contiguous_format)


def in_dtypes_of_the_model(state: IVONState, tree: Params) -> Params:
    """A tree over the covered parameters, in the dtypes that the model has them in."""
    dtypes = dict(zip(named_leaves(state.mean), state.dtypes, strict=True))
    return map_named(lambda name, leaf: leaf.to(getattr(torch, dtypes[name])), tree)


def like_mean(state: IVONState, leaves: dict[str, Tensor]) -> Params:
    """Leaves by path as a tree like the mean."""
    return map_named(lambda name, _: leaves[name], state.mean)


def check_state(state: Any, call: str) -> None:
    """Refuse what is no state."""
    if not isinstance(state, IVONState):
        raise TypeError(
            f"`{call}` should be given a state, got {type(state).__name__}. Write `ivon.init(params)`."
        )
