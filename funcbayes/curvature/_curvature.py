"""The curvatures of a model on data, by what they are and by structure."""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Literal, get_args

import torch

from .._checks import positive_int
from .._jacobian import UnmappableError
from .._random import Seed, resolve_seed
from .._tree import Params, Where, index, named_leaves, stack
from .._warning import levels_to_the_user
from ..likelihoods import Likelihood
from ..training._data import Data
from ._columns import Columns, empirical_columns, fisher_columns, ggn_columns
from ._data_term import DataTerm
from ._low_rank import largest_eigenpairs
from ._pass import Model, Problem, go_through
from ._products import Vectors, columns_product, hessian_product
from ._structures import Curvature, Diag, EigenKron, Full, Kron, LowRank
from ._sums import DiagSums, FullSums, KronSums, TurnedSums, WeightSharing

Kind = Literal["ggn", "fisher", "empirical_fisher", "hessian"]
Structure = Literal["diag", "kron", "low_rank", "full"]
_UNIT_VECTORS = 64  # multiplied at a time
DEFAULT_RANK = 20


def ggn(
    fn: Model,
    params: Params,
    data: Data,
    likelihood: Likelihood,
    structure: Structure = "kron",
    where: Where | None = None,
    *,
    weight_sharing: WeightSharing = "expand",
    eigenvalue_correction: bool = False,
    rank: int = DEFAULT_RANK,
    seed: Seed | None = None,
    batch_size: int | None = None,
    stacked: bool = False,
    max_bytes: int | None = None,
    progress: bool = False,
) -> Curvature:
    """Find the generalised Gauss-Newton matrix ``sum_n J_n^T L_n J_n``, exactly but for its structure.

    ``J_n`` is the Jacobian of the outputs of row ``n`` and ``L_n`` the Fisher of the likelihood in the
    outputs (Schraudolph 2002; Martens 2020, "New insights and perspectives on the natural gradient method",
    section 8). It is the Fisher of the model wherever outputs are natural parameters, and positive
    semi-definite always.

    Gradients are found through the layers: inputs and output gradients of linear, convolution, embedding and
    normalisation layers are enough, whatever function the model is. Leaves that are used in another way
    (tied, transposed, added) are differentiated row by row.

    Args:
        fn: Pure model ``fn(params, x) -> outputs (N, ...)``; the outputs of a row must depend on that row
            alone. One of ``make_functional`` is in evaluation mode, whatever mode its module was in.
        params: Where.
        data: An ``(x, y)`` tuple of tensors, ``x`` any pytree of tensors, or a re-iterable of such batches.
            Where there are several passes, as for ``"low_rank"``, each has to give the same rows.
        likelihood: ``p(y|f)``. For ``Normal`` with one noise the curvature is that of unit noise.
        structure: ``"diag"``; ``"kron"``, a Kronecker product for each leaf (KFAC; Martens & Grosse 2015, and
            Eschenhagen et al. 2023, "Kronecker-factored approximate curvature for modern neural network
            architectures", where a layer has many positions); ``"low_rank"``, the largest eigenvalues;
            ``"full"``.
        where: Which leaves are covered; ``None`` for all. The curvature is that with the others held.
        weight_sharing: For ``"kron"``: whether positions of a layer (pixels, tokens) are rows of their own
            (``"expand"``) or inputs are averaged and gradients summed over them (``"reduce"``). The positions
            of an embedding are always rows of their own.
        eigenvalue_correction: For ``"kron"``: replace the eigenvalues by the diagonal in the eigenbasis
            (EKFAC; George et al. 2018), in a second pass over the data.
        rank: For ``"low_rank"``: how many eigenvalues.
        seed: For ``"low_rank"``: of the random start of the eigensolver.
        batch_size: Rows a batch, for data in tensors; ``None`` leaves it to ``max_bytes``.
        stacked: Whether ``params`` are those of several networks, every leaf with a leading axis ``K``; all
            are gone through in one pass, but for ``"low_rank"``, and the result has a leading axis, too.
        max_bytes: Bytes that the gradients of a block of rows may take; ``None`` for 256 MiB.
        progress: Whether to show a bar over the batches.

    Returns:
        A curvature, **summed** over the data; see :class:`funcbayes.curvature.Curvature`. Those of two data
        sets add up: ``c_1 + c_2``.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If data are empty, rows of the outputs depend on other rows (BatchNorm in training mode),
            ``where`` chooses no parameter, or a second pass over the data gives other rows.
        RuntimeError: If a loss or the curvature is not finite; the batch is named.

    Example:
        >>> import torch, funcbayes as fb
        >>> fn, params = fb.make_functional(torch.nn.Linear(2, 1, bias=False))
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
        >>> c = fb.curvature.ggn(fn, params, (x, torch.zeros(2, 1)), fb.likelihoods.Normal(1.0), "full")
        >>> c.matrix  # x^T x
        tensor([[10.,  2.],
                [ 2.,  4.]])
    """
    return found_by(
        *("ggn", fn, params, data, likelihood, structure, where),
        call="curvature.ggn",
        weight_sharing=weight_sharing,
        eigenvalue_correction=eigenvalue_correction,
        rank=rank,
        seed=seed,
        batch_size=batch_size,
        stacked=stacked,
        max_bytes=max_bytes,
        progress=progress,
    )


