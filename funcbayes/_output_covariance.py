"""The covariance of a linearised model's outputs, ``J S J^T``, by structure of the covariance ``S``.

The Jacobian ``J`` is not formed where layers do: for a Kronecker or diagonal covariance the gradient of a
linear layer is an outer product, and so what it adds is a product of small matrices.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import vmap

from ._functional import Model
from ._functorch import is_traced, jvp, load_forward_rules
from ._intercept import Unfused
from ._jacobian import Block, RowGradients, blocks
from ._jacobian._gram import gram, is_plain, sides
from ._jacobian._slices import formed, variances, weighed
from ._tree import Params, map_leaves, map_named, named_leaves
from .covariances import Covariance, Dense, Diagonal, Kronecker, LowRankPlusDiagonal, LowRankPrecision
from .covariances._flat import as_double, ravel_columns
from .covariances._operator import root_of_capacitance

Form = Literal["variance", "covariance", "joint"]
_PUSHED_BYTES = 64 << 20  # of tangents of the outputs, so many columns at a time


@dataclass(frozen=True)
class Jacobian:
    """The Jacobian of the outputs of some rows in the covered leaves, ``(N F, P)``, as what multiplies it.

    ``F`` is the number of outputs of a row that are covered.

    Attributes:
        fn: Pure model.
        params: Where.
        block: The rows.
        covered: Which of the outputs of a row, all axes flattened.
        output_basis: Bases in which gradients are, by leaf ``(d_out, d_out)``; one that is not there is the
            identity.
        input_basis: Likewise ``(d_in, d_in)``.
    """

    fn: Model
    params: Params
    block: Block
    covered: Sequence[int]
    output_basis: Mapping[str, Tensor] = field(default_factory=dict)
    input_basis: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def num_outputs(self) -> int:
        """``F``."""
        return len(self.covered)

    @functools.cached_property
    def gradients(self) -> Mapping[str, RowGradients]:
        """Of every output, by leaf: ``K = F`` columns."""
        outputs = self.block.outputs
        _, count, *event = outputs.shape
        units = outputs.new_zeros(self.num_outputs, math.prod(event))
        units[range(self.num_outputs), self.covered] = 1
        columns = units.reshape(-1, 1, 1, *event).expand(-1, 1, count, *event)
        bases = self.output_basis, self.input_basis
        return {
            name: gradient.turned(*(_for_one(basis.get(name), self) for basis in bases))
            if any(bases)
            else gradient
            for name, gradient in self.block.gradients(columns).items()
        }

    def pieces(self) -> Iterator["Jacobian"]:
        """The same, of as many outputs each as there is room for."""
        size = self.block.num_columns
        if size >= self.num_outputs:
            yield self
            return
        for start in range(0, self.num_outputs, size):
            yield replace(self, covered=self.covered[start : start + size])

    def is_short(self, rank: int) -> bool:
        """Whether the model has so few outputs that a product is found backwards, from the gradients."""
        return rank > 2 * self.num_outputs

    def times(self, factors: Mapping[str, Tensor]) -> Tensor:
        """``J factors`` for leaves ``(*s, R)``: ``(N, F, R)``."""
        rank = next(iter(factors.values())).shape[-1]
        if self.is_short(rank):
            return self.times_formed(factors, self.block.outputs.dtype)
        at = {name: leaf.detach() for name, leaf in named_leaves(self.params).items() if name in factors}

        def outputs(leaves: dict[str, Tensor]) -> Tensor:
            given = map_named(lambda name, leaf: leaves.get(name, leaf), self.params)
            with Unfused():
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
        return torch.cat(found).reshape(rank, count, -1)[..., self.covered].movedim(0, -1)

    def times_formed(
        self, factors: Mapping[str, Tensor], dtype: torch.dtype, std: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """``J diag(std) factors`` from the gradients, in a dtype: ``(N, F, R)``."""
        count, rank = self.block.outputs.shape[1], next(iter(factors.values())).shape[-1]
        total = torch.zeros(count, self.num_outputs, rank, dtype=dtype, device=self.block.outputs.device)
        for name in factors.keys() & self.gradients.keys():
            own = _by_first_axis(factors[name], 1, dtype)  # (d_out, d_in, R)
            if not is_plain(self.gradients[name]):
                for matrices, part in self.parts(name, dtype, std):
                    total = total + matrices @ own[part].flatten(0, 1)
                continue
            left, right = sides(self.gradients[name], dtype)
            size = max(_PUSHED_BYTES // max(count * rank * dtype.itemsize, 1), 1)
            for start in range(0, len(own), size):
                part = slice(start, start + size)
                some = own[part]
                if std is not None:
                    some = some * _by_first_axis(std[name], 0, dtype)[part].unsqueeze(-1)
                total = total + left[..., part] @ (right @ some).movedim(1, 0)  # (N, F, o) @ (N, o, R)
        return total

    def parts(
        self, name: str, dtype: torch.dtype, std: Mapping[str, Tensor] | None = None
    ) -> Iterator[tuple[Tensor, slice]]:
        """``J diag(std)`` of parts of a leaf's first axis, ``(N, F, P)``, and which these are."""
        for part, matrices in formed(self.gradients[name], dtype):
            if std is not None:
                matrices *= _by_first_axis(std[name], 0, dtype)[part].flatten()
            yield matrices, part


