"""The covariance of a linearised model's outputs, ``J S J^T``, by structure of the covariance ``S``.

The Jacobian ``J`` is not formed where layers do: for a Kronecker or diagonal covariance the gradient of a
linear layer is an outer product, and so what it adds is a product of small matrices.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import jvp, vmap

from ._functorch import load_forward_rules
from ._intercept import UnfusedAttention
from ._jacobian import Block, RowGradients, blocks
from ._tree import Params, map_leaves, map_named, named_leaves
from .covariances import Covariance, Dense, Diagonal, Kronecker, LowRankPlusDiagonal, LowRankPrecision
from .covariances._flat import ravel_columns

Model = Any
Form = Literal["variance", "covariance", "joint"]
_PUSHED_BYTES = 64 << 20  # of tangents of the outputs, so many columns at a time


@dataclass(frozen=True)
class Jacobian:
    """The Jacobian of the outputs of some rows in the covered leaves, ``(N F, P)``, as what multiplies it.

    ``F`` is the number of outputs of a row, all axes flattened.

    Attributes:
        fn: Pure model.
        params: Where.
        block: The rows.
        gradients: Of every output, by leaf: ``K = F`` columns.
    """

    fn: Model
    params: Params
    block: Block
    gradients: Mapping[str, RowGradients]

    @property
    def num_outputs(self) -> int:
        """``F``."""
        return self.block.outputs.shape[2:].numel()

    def times(self, factors: Mapping[str, Tensor]) -> Tensor:
        """``J factors`` for leaves ``(*s, R)``: ``(N, F, R)``."""
        rank = next(iter(factors.values())).shape[-1]
        if rank > 2 * self.num_outputs:  # then backwards is shorter
            parts = [
                gradient.matrices()[0].flatten(2) @ factors[name].reshape(-1, rank)
                for name, gradient in self.gradients.items()
                if name in factors
            ]
            if parts:
                return functools.reduce(torch.add, parts)
        at = {name: leaf.detach() for name, leaf in named_leaves(self.params).items() if name in factors}

        def outputs(leaves: dict[str, Tensor]) -> Tensor:
            given = map_named(lambda name, leaf: leaves.get(name, leaf), self.params)
            with UnfusedAttention():
                return self.fn(given, self.block.x)

        def pushed(tangents: dict[str, Tensor]) -> Tensor:
            return jvp(outputs, (at,), (tangents,))[1]

        load_forward_rules()
        columns = {name: leaf.movedim(-1, 0) for name, leaf in factors.items()}
        size = max(_PUSHED_BYTES // max(self.block.outputs.nbytes, 1), 1)
        found = [
            vmap(pushed)({name: leaf[start : start + size] for name, leaf in columns.items()})
            for start in range(0, rank, size)
        ]
        _, count, *_ = self.block.outputs.shape
        if not found:
            return self.block.outputs.new_zeros(count, self.num_outputs, 0)
        return torch.cat(found).reshape(rank, count, -1).movedim(0, -1)


Pair = tuple[Tensor, Tensor, int]  # A, B (N, F, R) and a sign: adds sign A B^T
Terms = Iterator[Pair]


def jacobians(
    fn: Model, params: Params, names: Sequence[str], x: Any, *, call: str, whole: bool = False
) -> Iterator[Jacobian]:
    """The Jacobian, some rows at a time.

    Args:
        fn: Pure model.
        params: Where.
        names: The covered leaves.
        x: Inputs.
        call: How the user called us, for messages.
        whole: Whether all rows are wanted at once.
    """
    limit = 1 << 62 if whole else None
    params, x = map_leaves(_detached, params), map_leaves(_detached, x)
    for block in blocks(
        fn, params, names, x, num_columns=lambda event: event.numel(), call=call, max_bytes=limit
    ):
        _, count, *event = block.outputs.shape
        size = math.prod(event)
        units = torch.eye(size, dtype=block.outputs.dtype, device=block.outputs.device)
        columns = units.reshape(size, 1, 1, *event).expand(size, 1, count, *event)
        yield Jacobian(fn, params, block, block.gradients(columns))


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def gathered(terms: Terms, like: Tensor, form: Form) -> Tensor:
    """Add up pairs.

    Args:
        terms: Pairs.
        like: Outputs ``(N, F)``.
        form: ``"variance"`` for the diagonal ``(N, F)``, ``"covariance"`` for ``(N, F, F)``, ``"joint"`` for
            ``(N F, N F)``.
    """
    count, size = like.shape
    shape = {"variance": (count, size), "covariance": (count, size, size), "joint": (count * size,) * 2}[form]
    total = like.new_zeros(shape)
    for one, two, sign in terms:
        if form == "variance":
            total = total + sign * (one * two).sum(-1)
        elif form == "covariance":
            total = total + sign * (one @ two.mT)
        else:
            total = total + sign * (one.flatten(0, 1) @ two.flatten(0, 1).mT)
    return total if form == "variance" else (total + total.mT) / 2


@functools.singledispatch
def covariance_terms(covariance: Covariance, jacobian: Jacobian, form: Form) -> Terms:
    """Pairs that add up to ``J S J^T``.

    Args:
        covariance: ``S``.
        jacobian: ``J``.
        form: What they are for: products between rows need gradients that are formed.
    """
    del jacobian, form
    raise NotImplementedError(
        f"The linearised predictive is not implemented for {type(covariance).__name__}."
    )


@covariance_terms.register
def _(covariance: Diagonal, jacobian: Jacobian, form: Form) -> Terms:
    return independent_terms(named_leaves(covariance.variance), jacobian, form)


@covariance_terms.register
def _(covariance: LowRankPlusDiagonal, jacobian: Jacobian, form: Form) -> Terms:
    yield from independent_terms(named_leaves(covariance.variance), jacobian, form)
    pushed = jacobian.times(named_leaves(covariance.factors))
    yield pushed, pushed, 1


@covariance_terms.register
def _(covariance: Dense, jacobian: Jacobian, form: Form) -> Terms:
    del form
    pushed = jacobian.times(named_leaves(covariance.factors))
    yield pushed, pushed, 1


@covariance_terms.register
def _(covariance: LowRankPrecision, jacobian: Jacobian, form: Form) -> Terms:
    # With D = diag(precision) and D^-1/2 F = Q diag(s) W^T,
    #     (D + F F^T)^-1 = D^-1/2 [(I - Q Q^T) + Q diag(1 / (1 + s^2)) Q^T] D^-1/2:
    # what the factors say nothing of keeps the prior's variance.
    precision = named_leaves(covariance.precision)
    yield from independent_terms({name: 1 / leaf for name, leaf in precision.items()}, jacobian, form)
    factors = named_leaves(covariance.factors)
    if not next(iter(factors.values())).shape[-1]:
        return
    whitened = {name: leaf * precision[name].rsqrt().unsqueeze(-1) for name, leaf in factors.items()}
    columns = ravel_columns(whitened, whitened)
    squares, turn = torch.linalg.eigh(columns.mT @ columns)
    squares = squares.clamp_min(0)
    # D^-1 F W diag(1 / s) has the columns D^-1/2 Q. Where s is nothing, neither is there anything to take
    # away: 1 - 1 / (1 + s^2) = s^2 / (1 + s^2) has the 1 / s^2 in it.
    shrink = (1 / (1 + squares)).sqrt()
    turned = {
        name: (leaf / precision[name].unsqueeze(-1)) @ (turn * shrink).to(leaf.dtype)
        for name, leaf in factors.items()
    }
    pushed = jacobian.times(turned)
    yield pushed, pushed, -1


@covariance_terms.register
def _(covariance: Kronecker, jacobian: Jacobian, form: Form) -> Terms:
    turned = in_bases(jacobian, named_leaves(covariance.output_basis), named_leaves(covariance.input_basis))
    return independent_terms(named_leaves(covariance.variance), turned, form)


def in_bases(jacobian: Jacobian, outputs: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Jacobian:
    """The Jacobian in Kronecker eigenbases of the leaves; a basis that is not there is the identity."""
    gradients = {
        name: gradient.turned(*(_for_one(basis.get(name), jacobian) for basis in (outputs, inputs)))
        for name, gradient in jacobian.gradients.items()
    }
    return Jacobian(jacobian.fn, jacobian.params, jacobian.block, gradients)


def _for_one(basis: Tensor | None, jacobian: Jacobian) -> Tensor | None:
    return None if basis is None else basis.to(jacobian.block.outputs.dtype).unsqueeze(0)


def independent_terms(variance: Mapping[str, Tensor], jacobian: Jacobian, form: Form) -> Terms:
    """Terms of parameters, or coordinates, that are independent."""
    for name, gradient in jacobian.gradients.items():
        if name not in variance:
            continue
        shape = gradient.shape
        own = variance[name].reshape(1, shape[:1].numel(), shape[1:].numel())
        if form == "joint":
            matrices = gradient.matrices()[0]
            yield (matrices * own).flatten(2), matrices.flatten(2), 1
        else:
            one, two = gradient.weighed(own.to(jacobian.block.outputs.dtype))
            yield one[0], two[0], 1