def fisher(
    fn: Model,
    params: Params,
    data: Data,
    likelihood: Likelihood,
    structure: Structure = "kron",
    where: Where | None = None,
    *,
    mc_samples: int = 1,
    weight_sharing: WeightSharing = "expand",
    eigenvalue_correction: bool = False,
    rank: int = DEFAULT_RANK,
    seed: Seed | None = None,
    batch_size: int | None = None,
    stacked: bool = False,
    max_bytes: int | None = None,
    progress: bool = False,
) -> Curvature:
    """Estimate the Fisher: gradients of ``log p(y|f)`` at targets drawn from the model itself, squared.

    Its expectation is the Fisher that :func:`ggn` finds exactly; with many classes it costs less
    (Kunstner et al. 2019, "Limitations of the empirical Fisher approximation", eq. 2).

    Args:
        fn: As for :func:`ggn`.
        params: As for :func:`ggn`.
        data: As for :func:`ggn`; targets say only which positions are ignored.
        likelihood: As for :func:`ggn`.
        structure: As for :func:`ggn`.
        where: As for :func:`ggn`.
        mc_samples: Targets drawn for each row; the estimate is their average.
        weight_sharing: As for :func:`ggn`.
        eigenvalue_correction: As for :func:`ggn`.
        rank: As for :func:`ggn`.
        seed: Of the drawn targets: those of a row depend on it and on the row's number in the data, so give
            curvatures that are added different ones; and as for :func:`ggn`.
        batch_size: As for :func:`ggn`.
        stacked: As for :func:`ggn`.
        max_bytes: As for :func:`ggn`.
        progress: As for :func:`ggn`.

    Returns:
        A curvature, **summed** over the data.

    Raises:
        TypeError: As for :func:`ggn`.
        ValueError: As for :func:`ggn`, and if ``mc_samples`` is below 1.
        RuntimeError: As for :func:`ggn`.

    Example:
        >>> import torch, funcbayes as fb
        >>> fn, params = fb.make_functional(torch.nn.Linear(2, 3))
        >>> data = (torch.randn(8, 2), torch.randint(0, 3, (8,)))
        >>> c = fb.curvature.fisher(
        ...     fn, params, data, fb.likelihoods.Categorical(), "diag", mc_samples=4, seed=0
        ... )
        >>> c.diagonal["weight"].shape
        torch.Size([3, 2])
    """
    return found_by(
        *("fisher", fn, params, data, likelihood, structure, where),
        call="curvature.fisher",
        mc_samples=mc_samples,
        weight_sharing=weight_sharing,
        eigenvalue_correction=eigenvalue_correction,
        rank=rank,
        seed=seed,
        batch_size=batch_size,
        stacked=stacked,
        max_bytes=max_bytes,
        progress=progress,
    )