def _by_first_axis(leaf: Tensor, behind: int, dtype: torch.dtype) -> Tensor:
    """A leaf as a matrix ``(d_out, d_in)``, ``behind`` which it has further axes."""
    shape, own = leaf.shape[: leaf.ndim - behind], leaf.shape[leaf.ndim - behind :]
    return leaf.reshape(shape[:1].numel(), shape[1:].numel(), *own).to(dtype)


Terms = Iterator[Tensor]  # of the shape of a form


def jacobians(
    fn: Model,
    params: Params,
    names: Sequence[str],
    x: Any,
    *,
    call: str,
    whole: bool = False,
    max_bytes: int | None = None,
) -> Iterator[Jacobian]:
    """The Jacobian, some rows at a time.

    Args:
        fn: Pure model.
        params: Where.
        names: The covered leaves.
        x: Inputs.
        call: How the user called us, for messages.
        whole: Whether all rows are wanted at once.
        max_bytes: Bytes that the gradients of one block may have.
    """
    limit = 1 << 62 if whole else max_bytes
    params, x = map_leaves(_detached, params), map_leaves(_detached, x)
    for block in blocks(
        *(fn, params, names, x),
        num_columns=lambda event: event.numel(),
        call=call,
        max_bytes=limit,
    ):
        yield Jacobian(fn, params, block, range(block.outputs.shape[2:].numel()))


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def gathered(terms: Terms, like: Tensor, form: Form) -> Tensor:
    """Add up terms, and round what they are to the dtype of the outputs.

    Args:
        terms: Terms.
        like: Outputs ``(N, F)``.
        form: ``"variance"`` for the diagonal ``(N, F)``, ``"covariance"`` for ``(N, F, F)``, ``"joint"`` for
            ``(N F, N F)``.
    """
    count, size = like.shape
    shape = {"variance": (count, size), "covariance": (count, size, size), "joint": (count * size,) * 2}[form]
    total = functools.reduce(torch.add, terms, like.new_zeros(shape))
    return (total if form == "variance" else (total + total.mT) / 2).to(like.dtype)


def contracted(one: Tensor, two: Tensor, form: Form) -> Tensor:
    """``A B^T`` of ``(N, F, R)``, or what a form wants of it."""
    if form == "variance":
        return (one * two).sum(-1)
    if form == "covariance":
        return torch.bmm(one, two.mT)  # `@` takes six calls for it
    return one.flatten(0, 1) @ two.flatten(0, 1).mT


def by_outputs(terms: Callable[[Jacobian], Terms], jacobian: Jacobian, form: Form) -> Terms:
    """Terms that need gradients: variances are found for as many outputs at a time as there is room for.

    Args:
        terms: Given a Jacobian.
        jacobian: That of all outputs.
        form: What is wanted of the terms.
    """
    if form != "variance":
        yield from terms(jacobian)
        return
    outputs = jacobian.block.outputs
    yield torch.cat(
        [
            functools.reduce(torch.add, terms(piece), outputs.new_zeros(outputs.shape[1], piece.num_outputs))
            for piece in jacobian.pieces()
        ],
        1,
    )


