"""First-order Taylor models."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import optree
import torch
from torch import Tensor

from ._checks import check_model
from ._functional import Model
from ._functorch import jvp, load_forward_rules
from ._intercept import Unfused
from ._tree import (
    MISSING,
    Params,
    difference,
    map_leaves,
    map_named,
    merge,
    parameters_of,
    pytree_dataclass,
    select,
    static,
)


def linearize(fn: Model, params: Params) -> "LinearizedModel":
    """Replace a model by its first-order Taylor expansion in the parameters.

    ``fn_lin(p, x) = fn(params, x) + J(x) (p - params)`` with the Jacobian ``J`` of the outputs in the
    parameters at ``params``, by one Jacobian-vector product: ``J`` is never formed. A Gaussian over the
    parameters is then a Gaussian over the outputs (Khan et al. 2019; Immer et al. 2021, eq. 9).

    Args:
        fn: Pure model ``fn(params, x) -> outputs``.
        params: Where to expand.

    Returns:
        A pure model, evaluated like ``fn``: by ``predict``, say. What is ``Fixed``, or of integers, is
        not expanded in: it is taken from ``p``, if it is there.

    Raises:
        TypeError: If ``fn`` is not a function of ``(params, x)``.
        ValueError: If ``params`` holds no parameter; when it is called, if ``p`` has other ones.

    Example:
        >>> import torch, funcbayes as fb
        >>> fn = lambda params, x: x * params["w"] ** 2
        >>> fn_lin = fb.linearize(fn, {"w": torch.tensor(3.0)})
        >>> fn_lin({"w": torch.tensor(4.0)}, torch.tensor(1.0))  # 9 + 6 * (4 - 3)
        tensor(15.)
    """
    check_model(fn, "linearize")
    if not parameters_of(params):
        raise ValueError("`linearize(fn, params)` should be given at least one parameter, got none.")
    return LinearizedModel(fn, params)


@dataclass(frozen=True, eq=False)
class LinearizedModel:
    """A model linear in its parameters, made by :func:`linearize`.

    Attributes:
        fn: The model that was expanded.
        params: Where.
    """

    fn: Model
    params: Params

    def __repr__(self) -> str:
        return f"<linearized {self.fn!r}>"

    def __call__(self, params: Params, x: Any) -> Any:
        """Evaluate ``fn(self.params, x) + J (params - self.params)``."""
        location, given = parameters_of(self.params), parameters_of(params)
        differing = difference(given, location)
        if differing:
            raise ValueError(
                f"`fn_lin(params, x)` should be given parameters like those it expands at; {differing}."
            )
        # Leaves that are the point itself (taken from `params`, where a posterior does not cover them) need
        # no tangent, and none is worth a pass through the layers before the first that has one.
        names = [name for name in location if given[name] is not location[name]]
        others = merge(self.params, select(params, lambda name, leaf: name not in names))
        if not names:
            return self.fn(others, x)
        center = map_named(
            lambda name, leaf: leaf.to(given[name].dtype),  # in which `params` may have been converted
            select(self.params, lambda name, leaf: name in names),
        )
        deviation = map_named(lambda name, leaf: given[name] - leaf, center)
        return _expanded(self.fn, others, center, deviation, x)


@pytree_dataclass
class Linearization:
    """An effect on how a model is called: it is replaced by its first-order expansion in some parameters.

    Attributes:
        center: Values of these parameters, around which it is expanded; with a leading axis, one a draw.
            All other leaves are held where the draw, or ``params``, has them.
        label: Numbers of the components of mixtures, outermost first, whose center this is. Draws of one
            pass have one label, and so one center: the model is evaluated there once, not once a draw.
    """

    center: Params
    label: tuple[int, ...] = static(default=())

    def of_component(self, k: int) -> "Linearization":
        """The same in component ``k`` of a mixture."""
        return replace(self, label=(k, *self.label))

    def restricted(self, keep: Callable[[str, Any], bool]) -> "Linearization":
        """The part of it in the parameters that satisfy ``keep(path, leaf)``."""
        return replace(self, center=select(self.center, keep))


def with_linearization(
    fn: Model, effects: Sequence[Linearization], dtype: torch.dtype | None = None
) -> Callable[[Params, Any], Any]:
    """``fn`` expanded around the centers of all effects at once.

    Args:
        fn: Pure model.
        effects: Over different parameters; unbatched (or batched by a surrounding ``vmap``).
        dtype: In which to evaluate ``fn``. Deviations from the center are found before they are rounded to
            it, because they may be smaller than what is rounded off of a parameter.

    Returns:
        A function of ``(params, x)``, with all parameters of the centers in ``params``.
    """
    center = functools.reduce(merge, (effect.center for effect in effects), MISSING)

    def expanded(params: Params, x: Any) -> Any:
        given = parameters_of(params)
        deviation = map_named(lambda name, leaf: given[name] - leaf, center)
        if dtype is None:
            return _expanded(fn, params, center, deviation, x)
        at, change = (map_leaves(lambda leaf: leaf.to(dtype), tree) for tree in (center, deviation))
        return _expanded(fn, params, at, change, x)

    return expanded


def _expanded(fn: Model, params: Params, center: Params, deviation: Params, x: Any) -> Any:
    """``f + J deviation``, with ``f`` and its Jacobian at ``params`` that have ``center`` in their place."""
    leaves, structure = optree.tree_flatten(center)

    def at(*values: Tensor) -> Any:
        with Unfused():
            return fn(merge(params, structure.unflatten(values)), x)

    load_forward_rules()
    pushed: Any = jvp(at, tuple(leaves), tuple(optree.tree_leaves(deviation)))
    return optree.tree_map(torch.add, *pushed)