def empirical_fisher(
    fn: Model,
    params: Params,
    data: Data,
    likelihood: Likelihood,
    structure: Structure = "diag",
    where: Where | None = None,
    *,
    weight_sharing: WeightSharing = "expand",
    eigenvalue_correction: bool = False,
    rank: int = DEFAULT_RANK,
    seed: Seed | None = None,
    batch_size: int | None = None,
    stacked: bool = False,
    max_bytes: int | None = None,
    progress: bool = False,
) -> Curvature:
    """Add up the squared gradients of ``log p(y|f)`` at the observed targets.

    This is no Fisher, but what is left of it when targets are not drawn from the model; where the model fits
    the data it is far too small (Kunstner et al. 2019, section 3).

    Args:
        fn: As for :func:`ggn`.
        params: As for :func:`ggn`.
        data: As for :func:`ggn`.
        likelihood: As for :func:`ggn`. With ``Normal`` noise ``s`` the curvature is that of unit noise, and
            is divided by ``s^4`` when a posterior is made.
        structure: As for :func:`ggn`.
        where: As for :func:`ggn`.
        weight_sharing: As for :func:`ggn`.
        eigenvalue_correction: As for :func:`ggn`.
        rank: As for :func:`ggn`.
        seed: As for :func:`ggn`.
        batch_size: As for :func:`ggn`.
        stacked: As for :func:`ggn`.
        max_bytes: As for :func:`ggn`.
        progress: As for :func:`ggn`.

    Returns:
        A curvature, **summed** over the data.

    Raises:
        TypeError: As for :func:`ggn`.
        ValueError: As for :func:`ggn`.
        RuntimeError: As for :func:`ggn`.

    Example:
        >>> import torch, funcbayes as fb
        >>> fn = lambda params, x: x @ params["w"]
        >>> data = (torch.ones(1, 1), torch.tensor([[3.0]]))
        >>> normal = fb.likelihoods.Normal(1.0)
        >>> fb.curvature.empirical_fisher(fn, {"w": torch.ones(1, 1)}, data, normal).diagonal["w"]
        tensor([[4.]])
    """
    return found_by(
        *("empirical_fisher", fn, params, data, likelihood, structure, where),
        call="curvature.empirical_fisher",
        weight_sharing=weight_sharing,
        eigenvalue_correction=eigenvalue_correction,
        rank=rank,
        seed=seed,
        batch_size=batch_size,
        stacked=stacked,
        max_bytes=max_bytes,
        progress=progress,
    )


def hessian(
    fn: Model,
    params: Params,
    data: Data,
    likelihood: Likelihood,
    structure: Structure = "full",
    where: Where | None = None,
    *,
    rank: int = DEFAULT_RANK,
    seed: Seed | None = None,
    batch_size: int | None = None,
    stacked: bool = False,
    max_bytes: int | None = None,
    progress: bool = False,
) -> Curvature:
    """Find the exact Hessian of ``-log p(D|theta)``, by forward over reverse differentiation.

    It may be indefinite, even where training has ended; a prior that is too weak for it is refused when a
    posterior is made. ``"full"`` and ``"diag"`` take ``P`` Hessian-vector products.

    Args:
        fn: As for :func:`ggn`.
        params: As for :func:`ggn`.
        data: As for :func:`ggn`.
        likelihood: As for :func:`ggn`.
        structure: ``"full"``, ``"diag"``, or ``"low_rank"``, the largest eigenvalues, of which negative ones
            are left out, with a warning.
        where: As for :func:`ggn`.
        rank: As for :func:`ggn`.
        seed: As for :func:`ggn`.
        batch_size: As for :func:`ggn`.
        stacked: As for :func:`ggn`; the networks are gone through one after another.
        max_bytes: Bytes that the vectors multiplied at a time, and what a block of rows makes of them, may
            take; ``None`` for 256 MiB.
        progress: As for :func:`ggn`.

    Returns:
        A curvature, **summed** over the data.

    Raises:
        TypeError: As for :func:`ggn`.
        ValueError: As for :func:`ggn`; and for ``"kron"``, which is a form of sums of squares.
        RuntimeError: As for :func:`ggn`.

    Example:
        >>> import torch, funcbayes as fb
        >>> fn = lambda params, x: x @ params["w"] ** 2
        >>> data = (torch.ones(1, 1), torch.zeros(1, 1))
        >>> fb.curvature.hessian(fn, {"w": torch.ones(1, 1)}, data, fb.likelihoods.Normal(1.0)).matrix
        tensor([[6.]])
    """
    return found_by(
        *("hessian", fn, params, data, likelihood, structure, where),
        call="curvature.hessian",
        rank=rank,
        seed=seed,
        batch_size=batch_size,
        stacked=stacked,
        max_bytes=max_bytes,
        progress=progress,
    )


