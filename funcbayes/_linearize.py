"""First-order Taylor models."""

from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor
from torch.func import jvp

from ._checks import check_model
from ._functional import Model
from ._functorch import load_forward_rules
from ._intercept import UnfusedAttention
from ._tree import Params, difference, map_named, merge, parameters_of, select


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
        chosen = map_named(
            lambda name, leaf: leaf.to(given[name].dtype),  # in which `params` may have been converted
            select(self.params, lambda name, leaf: name in names),
        )
        leaves, structure = optree.tree_flatten(chosen)
        tangents = [given[name] - leaf for name, leaf in parameters_of(chosen).items()]

        def at(*values: Tensor) -> Any:
            with UnfusedAttention():
                return self.fn(merge(others, structure.unflatten(values)), x)

        load_forward_rules()
        pushed: Any = jvp(at, tuple(leaves), tuple(tangents))
        return optree.tree_map(torch.add, *pushed)