@functools.singledispatch
def covariance_terms(covariance: Covariance, jacobian: Jacobian, form: Form) -> Terms:
    """Terms that add up to ``J S J^T``.

    Args:
        covariance: ``S``.
        jacobian: ``J``.
        form: What is wanted of it.
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
    yield from _terms_of_factors(named_leaves(covariance.factors), jacobian, form)


@covariance_terms.register
def _(covariance: Dense, jacobian: Jacobian, form: Form) -> Terms:
    return _terms_of_factors(named_leaves(covariance.factors), jacobian, form)


def _terms_of_factors(factors: Mapping[str, Tensor], jacobian: Jacobian, form: Form) -> Terms:
    def terms(jacobian: Jacobian) -> Terms:
        pushed = jacobian.times(factors)
        yield contracted(pushed, pushed, form)

    is_short = jacobian.is_short(next(iter(factors.values())).shape[-1])
    return by_outputs(terms, jacobian, form) if is_short else terms(jacobian)


@covariance_terms.register
def _(covariance: LowRankPrecision, jacobian: Jacobian, form: Form) -> Terms:
    precision, factors = named_leaves(covariance.precision), named_leaves(covariance.factors)
    if not next(iter(factors.values())).shape[-1]:
        yield from independent_terms({name: 1 / leaf for name, leaf in precision.items()}, jacobian, form)
        return
    # With M = D^-1/2 F for D = diag(precision), I + M^T M = L L^T and Q = M L^-T, which has no singular value
    # above one,
    #     (I + M M^T)^-1 = I - Q Q^T = (I - Q Q^T)^2 + Q (L^T L)^-1 Q^T.
    # The difference is cheap; the sum does not cancel where factors are very large.
    std = {name: as_double(leaf).rsqrt() for name, leaf in precision.items()}
    whitened = {name: as_double(leaf) * std[name].unsqueeze(-1) for name, leaf in factors.items()}
    columns = ravel_columns(whitened, whitened)
    lower = root_of_capacitance(columns)
    seen = torch.linalg.solve_triangular(lower, columns.mT, upper=False).mT
    parts = seen.split([leaf.shape[:-1].numel() for leaf in factors.values()])
    basis = {name: part.reshape(factors[name].shape) for name, part in zip(factors, parts, strict=True)}

    def terms(jacobian: Jacobian) -> Terms:
        along, found = outside(jacobian, std, basis, form)
        if found is None:
            found = functools.reduce(torch.add, residual_terms(jacobian, std, basis, along, form))
            along = torch.linalg.solve_triangular(lower, along, upper=False, left=False)
            found = found + contracted(along, along, form)
        yield found

    yield from by_outputs(terms, jacobian, form)


def outside(
    jacobian: Jacobian, std: Mapping[str, Tensor], basis: Mapping[str, Tensor], form: Form
) -> tuple[Tensor, Tensor | None]:
    """Find ``B (I - Q Q^T) B^T`` for ``B = J diag(std)``.

    Its two terms are of the same gradients and in double precision: they may nearly cancel.

    Args:
        jacobian: ``J``.
        std: By leaf ``s``.
        basis: ``Q``, leaves ``(*s, R)``, with no singular value above one.
        form: What is wanted of it.

    Returns:
        ``B Q``, ``(N, F, R)``, and the difference; ``None`` if more than half of its digits are lost.
    """
    outputs = jacobian.block.outputs[0]
    flat = as_double(outputs.reshape(len(outputs), -1)[:, jacobian.covered])
    along = jacobian.times_formed(basis, flat.dtype, std)
    variance = {name: leaf.square() for name, leaf in std.items()}
    whole = gathered(independent_terms(variance, jacobian, form, dtype=flat.dtype), flat, form)
    found = whole - contracted(along, along, form)
    one, two = (t if form == "variance" else t.diagonal(dim1=-2, dim2=-1) for t in (whole, found))
    is_lost = is_traced() or bool((two < torch.finfo(flat.dtype).eps ** 0.5 * one).any())
    return along, None if is_lost else found


def residual_terms(
    jacobian: Jacobian, std: Mapping[str, Tensor], basis: Mapping[str, Tensor], along: Tensor, form: Form
) -> Terms:
    """Terms that add up to ``(B - B Q Q^T) (B - B Q Q^T)^T``, in which nothing cancels: see :func:`outside`.

    They need gradients that are formed.
    """
    dtype = along.dtype
    for name, columns in basis.items():
        if name not in jacobian.gradients:
            columns = columns.reshape(-1, columns.shape[-1]).to(dtype)
            yield contracted(along @ (columns.mT @ columns), along, form)
            continue
        for matrices, part in jacobian.parts(name, dtype, std):
            beside = matrices - along @ _by_first_axis(columns, 1, dtype)[part].flatten(0, 1).mT
            yield contracted(beside, beside, form)


@covariance_terms.register
def _(covariance: Kronecker, jacobian: Jacobian, form: Form) -> Terms:
    turned = in_bases(jacobian, named_leaves(covariance.output_basis), named_leaves(covariance.input_basis))
    return independent_terms(named_leaves(covariance.variance), turned, form)


def in_bases(jacobian: Jacobian, outputs: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Jacobian:
    """The Jacobian in Kronecker eigenbases of the leaves; a basis that is not there is the identity."""
    return replace(jacobian, output_basis=outputs, input_basis=inputs)


def _for_one(basis: Tensor | None, jacobian: Jacobian) -> Tensor | None:
    return None if basis is None else basis.to(jacobian.block.outputs.dtype).unsqueeze(0)


def independent_terms(
    variance: Mapping[str, Tensor], jacobian: Jacobian, form: Form, *, dtype: torch.dtype | None = None
) -> Terms:
    """Terms of parameters, or coordinates, that are independent.

    Args:
        variance: By leaf, one number or like the leaf.
        jacobian: ``J``.
        form: What is wanted of the terms.
        dtype: What to compute in; ``None`` for that of the outputs.
    """
    return by_outputs(lambda some: _independent_terms(variance, some, form, dtype), jacobian, form)


def _independent_terms(
    variance: Mapping[str, Tensor], jacobian: Jacobian, form: Form, dtype: torch.dtype | None
) -> Terms:
    dtype = jacobian.block.outputs.dtype if dtype is None else dtype
    for name, gradient in jacobian.gradients.items():
        if name not in variance:
            continue
        if form == "joint":
            gradients = [gradient]
            yield gram(gradients, gradients, variance[name].to(dtype))
            continue
        own = variance[name] if variance[name].ndim else variance[name].expand(gradient.shape)
        own = own.reshape(1, gradient.shape[:1].numel(), gradient.shape[1:].numel()).to(dtype)
        if form == "variance":
            yield from (found[0] for found in variances(gradient, own))
            continue
        for one, two in weighed(gradient, own):
            yield contracted(one[0], two[0], form)