def found_by(
    kind: Kind,
    fn: Model,
    params: Params,
    data: Data,
    likelihood: Likelihood,
    structure: Structure,
    where: Where | None,
    *,
    call: str,
    mc_samples: int = 1,
    weight_sharing: WeightSharing = "expand",
    eigenvalue_correction: bool = False,
    rank: int = DEFAULT_RANK,
    seed: Seed | None = None,
    batch_size: int | None = None,
    stacked: bool = False,
    max_bytes: int | None = None,
    progress: bool = False,
) -> Curvature:
    """Find the curvature of a kind: what the functions of these names do, for a ``call`` of another name."""
    if kind == "hessian" and structure not in ("full", "diag", "low_rank"):
        raise ValueError(
            f"`{call}(structure=...)` of a Hessian should be 'full', 'diag' or 'low_rank', got "
            f"{structure!r}. A Kronecker product is a form of the GGN or the Fisher: `curvature.ggn(..., "
            "structure='kron')`."
        )
    if weight_sharing not in get_args(WeightSharing):
        raise ValueError(
            f"`{call}(weight_sharing=...)` should be 'expand' or 'reduce', got {weight_sharing!r}."
        )
    mc_samples = positive_int(mc_samples, f"{call}(mc_samples=...)")
    rank = positive_int(rank, f"{call}(rank=...)")
    if kind == "fisher" or structure == "low_rank":
        seed = resolve_seed(seed)
    problem = Problem.of(
        *(fn, params, data, likelihood, where),
        call=call,
        batch_size=batch_size,
        stacked=stacked,
        max_bytes=max_bytes,
        progress=progress,
    )
    if kind == "hessian":
        _check_use(rank, weight_sharing, structure, call)
        return _of_products(problem, structure, rank, seed)
    if kind == "fisher":
        assert seed is not None
        columns = fisher_columns(likelihood, mc_samples, int(seed))
    else:
        columns = (ggn_columns if kind == "ggn" else empirical_columns)(likelihood)
    return _of_columns(problem, columns, structure, weight_sharing, eigenvalue_correction, rank, seed)


def _check_use(rank: int, weight_sharing: WeightSharing, structure: Structure, call: str) -> None:
    """Refuse options that play no part."""
    if weight_sharing == "reduce" and structure != "kron":
        raise ValueError(
            f"`{call}(weight_sharing='reduce')` goes with `structure='kron'`, got {structure!r}."
        )
    if rank != DEFAULT_RANK and structure != "low_rank":
        raise ValueError(f"`{call}(rank={rank})` goes with `structure='low_rank'`, got {structure!r}.")


@torch.inference_mode(False)
def _of_products(problem: Problem, structure: Structure, rank: int, seed: Seed | None) -> Curvature:
    """The Hessian, from products with it."""
    problem = problem.for_passes(in_order=False)

    def of_one(problem: Problem) -> Curvature:
        def product(vectors: Vectors) -> tuple[Vectors, DataTerm]:
            return hessian_product(problem, vectors)

        if structure == "low_rank":
            return _low_rank(problem, product, rank, seed, may_be_indefinite=True)
        return _by_unit_vectors(problem, product, structure)

    return _one_by_one(problem, of_one)


@torch.inference_mode(False)
def _of_columns(
    problem: Problem,
    columns: Columns,
    structure: Structure,
    weight_sharing: WeightSharing,
    eigenvalue_correction: bool,
    rank: int,
    seed: Seed | None,
) -> Curvature:
    """A curvature that is a sum of squared gradients of columns."""
    if structure not in get_args(Structure):
        known = ", ".join(map(repr, get_args(Structure)))
        raise ValueError(f"`{problem.call}(structure=...)` should be one of {known}, got {structure!r}.")
    if eigenvalue_correction and structure != "kron":
        raise ValueError(
            f"`{problem.call}(eigenvalue_correction=True)` goes with `structure='kron'`, got {structure!r}."
        )
    _check_use(rank, weight_sharing, structure, problem.call)
    if structure == "low_rank" or eigenvalue_correction:
        problem = problem.for_passes(in_order=columns.by_row)
    if structure == "low_rank":
        return _one_by_one(
            problem,
            lambda one: _low_rank(one, functools.partial(columns_product, one, columns), rank, seed),
        )
    try:
        return _summed(problem, columns, structure, weight_sharing, eigenvalue_correction)
    except UnmappableError:  # if the error is the model's own, it comes again
        return _one_by_one(
            problem, lambda one: _summed(one, columns, structure, weight_sharing, eigenvalue_correction)
        )


