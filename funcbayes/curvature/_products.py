"""Products of curvatures with vectors, without the curvature."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp, vmap

from .._functorch import jvp, load_forward_rules
from .._intercept import Unfused
from .._jacobian._blocks import parts_of
from .._jacobian._plan import plan_for
from .._tree import Params, Where, difference, map_named, named_leaves, select
from ..likelihoods import Likelihood
from ..training._batch import ready
from ..training._data import Data
from ._columns import Columns, ggn_columns
from ._data_term import DataTerm, data_term, with_unit_noise
from ._pass import Model, Problem, refuse_infinite

_BYTES = 256 << 20  # of the vectors that are multiplied at a time, and of what rows make of them
_AT_ONCE = 16

Vectors = dict[str, Tensor]  # leaves by path, (k, *s): k vectors


def ggn_matvec(
    fn: Model,
    params: Params,
    data: Data,
    likelihood: Likelihood,
    where: Where | None = None,
    *,
    batch_size: int | None = None,
) -> Callable[[Params], Params]:
    """Make the product with the generalised Gauss-Newton matrix ``sum_n J_n^T L_n J_n``.

    ``L_n`` is the Fisher of the likelihood in the outputs. One product is a Jacobian-vector and a
    vector-Jacobian product a batch (Schraudolph 2002, "Fast curvature matrix-vector products").

    Args:
        fn: Pure model.
        params: Its parameters.
        data: As in :func:`ggn`; it is gone through at every product.
        likelihood: What outputs say of targets, with the noise that it has.
        where: Which leaves; ``None`` for all.
        batch_size: Rows a batch, for data in tensors.

    Returns:
        ``v -> GGN v`` for trees like the covered parameters, **summed** over the data.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If data are empty, or ``where`` chooses no leaf; when called, if trees differ.

    Example:
        >>> import torch, funcbayes as fb
        >>> fn = lambda params, x: x @ params["w"]
        >>> x = torch.tensor([[1.0], [2.0]])
        >>> data = (x, torch.zeros(2, 1))
        >>> params = {"w": torch.ones(1, 1)}
        >>> product = fb.curvature.ggn_matvec(fn, params, data, fb.likelihoods.Normal(0.5))
        >>> product({"w": torch.ones(1, 1)})["w"]  # (1 + 4) / 0.5^2
        tensor([[20.]])
    """
    problem = Problem.of(fn, params, data, likelihood, where, call="ggn_matvec", batch_size=batch_size)
    columns = ggn_columns(likelihood, with_noise=True)
    return _on_trees(problem, lambda vectors: columns_product(problem, columns, vectors)[0])


def hvp(
    fn: Model,
    params: Params,
    data: Data,
    likelihood: Likelihood,
    where: Where | None = None,
    *,
    batch_size: int | None = None,
) -> Callable[[Params], Params]:
    """Make the product with the exact Hessian of ``-log p(D | theta)``, **summed** over the data.

    Args:
        fn: Pure model.
        params: Its parameters.
        data: As in :func:`ggn`; it is gone through at every product.
        likelihood: What outputs say of targets, with the noise that it has.
        where: Which leaves; ``None`` for all.
        batch_size: Rows a batch, for data in tensors.

    Returns:
        ``v -> H v`` for trees like the covered parameters.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If data are empty, or ``where`` chooses no leaf; when called, if trees differ.

    Example:
        >>> import torch, funcbayes as fb
        >>> fn = lambda params, x: x @ params["w"] ** 2
        >>> data = (torch.ones(1, 1), torch.zeros(1, 1))
        >>> product = fb.curvature.hvp(fn, {"w": torch.ones(1, 1)}, data, fb.likelihoods.Normal(1.0))
        >>> product({"w": torch.ones(1, 1)})["w"]  # the second derivative of w^4 / 2
        tensor([[6.]])
    """
    problem = Problem.of(fn, params, data, likelihood, where, call="hvp", batch_size=batch_size)
    return _on_trees(problem, lambda vectors: hessian_product(problem, vectors, likelihood)[0])


def _on_trees(problem: Problem, product: Callable[[Vectors], Vectors]) -> Callable[[Params], Params]:
    covered = select(problem.params, lambda name, leaf: name in problem.names)

    def matvec(vector: Params) -> Params:
        differing = difference(vector, covered)
        if differing:
            raise ValueError(
                f"A product of `{problem.call}` should be given a vector like the parameters; {differing}."
            )
        leaves = named_leaves(vector)
        with torch.inference_mode(False):
            found = product({name: ready(leaves[name], None).unsqueeze(0) for name in problem.names})
        return map_named(lambda name, _: found[name][0], covered)

    return matvec


def columns_product(problem: Problem, columns: Columns, vectors: Vectors) -> tuple[Vectors, DataTerm]:
    """The product with the squared gradients of columns, for vectors ``(k, *s)``, and the log likelihood."""

    def product(
        f: Callable[[Vectors], Tensor], y: Tensor, first_row: int, at: Vectors, some: Vectors
    ) -> Vectors:
        pulled: Any = vjp(f, at)
        outputs, pull = pulled
        roots = columns.roots(outputs, y, first_row)
        axes = columns.axes(outputs)

        def one(vector: Vectors) -> Vectors:
            terms = roots * jvp(f, (at,), (vector,))[1]
            coefficients = terms.sum(axes, keepdim=True) if axes else terms
            return pull((coefficients * roots).sum(0))[0]

        return _mapped(one, some)

    return _over_data(problem, vectors, product, columns.count, columns.noise_power)


def hessian_product(
    problem: Problem, vectors: Vectors, likelihood: Likelihood | None = None
) -> tuple[Vectors, DataTerm]:
    """``H v`` for vectors ``(k, *s)``, likewise; of unit noise unless a likelihood is given."""
    unit = with_unit_noise(problem.likelihood) if likelihood is None else likelihood

    def product(
        f: Callable[[Vectors], Tensor], y: Tensor, first_row: int, at: Vectors, some: Vectors
    ) -> Vectors:
        del first_row

        def gradient(p: Vectors) -> Vectors:
            pulled: Any = vjp(lambda q: -unit.log_likelihood(f(q), y), p)
            return pulled[1](torch.ones_like(pulled[0]))[0]

        try:
            return _mapped(lambda vector: jvp(gradient, (at,), (vector,))[1], some)
        except NotImplementedError:  # some backward passes have no forward mode, but can be differentiated
            pulled: Any = vjp(gradient, at)
            return _mapped(lambda vector: pulled[1](vector)[0], some)

    return _over_data(problem, vectors, product, lambda event: 1, 2)


def _over_data(
    problem: Problem,
    vectors: Vectors,
    product: Callable[..., Vectors],
    num_columns: Callable[[torch.Size], int],
    noise_power: int,
) -> tuple[Vectors, DataTerm]:
    load_forward_rules()
    at = {name: leaf.detach() for name, leaf in problem.leaves.items()}
    total = {name: torch.zeros_like(leaf) for name, leaf in vectors.items()}
    terms: DataTerm | None = None
    row = 0
    with torch.no_grad():
        for number, x, y in problem.shown_batches():
            num_vectors, num_rows = _at_once(problem, x, vectors, num_columns)
            for rows, own in parts_of(x, num_rows):
                targets, f = y[rows], functools.partial(_outputs, problem, own)
                outputs = f(at)
                problem.likelihood.check(outputs, targets, call=problem.quoted(number))
                term = data_term(problem.likelihood, outputs.unsqueeze(0), targets, noise_power)
                refuse_infinite(outputs, term, number, problem.call)
                terms = term if terms is None else terms + term
                for start in range(0, len(next(iter(vectors.values()))), num_vectors):
                    part = slice(start, start + num_vectors)
                    some = {name: leaf[part] for name, leaf in vectors.items()}
                    for name, leaf in product(f, targets, row, at, some).items():
                        total[name][part] += leaf
                row += len(targets)
            if not all(bool(leaf.isfinite().all()) for leaf in total.values()):
                raise RuntimeError(
                    f"A product with the curvature in `{problem.call}` is not finite in batch {number}, "
                    "though its loss is. float64, or smaller outputs, may help."
                )
    assert terms is not None
    return total, terms


def _at_once(
    problem: Problem, x: Any, vectors: Vectors, num_columns: Callable[[torch.Size], int]
) -> tuple[int, int]:
    """How many vectors, and rows, there is room for at a time."""
    plan = plan_for(problem.fn, problem.params, problem.names, x, problem.call, tells=False)
    limit = _BYTES if problem.max_bytes is None else problem.max_bytes
    itemsize = next(iter(vectors.values())).itemsize
    of_vector = max(4 * sum(leaf[0].nbytes for leaf in vectors.values()), 1)
    # What a row keeps of the model, and the tangents and gradients that each vector makes of that.
    of_row = 2 * itemsize * max(plan.numel + num_columns(plan.event) * plan.event.numel(), 1)
    num_vectors = max(min(limit // of_vector, limit // (2 * of_row), _AT_ONCE), 1)
    return num_vectors, max(limit // ((2 * num_vectors + 1) * of_row), 1)


def _outputs(problem: Problem, x: Any, leaves: Vectors) -> Tensor:
    given = map_named(lambda name, leaf: leaves.get(name, leaf), problem.params)
    with Unfused():
        return problem.fn(given, x)


def _mapped(product: Callable[[Vectors], Vectors], vectors: Vectors) -> Vectors:
    if len(next(iter(vectors.values()))) == 1:  # vmap costs time, and asks for batching rules
        found = product({name: leaf[0] for name, leaf in vectors.items()})
        return {name: leaf.unsqueeze(0) for name, leaf in found.items()}
    return vmap(product)(vectors)