def _summed(
    problem: Problem,
    columns: Columns,
    structure: Structure,
    weight_sharing: WeightSharing,
    eigenvalue_correction: bool,
) -> Curvature:
    shapes, members, leaves = problem.shapes, problem.members, problem.leaves
    if structure == "diag":
        squares = DiagSums(shapes, members, leaves)
        term = problem.scalars(go_through(problem, columns, [squares]))
        found = {name: total.reshape(members, *shapes[name]) for name, total in squares.found.items()}
        return Diag(problem.tree(found), term)
    if structure == "full":
        full = FullSums(shapes, members, leaves)
        term = problem.scalars(go_through(problem, columns, [full]))
        matrix = full.symmetric()
        like = {
            name: leaf.detach() if problem.num_members else leaf.detach()[None]
            for name, leaf in leaves.items()
        }
        return Full(matrix if problem.num_members else matrix[0], problem.tree(like), term)
    factors = KronSums(shapes, members, leaves, problem.looked, weight_sharing)
    term = problem.scalars(go_through(problem, columns, [factors]))
    sums = (factors.outputs, factors.inputs, factors.counts)
    output_sum, input_sum, count = map(problem.tree, sums)
    kron = Kron(output_sum, input_sum, count, term)
    if not eigenvalue_correction:
        return kron
    single = problem.num_members is None
    eigen = kron.eigen if single else stack([index(kron, k).eigen for k in range(members)])
    bases = [
        {name: basis[None] if single else basis for name, basis in named_leaves(tree).items()}
        for tree in (eigen.output_basis, eigen.input_basis)
    ]
    turned = TurnedSums(shapes, members, leaves, *bases)
    go_through(problem, columns, [turned])
    return EigenKron(problem.tree(turned.found), eigen.output_basis, eigen.input_basis, term)


def _low_rank(
    problem: Problem,
    product: Callable[[Vectors], tuple[Vectors, DataTerm]],
    rank: int,
    seed: Seed | None,
    *,
    may_be_indefinite: bool = False,
) -> LowRank:
    assert seed is not None
    terms: list[DataTerm] = []

    def image(vectors: Vectors) -> Vectors:
        found, term = product(vectors)
        terms.append(term)
        return found

    # The outputs of a linear model, with one noise for all, each have the same eigenvalues.
    values, vectors, least = largest_eigenpairs(
        image, problem.leaves, rank, seed, multiplicity=problem.num_outputs
    )
    if may_be_indefinite and least < 0:
        warnings.warn(
            f"The Hessian in `{problem.call}` is indefinite, with an eigenvalue of {least:.3g} or less. "
            "`structure='low_rank'` leaves out what is negative: posteriors are too narrow there, and with a "
            f"prior precision below {-least:.3g} the whole Hessian has none. `curvature.ggn` has no such "
            "eigenvalues, and `structure='full'` keeps them.",
            UserWarning,
            stacklevel=levels_to_the_user(),
        )
    kept = values > 0
    values, vectors = values[kept], vectors[kept]
    parts = vectors.mT.split([leaf.numel() for leaf in problem.leaves.values()])
    found = {
        name: part.reshape(1, *leaf.shape, len(values))
        for (name, leaf), part in zip(problem.leaves.items(), parts, strict=True)
    }
    return LowRank(values, problem.tree(found), problem.scalars(terms[0]))


def _by_unit_vectors(
    problem: Problem, product: Callable[[Vectors], tuple[Vectors, DataTerm]], structure: Structure
) -> Curvature:
    """The diagonal, or all, of a matrix known by its products."""
    leaves = problem.leaves
    first, sizes = next(iter(leaves.values())), [leaf.numel() for leaf in leaves.values()]
    total, dtype = sum(sizes), torch.promote_types(first.dtype, torch.float32)
    rows, term = [], None
    for start in range(0, total, _UNIT_VECTORS):
        units = torch.zeros(min(_UNIT_VECTORS, total - start), total, dtype=dtype, device=first.device)
        units.diagonal(start).fill_(1)
        parts = units.split(sizes, 1)
        vectors = {
            name: part.reshape(len(units), *leaf.shape).to(leaf.dtype)
            for (name, leaf), part in zip(leaves.items(), parts, strict=True)
        }
        found, term = product(vectors)
        image = torch.cat([found[name].reshape(len(units), -1) for name in leaves], 1).to(dtype)
        rows.append(image if structure == "full" else image.diagonal(start))
    assert term is not None
    term, whole = problem.scalars(term), torch.cat(rows)
    if structure == "full":
        like = problem.tree({name: leaf.detach()[None] for name, leaf in leaves.items()})
        return Full((whole + whole.mT) / 2, like, term)
    parts = whole.split(sizes)
    return Diag(
        problem.tree(
            {n: p.reshape(1, *leaf.shape) for (n, leaf), p in zip(leaves.items(), parts, strict=True)}
        ),
        term,
    )


def _one_by_one(problem: Problem, of_one: Callable[[Problem], Curvature]) -> Curvature:
    """Curvatures of several networks one after another, with a leading axis; that of one as it is."""
    if problem.num_members is None:
        return of_one(problem)
    networks = (index(problem.params, k) for k in range(problem.num_members))
    found = [of_one(dataclasses.replace(problem, params=p, num_members=None)) for p in networks]
    most = max((c.rank for c in found if isinstance(c, LowRank)), default=0)
    return stack([c.padded(most) if isinstance(c, LowRank) else c for c in found])
