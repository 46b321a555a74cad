"""Structures of covariances: every operation of each against a matrix that was built entry by entry."""

import math
from typing import NamedTuple

import optree
import pytest
import torch
import zoo
from torch import Tensor
from torch.func import grad, vmap
from torch.testing import assert_close
from zoo import F64, entry, gaussian, linear_params, randn, randn_like, stacked

import funcbayes as fb
from funcbayes import MISSING, Gaussian
from funcbayes._tree import named_leaves as leaves_of, select
from funcbayes.covariances import Dense, Diagonal, Kronecker, LowRankPlusDiagonal, LowRankPrecision

# Leaves by path in the order of the package, each with what is around it.


def plain(leaf):
    return {"w": leaf("w", (2, 3)), "b": leaf("b", (2,)), "gain": leaf("gain", ())}


def conv(leaf):
    return {"conv": leaf("conv", (2, 3, 2, 2)), "bias": leaf("bias", (2,))}


def nested(leaf):
    return [leaf("0", (2,)), MISSING, {"w": leaf("2.w", (3, 2))}, (MISSING, leaf("3.1", ()))]


def hollow(leaf):
    return {
        "w": leaf("w", (3, 2)),
        "no_rows": leaf("no_rows", (0, 3)),
        "no_columns": leaf("no_columns", (2, 0)),
    }


class Tree(NamedTuple):
    """``build(leaf)`` makes a tree of ``leaf(path, shape)``; ``shapes`` are in the order of the package."""

    build: object
    shapes: dict


TREES = {
    "plain": Tree(plain, {"b": (2,), "gain": (), "w": (2, 3)}),
    "conv": Tree(conv, {"bias": (2,), "conv": (2, 3, 2, 2)}),
    "nested": Tree(nested, {"0": (2,), "2.w": (3, 2), "3.1": ()}),
    "hollow": Tree(hollow, {"no_columns": (2, 0), "no_rows": (0, 3), "w": (3, 2)}),
}


def numbers(seed, extra=(), kind=torch.Tensor.clone):
    """A way to fill a tree: every path has its own noise."""
    return lambda path, shape: kind(randn(*shape, *extra, seed=seed + 17 * sum(map(ord, path))))


def positive(t):
    return t.exp() + 0.1


def orthogonal(path, length, seed):
    return torch.linalg.qr(randn(length, length, seed=seed + sum(map(ord, path)))).Q


def sides(shape):
    """Rows and columns that a leaf has as a matrix."""
    rows = shape[0] if shape else 1
    return rows, math.prod(shape[1:])


def diagonal(tree, seed=0):
    return Diagonal(tree.build(numbers(seed, kind=positive)))


def low_rank_plus_diagonal(rank):
    def make(tree, seed=0):
        variance = tree.build(numbers(seed, kind=positive))
        return LowRankPlusDiagonal(variance, tree.build(numbers(seed + 1, (rank,))))

    return make


def low_rank_precision(rank):
    def make(tree, seed=0):
        precision = tree.build(numbers(seed, kind=positive))
        return LowRankPrecision(precision, tree.build(numbers(seed + 1, (rank,))))

    return make


def kronecker(tree, seed=0):
    return Kronecker(
        tree.build(numbers(seed, kind=positive)),
        tree.build(lambda path, shape: orthogonal(path, sides(shape)[0], seed)),
        tree.build(lambda path, shape: orthogonal(path, sides(shape)[1], seed + 1)),
    )


def kronecker_lacking(first):
    """Of four leaves in a row one lacks the output basis, one both, one the input basis, one none."""

    def make(tree, seed=0):
        whole = kronecker(tree, seed)

        def lacking(basis, numbers):
            order = list(tree.shapes)
            return select(basis, lambda path, _: (order.index(path) + first) % 4 not in numbers)

        outputs, inputs = lacking(whole.output_basis, (0, 1)), lacking(whole.input_basis, (1, 2))
        return Kronecker(whole.variance, outputs, inputs)

    return make


def psd(path, length, seed):
    root = randn(length, length, seed=seed + sum(map(ord, path)))
    return root @ root.T


def kronecker_from_factors(tree, seed=0):
    return Kronecker.from_factors(
        tree.build(lambda path, shape: torch.zeros(shape, dtype=F64)),
        tree.build(lambda path, shape: psd(path, sides(shape)[0], seed)),
        tree.build(lambda path, shape: psd(path, sides(shape)[1], seed + 1)),
        prior_precision=0.7,
        temperature=2.0,
    )


def kronecker_from_diagonal_factors(tree, seed=0):
    """Diagonal in the outputs of matrices and in the inputs of others."""

    def factor(path, length, diagonal, seed):
        matrix = psd(path, length, seed)
        return matrix.diagonal() if diagonal else matrix

    return Kronecker.from_factors(
        tree.build(lambda path, shape: torch.zeros(shape, dtype=F64)),
        tree.build(lambda path, shape: factor(path, sides(shape)[0], len(shape) == 2, seed)),
        tree.build(lambda path, shape: factor(path, sides(shape)[1], len(shape) != 2, seed + 1)),
        prior_precision=0.7,
    )


def dense(more):
    def make(tree, seed=0):
        rank = sum(math.prod(shape) for shape in tree.shapes.values()) + more
        return Dense(tree.build(numbers(seed, (rank,))))

    return make


MAKERS = {
    "diagonal": diagonal,
    "low_rank_plus_diagonal": low_rank_plus_diagonal(3),
    "low_rank_plus_diagonal_of_rank_0": low_rank_plus_diagonal(0),
    "low_rank_plus_diagonal_of_high_rank": low_rank_plus_diagonal(40),
    "low_rank_precision": low_rank_precision(3),
    "low_rank_precision_of_rank_0": low_rank_precision(0),
    "kronecker": kronecker,
    "kronecker_from_factors": kronecker_from_factors,
    "kronecker_lacking_bases": kronecker_lacking(0),
    "kronecker_lacking_other_bases": kronecker_lacking(2),
    "kronecker_from_diagonal_factors": kronecker_from_diagonal_factors,
    "dense": dense(0),
    "dense_with_more_columns_than_rows": dense(4),
}
SINGULAR = {
    "dense_with_fewer_columns": lambda tree, seed=0: Dense(tree.build(numbers(seed, (2,)))),
    "dense_without_columns": lambda tree, seed=0: Dense(tree.build(numbers(seed, (0,)))),
    "certain_beside_low_rank": lambda tree, seed=0: LowRankPlusDiagonal(
        tree.build(numbers(seed, kind=torch.zeros_like)), tree.build(numbers(seed, (2,)))
    ),
    "certain": lambda tree, seed=0: Diagonal(tree.build(numbers(seed, kind=torch.zeros_like))),
}
every_tree = pytest.mark.parametrize("tree", TREES.values(), ids=TREES.keys())
every_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
every_singular = pytest.mark.parametrize("make", SINGULAR.values(), ids=SINGULAR.keys())


# The matrix, entry by entry.


def rows_of(tree):
    """Leaves ``(*s, k)`` as rows of length ``k``, in order."""
    return [
        row
        for leaf in leaves_of(tree).values()
        for row in leaf.reshape(leaf.shape[:-1].numel(), -1 if leaf.numel() else 0)
    ]


def entries_of(tree):
    return [number for leaf in leaves_of(tree).values() for number in leaf.reshape(-1)]


def naive(covariance) -> Tensor:
    """The matrix by loops over its definition."""
    if isinstance(covariance, Diagonal):
        return torch.diag(torch.stack(entries_of(covariance.variance)))
    if isinstance(covariance, Dense):
        rows = rows_of(covariance.factors)
        return torch.stack([torch.stack([(a * b).sum() for b in rows]) for a in rows])
    if isinstance(covariance, Kronecker):
        blocks = []
        for path, variance in leaves_of(covariance.variance).items():
            outputs, inputs = (
                leaves_of(tree).get(path, torch.eye(length, dtype=F64))
                for tree, length in zip(
                    (covariance.output_basis, covariance.input_basis), sides(variance.shape), strict=True
                )
            )
            basis = torch.kron(outputs.contiguous(), inputs.contiguous())
            blocks.append(basis @ torch.diag(variance.reshape(-1)) @ basis.T)
        return torch.block_diag(*blocks)
    low_rank, inverted = covariance, isinstance(covariance, LowRankPrecision)
    rows = rows_of(low_rank.factors)
    matrix = torch.stack([torch.stack([(a * b).sum() for b in rows]) for a in rows])
    matrix = matrix + torch.diag(
        torch.stack(entries_of(low_rank.precision if inverted else low_rank.variance))
    )
    return torch.linalg.inv(matrix) if inverted else matrix


def joined(tree):
    return torch.stack(entries_of(tree))


def joined_draws(tree):
    return torch.cat([leaf.reshape(len(leaf), -1) for leaf in leaves_of(tree).values()], 1)


def vector_for(covariance, seed=3):
    return randn_like(covariance.like, seed)


@every_tree
@every_maker
def test_every_operation_is_that_of_the_dense_matrix(make, tree):
    covariance = make(tree)
    matrix, vector = naive(covariance), vector_for(covariance)
    v = joined(vector)
    close = dict(rtol=1e-9, atol=1e-9)
    assert list(leaves_of(covariance.like)) == list(tree.shapes)
    assert_close(covariance.to_dense(), matrix, **close)
    assert_close(joined(covariance.diagonal()), matrix.diagonal(), **close)
    assert_close(joined(covariance.matvec(vector)), matrix @ v, **close)
    assert_close(joined(covariance.solve(vector)), torch.linalg.solve(matrix, v), rtol=1e-7, atol=1e-7)
    assert_close(covariance.quadratic_form(vector), v @ torch.linalg.solve(matrix, v), rtol=1e-7, atol=0)
    assert_close(covariance.logdet(), torch.logdet(matrix), **close)
    assert covariance.singular() is None
    for made in (covariance.diagonal(), covariance.matvec(vector), covariance.solve(vector)):
        assert optree.tree_structure(made) == optree.tree_structure(vector)
        assert {path: leaf.shape for path, leaf in leaves_of(made).items()} == tree.shapes


@every_tree
@every_singular
def test_a_singular_covariance_multiplies_and_is_not_inverted(make, tree):
    covariance = make(tree)
    matrix, vector = naive(covariance), vector_for(covariance)
    assert_close(covariance.to_dense(), matrix)
    assert_close(joined(covariance.diagonal()), matrix.diagonal())
    assert_close(joined(covariance.matvec(vector)), matrix @ joined(vector))
    assert_close(covariance.scaled(4.0).to_dense(), 4 * matrix)
    for inverting in (covariance.logdet, lambda: covariance.solve(vector)):
        with pytest.raises(
            ValueError, match=f"`{type(covariance).__name__}` can be sampled but has no inver"
        ):
            inverting()
    with pytest.raises(ValueError, match=r"`entropy\(\)` has no entropy to give"):
        Gaussian(vector, covariance).entropy()


@every_maker
def test_order_of_the_keys_and_containers_of_a_vector_do_not_matter(make):
    covariance = make(TREES["plain"])
    vector = vector_for(covariance)
    turned = dict(reversed(vector.items()))
    assert torch.equal(joined(covariance.matvec(turned)), joined(covariance.matvec(vector)))


def test_leaves_of_a_long_list_keep_their_order():
    # Sorted as text, "10" would come before "2".
    mean = [randn(2, seed=i) for i in range(12)]
    variance = [randn(2, seed=i).exp() for i in range(12)]
    factors = [randn(2, 3, seed=i + 20) for i in range(12)]
    posterior = Gaussian(mean, LowRankPlusDiagonal(variance, factors))
    at = [randn(2, seed=i + 40) for i in range(12)]
    dense = torch.diag(torch.cat(variance)) + torch.cat(factors) @ torch.cat(factors).T
    expected = torch.distributions.MultivariateNormal(torch.cat(mean), dense)
    assert_close(posterior.log_prob(at), expected.log_prob(torch.cat(at)))


@every_tree
@every_maker
def test_a_scaled_covariance_is_the_matrix_times_the_factor(make, tree):
    covariance = make(tree)
    matrix = naive(covariance)
    for factor in (0.5, 3, torch.tensor(0.25), torch.tensor(2.5, dtype=F64)):
        scaled = covariance.scaled(factor)
        assert type(scaled) is type(covariance)
        assert_close(scaled.to_dense(), matrix * float(factor), rtol=1e-9, atol=1e-9)
        assert scaled.to_dense().dtype == F64


@every_tree
@every_maker
def test_a_restricted_covariance_is_the_marginal(make, tree):
    covariance = make(tree)
    matrix = naive(covariance)
    paths = [path for path, shape in tree.shapes.items() for _ in range(math.prod(shape))]
    for kept in ([p] for p in tree.shapes):
        for chosen in (kept, [p for p in tree.shapes if p not in kept], list(tree.shapes)):
            seen = {}
            part = covariance.restricted(
                lambda path, leaf, c=chosen, s=seen: s.update({path: leaf}) or path in c
            )
            assert {path: leaf.shape for path, leaf in seen.items()} == tree.shapes
            rows = torch.tensor([path in chosen for path in paths])
            assert type(part) is type(covariance)
            assert list(leaves_of(part.like)) == [p for p in tree.shapes if p in chosen]
            assert_close(part.to_dense(), matrix[rows][:, rows], rtol=1e-9, atol=1e-9)


# Draws.


def assert_moments(draws, mean, matrix, slack=0.0):
    """First and second moments of draws ``(n, P)`` within 5.5 standard errors."""
    n, variance = len(draws), matrix.diagonal()
    assert ((draws.mean(0) - mean).abs() <= 5.5 * (variance / n).sqrt() + slack).all()
    centred = draws - mean
    # Var(x_i x_j) = s_ii s_jj + s_ij^2, Isserlis.
    error = ((torch.outer(variance, variance) + matrix**2) / n).sqrt()
    assert ((centred.T @ centred / n - matrix).abs() <= 5.5 * error + slack).all()


@every_tree
@pytest.mark.parametrize("make", (MAKERS | SINGULAR).values(), ids=(MAKERS | SINGULAR).keys())
def test_draws_have_the_covariance_between_all_entries_of_all_leaves(make, tree):
    covariance = make(tree)
    posterior = Gaussian(vector_for(covariance), covariance)
    sample = posterior.sample(5000, seed=1)
    assert optree.tree_structure(sample) == optree.tree_structure(posterior.mean)
    assert_moments(joined_draws(sample), joined(posterior.mean), naive(covariance), slack=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_maker
def test_draws_and_results_have_the_dtype_of_the_leaves(make, dtype):
    wide = make(TREES["plain"])
    covariance = fb.to(wide, dtype=dtype)
    posterior = Gaussian(fb.to(vector_for(wide), dtype=dtype), covariance)
    vector = vector_for(covariance, 5)
    sample = posterior.sample(5000, seed=0)
    trees = (sample, covariance.diagonal(), covariance.matvec(vector), covariance.solve(vector))
    scalars = (covariance.logdet(), posterior.log_prob(vector), posterior.entropy(), covariance.to_dense())
    assert {leaf.dtype for tree in trees for leaf in leaves_of(tree).values()} == {dtype}
    assert {scalar.dtype for scalar in scalars} == {dtype}

    rounded = fb.to(covariance, dtype=F64)  # with the same numbers
    matrix, eps = naive(rounded), torch.finfo(dtype).eps
    v = joined(fb.to(vector, dtype=F64))
    if isinstance(covariance, Kronecker):  # its rounded bases are not orthogonal
        return
    # Factorizations are in float32, then results are rounded.
    solved, lost = torch.linalg.solve(matrix, v), float(torch.linalg.cond(matrix)) * 1e-6
    assert_close(
        joined(covariance.solve(vector)).double(), solved, rtol=eps, atol=(lost + eps) * float(solved.norm())
    )
    assert_close(joined(covariance.diagonal()).double(), matrix.diagonal(), rtol=2 * eps, atol=1e-5)
    spread = float(matrix.diagonal().max())
    mean = joined(fb.to(posterior.mean, dtype=F64))
    slack = 4 * eps * (spread + float(mean.abs().max()) ** 2) + lost / 10
    assert_moments(joined_draws(sample).double(), mean, matrix, slack=slack)


@pytest.mark.parametrize("make", (MAKERS | SINGULAR).values(), ids=(MAKERS | SINGULAR).keys())
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_a_draw_is_the_same_to_the_last_bit_in_any_company(make, dtype):
    covariance = fb.to(make(TREES["conv"]), dtype=dtype)
    posterior = Gaussian(fb.to(vector_for(covariance), dtype=dtype), covariance)
    whole = posterior.sample(37, seed=4)
    for chosen in ([7], [3, 2, 1], [36, 0, 0, 5], list(range(36, -1, -1)), list(range(17))):
        indices = torch.tensor(chosen)
        some = posterior.draws(indices, 4).leaves
        for path, leaf in leaves_of(some).items():
            assert torch.equal(leaf, leaves_of(whole)[path][indices]), path


@pytest.mark.parametrize("outermost", [False, True], ids=["rank_innermost", "rank_outermost"])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("rank", [1, 5, 8, 40])
@pytest.mark.parametrize("kind", [LowRankPlusDiagonal, LowRankPrecision])
def test_a_draw_of_large_leaves_is_the_same_to_the_last_bit_in_any_company(kind, rank, dtype, outermost):
    shape = (257, 129)
    factors = randn(rank, *shape).movedim(0, -1) if outermost else randn(*shape, rank)
    factors = factors.to(dtype)
    posterior = Gaussian(
        {"w": torch.zeros(shape, dtype=dtype)},
        kind({"w": torch.ones(shape, dtype=dtype)}, {"w": factors / 9}),
    )
    whole = posterior.sample(37, seed=4)["w"]
    for chosen in ([7], [3, 2, 1], list(range(36, -1, -1)), list(range(16))):
        indices = torch.tensor(chosen)
        assert torch.equal(posterior.draws(indices, 4).leaves["w"], whole[indices])
    mapped = vmap(lambda seed: posterior.sample(5, seed=seed)["w"])(torch.arange(3, 6))
    assert torch.equal(mapped[1], whole[:5])


def test_without_factors_draws_are_those_of_the_diagonal_part():
    tree = TREES["nested"]
    covariance = low_rank_plus_diagonal(0)(tree)
    one = covariance.deviations(torch.arange(5), 3)
    other = Diagonal(covariance.variance).deviations(torch.arange(5), 3)
    assert torch.equal(joined_draws(one), joined_draws(other))


@pytest.mark.parametrize("make", [diagonal, kronecker], ids=["diagonal", "kronecker"])
@every_tree
def test_draws_of_a_part_are_the_part_of_the_draws_where_leaves_are_independent(make, tree):
    covariance = make(tree)
    whole = leaves_of(covariance.deviations(torch.arange(9), 2))
    for kept in tree.shapes:
        part = leaves_of(
            covariance.restricted(lambda path, leaf, k=kept: path == k).deviations(torch.arange(9), 2)
        )
        assert list(part) == [kept]
        assert torch.equal(part[kept], whole[kept])


@pytest.mark.parametrize("make", [low_rank_plus_diagonal(2), dense(0)], ids=["low_rank", "dense"])
def test_draws_of_disjoint_parts_are_independent(make):
    covariance, n = make(TREES["plain"]), 20_000
    parts = [covariance.restricted(lambda path, leaf, k=k: path == k) for k in ("w", "b")]
    draws = [joined_draws(part.deviations(torch.arange(n), 0)) for part in parts]
    matrix = torch.block_diag(*(naive(part) for part in parts))
    assert_moments(torch.cat(draws, 1), torch.zeros(8, dtype=F64), matrix)


def test_sampling_leaves_its_arguments_alone():
    for make in MAKERS.values():
        covariance = make(TREES["plain"])
        posterior = Gaussian(vector_for(covariance), covariance)
        before = [leaf.clone() for leaf in optree.tree_leaves(posterior)]
        first = joined_draws(posterior.sample(6, seed=0))
        assert torch.equal(first, joined_draws(posterior.sample(6, seed=0)))
        for old, new in zip(before, optree.tree_leaves(posterior), strict=True):
            assert torch.equal(old, new)


# Transforms.


@every_tree
@every_maker
def test_sampling_mapped_over_seeds_is_a_loop_over_seeds(make, tree):
    covariance = make(tree)
    posterior = Gaussian(vector_for(covariance), covariance)
    mapped = vmap(lambda seed: posterior.sample(5, seed=seed))(torch.arange(3))
    for seed in range(3):
        assert torch.equal(joined_draws(entry(mapped, seed)), joined_draws(posterior.sample(5, seed=seed)))


OPERATIONS = {
    "sample": lambda q, v: q.sample(4, seed=1),
    "variance": lambda q, v: q.variance,
    "log_prob": lambda q, v: q.log_prob(v),
    "entropy": lambda q, v: q.entropy(),
    "matvec": lambda q, v: q.covariance.matvec(v),
    "solve": lambda q, v: q.covariance.solve(v),
    "quadratic_form": lambda q, v: q.covariance.quadratic_form(v),
    "logdet": lambda q, v: q.covariance.logdet(),
    "to_dense": lambda q, v: q.covariance.to_dense(),
    "scaled": lambda q, v: q.covariance.scaled(2.0).to_dense(),
    "restricted": lambda q, v: q.covariance.restricted(lambda path, leaf: path != "b").to_dense(),
}
every_operation = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS.keys())


@every_operation
@every_maker
def test_operations_mapped_over_stacked_covariances_are_a_loop(make, operation):
    tree = TREES["plain"]
    posteriors = [Gaussian(vector_for(make(tree, seed), seed), make(tree, seed)) for seed in range(3)]
    vector = vector_for(posteriors[0].covariance, 7)
    mapped = vmap(operation, in_dims=(0, None))(stacked(*posteriors), vector)
    for i, posterior in enumerate(posteriors):
        expected = operation(posterior, vector)
        for one, other in zip(
            optree.tree_leaves(entry(mapped, i)), optree.tree_leaves(expected), strict=True
        ):
            assert_close(one, other, rtol=1e-9, atol=1e-9)


NAIVE = {
    "variance": lambda matrix, v: matrix.diagonal().square().sum(),
    "log_prob": lambda matrix, v: torch.distributions.MultivariateNormal(v * 0, matrix).log_prob(v),
    "entropy": lambda matrix, v: torch.distributions.MultivariateNormal(v * 0, matrix).entropy(),
    "matvec": lambda matrix, v: (matrix @ v).square().sum(),
    "solve": lambda matrix, v: torch.linalg.solve(matrix, v).square().sum(),
    "quadratic_form": lambda matrix, v: v @ torch.linalg.solve(matrix, v),
    "logdet": lambda matrix, v: torch.logdet(matrix),
    "scaled": lambda matrix, v: (2 * matrix).square().sum(),
}


@pytest.mark.parametrize("name", NAIVE)
@every_maker
def test_gradients_are_those_of_dense_formulas(make, name):
    covariance = make(TREES["plain"])
    vector = vector_for(covariance)
    zeros = optree.tree_map(torch.zeros_like, vector)
    free, fixed = optree.tree_leaves(covariance), []
    if isinstance(covariance, Kronecker):  # moved bases are not orthogonal, and the formulas differ
        free, fixed = free[:3], free[3:]
    free = [leaf.clone().requires_grad_() for leaf in free]

    def rebuilt(leaves):
        return optree.tree_unflatten(optree.tree_structure(covariance), [*leaves, *fixed])

    def ours(leaves):
        covariance = rebuilt(leaves)
        found = OPERATIONS[name](Gaussian(zeros, covariance), vector)
        leaves = optree.tree_leaves(found)
        return (
            leaves[0] if leaves[0].ndim == 0 and len(leaves) == 1 else sum(t.square().sum() for t in leaves)
        )

    expected = torch.autograd.grad(NAIVE[name](naive(rebuilt(free)), joined(vector)), free, allow_unused=True)
    by_autograd = torch.autograd.grad(ours(free), free, allow_unused=True)
    by_func = grad(ours)([leaf.detach() for leaf in free])
    for want, *found in zip(expected, by_autograd, by_func, strict=True):
        for got in found:
            want = torch.zeros_like(found[-1]) if want is None else want
            assert_close(torch.zeros_like(want) if got is None else got, want, rtol=1e-6, atol=1e-6)


@every_maker
def test_draws_are_differentiable_in_the_covariance(make):
    covariance, tree = make(TREES["plain"]), TREES["plain"]
    cotangent = randn(7, sum(math.prod(s) for s in tree.shapes.values()), seed=9)
    mean = vector_for(covariance)

    def inner(covariance):
        return (joined_draws(Gaussian(mean, covariance).sample(7, seed=0)) * cotangent).sum()

    gradient = grad(inner)(covariance)
    direction = randn_like(covariance, 11)
    step = 1e-6

    def moved(sign):
        return optree.tree_map(lambda t, d: t + sign * step * d, covariance, direction)

    slope = (inner(moved(1)) - inner(moved(-1))) / (2 * step)
    pairs = zip(optree.tree_leaves(gradient), optree.tree_leaves(direction), strict=True)
    assert_close(sum((g * d).sum() for g, d in pairs), slope, rtol=1e-6, atol=1e-6)
    free = [leaf.clone().requires_grad_() for leaf in optree.tree_leaves(covariance)]
    value = inner(optree.tree_unflatten(optree.tree_structure(covariance), free))
    by_autograd = torch.autograd.grad(value, free, allow_unused=True)
    for one, other in zip(by_autograd, optree.tree_leaves(gradient), strict=True):
        assert_close(torch.zeros_like(other) if one is None else one, other)


def test_draws_of_a_low_rank_precision_are_differentiable_where_eigenvalues_coincide():
    factors = {"w": torch.cat([torch.eye(4, 2, dtype=F64), torch.zeros(4, 2, dtype=F64)], 1)}
    precision = {"w": torch.ones(4, dtype=F64)}

    def inner(factors):
        return LowRankPrecision(precision, factors).deviations(torch.arange(3), 0)["w"].sum()

    assert grad(inner)(factors)["w"].isfinite().all()


def test_a_scale_is_differentiable():
    covariance = low_rank_plus_diagonal(2)(TREES["plain"])
    got = grad(lambda factor: covariance.scaled(factor).to_dense().sum())(torch.tensor(2.0, dtype=F64))
    assert_close(got, naive(covariance).sum())


@every_maker
@pytest.mark.filterwarnings("error")
def test_a_scale_that_is_being_trained_keeps_its_gradient(make):
    factor = torch.tensor(2.0, dtype=F64, requires_grad=True)
    scaled = make(TREES["plain"]).scaled(factor)
    (gradient,) = torch.autograd.grad(scaled.to_dense().sum(), factor)
    assert_close(gradient, naive(make(TREES["plain"])).sum())


@every_maker
def test_a_posterior_is_made_inside_of_transforms_and_on_the_meta_device(make):
    covariance = make(TREES["plain"])
    mean = vector_for(covariance)
    made = vmap(lambda m, c: Gaussian(m, c).variance)(stacked(mean, mean), stacked(covariance, covariance))
    assert_close(entry(made, 1), covariance.diagonal())
    on_meta = Gaussian(fb.to(mean, device="meta"), fb.to(covariance, device="meta"))
    assert {leaf.device.type for leaf in on_meta.variance.values()} == {"meta"}


@every_maker
def test_shapes_are_worked_out_on_the_meta_device(make):
    covariance = fb.to(make(TREES["conv"]), device="meta")
    posterior = Gaussian(vector_for(make(TREES["conv"])), make(TREES["conv"]))
    on_meta = fb.to(posterior, device="meta")
    assert covariance.logdet().shape == ()
    for one, other in zip(
        optree.tree_leaves(on_meta.draws(torch.arange(3), 0).leaves),
        optree.tree_leaves(posterior.draws(torch.arange(3), 0).leaves),
        strict=True,
    ):
        assert one.device.type == "meta"
        assert one.shape == other.shape


# Densities.


@every_tree
@every_maker
def test_log_density_and_entropy_are_those_of_a_multivariate_normal(make, tree):
    covariance = make(tree)
    posterior = Gaussian(vector_for(covariance), covariance)
    at = vector_for(covariance, 8)
    matrix = naive(covariance)
    expected = torch.distributions.MultivariateNormal(joined(posterior.mean), (matrix + matrix.T) / 2)
    assert_close(posterior.log_prob(at), expected.log_prob(joined(at)), rtol=1e-7, atol=1e-7)
    assert_close(posterior.entropy(), expected.entropy(), rtol=1e-9, atol=1e-9)


def test_a_density_in_single_precision_survives_a_diagonal_that_is_tiny_beside_the_factors():
    size, rank = 400, 5
    variance, factors = torch.full((size,), 1e-8), randn(size, rank).float()
    factors[:, -1] = factors[:, 0] + factors[:, 1]  # and columns that depend on each other
    covariance = LowRankPlusDiagonal({"w": variance}, {"w": factors})
    draw = covariance.deviations(torch.arange(1), 0)["w"][0]
    exact = LowRankPlusDiagonal({"w": variance.double()}, {"w": factors.double()})
    got, expected = covariance.quadratic_form({"w": draw}), exact.quadratic_form({"w": draw.double()})
    assert abs(float(got) - float(expected)) < 0.1 * float(expected)
    assert_close(covariance.logdet().double(), exact.logdet(), rtol=1e-4, atol=0)
    assert (
        LowRankPrecision({"w": variance}, {"w": factors}).deviations(torch.arange(2), 0)["w"].isfinite().all()
    )


def large_beside_the_diagonal(diagonal, size, rank, scale):
    """A precision with factors of one length, and what its variances are on paper."""
    columns = torch.linalg.qr(randn(size, rank)).Q
    precision = {"w": torch.full((size,), diagonal, dtype=F64)}
    along = columns.square().sum(-1) if rank < size else torch.ones(size, dtype=F64)
    variance = (1 - along) / diagonal + along / (diagonal + scale**2)
    return LowRankPrecision(precision, {"w": scale * columns}), {"w": variance}


@pytest.mark.parametrize(("size", "rank"), [(3, 3), (5, 2), (40, 40), (70_000, 3)])
@pytest.mark.parametrize(("diagonal", "scale"), [(1e-6, 1e5), (1e-4, 1e6), (1e-6, 1e6)])
def test_variances_of_a_precision_with_factors_far_larger_than_its_diagonal(diagonal, size, rank, scale):
    covariance, expected = large_beside_the_diagonal(diagonal, size, rank, scale)
    assert_close(covariance.diagonal(), expected, rtol=1e-10, atol=0)
    mapped = vmap(lambda q: q.diagonal())(stacked(covariance, covariance))
    assert_close(mapped["w"][1], expected["w"], rtol=1e-10, atol=0)


def test_a_variance_that_few_factors_determine_keeps_its_digits():
    # One row along each factor has nearly all of it, the other rows have none or little.
    diagonal, factors = torch.full((50,), 1e-8, dtype=F64), torch.zeros(50, 2, dtype=F64)
    factors[7, 0], factors[31, 1], factors[11, 1] = 1e9, 1e9, 1e-2
    variance = LowRankPrecision({"w": diagonal}, {"w": factors}).diagonal()["w"]
    pair = torch.tensor([[1e-8 + 1e-4, 1e7], [1e7, 1e-8 + 1e18]], dtype=F64)
    determinant = 1e-8 * (1e-8 + 1e-4 + 1e18)
    expected = 1 / diagonal
    expected[7] = 1 / (1e-8 + 1e18)
    expected[11], expected[31] = pair[1, 1] / determinant, pair[0, 0] / determinant
    assert_close(variance, expected, rtol=1e-10, atol=0)


def test_factors_that_drown_the_diagonal_are_refused():
    columns = torch.ones(6, 3, dtype=F64) * torch.tensor([1.0, 1 / 3, 0.7], dtype=F64)
    covariance = LowRankPrecision({"w": torch.full((6,), 1e-14, dtype=F64)}, {"w": 1e10 * columns})
    with pytest.raises(RuntimeError, match="diagonal part .* lost in rounding.* helps"):
        covariance.logdet()


@pytest.mark.parametrize("name", ["low_rank_plus_diagonal", "dense"])
def test_variances_of_low_rank_make_no_tensor_of_the_size_of_the_factors(name):
    factors = {"w": torch.ones(30, 40, 10), "b": torch.ones(30, 10)}
    ones = {"w": torch.ones(30, 40), "b": torch.ones(30)}
    covariance = Dense(factors) if name == "dense" else LowRankPlusDiagonal(ones, factors)
    with zoo.Largest() as largest:
        variance = covariance.diagonal()
    assert_close(variance["w"], torch.full((30, 40), 10.0 if name == "dense" else 11.0))
    assert 0 < largest.nbytes <= ones["w"].nbytes


# Kronecker products.


@every_tree
@pytest.mark.parametrize("per_leaf", [False, True])
def test_a_prior_is_added_to_a_kronecker_product_exactly(tree, per_leaf):
    zeros = tree.build(lambda path, shape: torch.zeros(shape, dtype=F64))
    outputs = tree.build(lambda path, shape: psd(path, sides(shape)[0], 3))
    inputs = tree.build(lambda path, shape: psd(path, sides(shape)[1], 5))
    prior = (
        {path: 0.3 + i for i, path in enumerate(tree.shapes)} if per_leaf else dict.fromkeys(tree.shapes, 0.3)
    )
    given = tree.build(lambda path, shape: torch.tensor(prior[path], dtype=F64)) if per_leaf else 0.3
    for temperature in (1.0, 0.5):
        covariance = Kronecker.from_factors(zeros, outputs, inputs, given, temperature=temperature)
        blocks = [
            torch.linalg.inv(
                torch.kron(leaves_of(outputs)[path], leaves_of(inputs)[path]) / temperature
                + prior[path] * torch.eye(math.prod(shape), dtype=F64)
            )
            for path, shape in tree.shapes.items()
        ]
        assert_close(covariance.to_dense(), torch.block_diag(*blocks))
        assert {path: leaf.shape for path, leaf in leaves_of(covariance.like).items()} == tree.shapes


def test_input_factors_of_biases_and_scalars_may_be_left_out():
    params = linear_params()
    outputs = {"w": psd("w", 2, 0), "b": psd("b", 2, 0), "gain": torch.tensor([[2.0]], dtype=F64)}
    inputs = {"w": psd("w", 3, 1)}
    one = torch.ones(1, 1, dtype=F64)
    with_ones = Kronecker.from_factors(params, outputs, {**inputs, "b": one, "gain": one}, 1.0)
    assert_close(Kronecker.from_factors(params, outputs, inputs, 1.0).to_dense(), with_ones.to_dense())
    assert_close(with_ones.diagonal()["gain"], torch.tensor(1 / 3, dtype=F64))


@every_tree
def test_a_factor_given_as_a_vector_is_the_diagonal_matrix_and_has_no_basis(tree):
    zeros = tree.build(lambda path, shape: torch.zeros(shape, dtype=F64))
    trees = [
        tree.build(lambda path, shape, side=side: psd(path, sides(shape)[side], side).diagonal())
        for side in (0, 1)
    ]
    matrices = [optree.tree_map(torch.diag, vectors) for vectors in trees]
    short = Kronecker.from_factors(zeros, *trees, 0.3, temperature=0.5)
    assert not leaves_of(short.output_basis)
    assert not leaves_of(short.input_basis)
    assert_close(short.to_dense(), Kronecker.from_factors(zeros, *matrices, 0.3, 0.5).to_dense())
    expected = [
        1 / (torch.outer(*(leaves_of(vectors)[path] for vectors in trees)) / 0.5 + 0.3)
        for path in tree.shapes
    ]
    assert_close(joined(short.diagonal()), torch.cat([leaf.flatten() for leaf in expected]))
    assert torch.equal(short.to_dense(), torch.diag(joined(short.diagonal())))


@every_tree
def test_without_bases_draws_are_those_of_a_diagonal(tree):
    variance = tree.build(numbers(0, kind=positive))
    one, other = (c.deviations(torch.arange(5), 3) for c in (Kronecker(variance, {}, {}), Diagonal(variance)))
    assert torch.equal(joined_draws(one), joined_draws(other))


@pytest.mark.parametrize("tree", [TREES["plain"], TREES["nested"]], ids=["plain", "nested"])
def test_components_that_lack_bases_are_mixed_from_a_stack(tree):
    covariances = [kronecker_lacking(0)(tree, seed) for seed in range(3)]
    parts = [Gaussian(vector_for(one, seed), one) for seed, one in enumerate(covariances)]
    one, other = fb.mixture(stacked(*parts), stacked=True), fb.mixture(*parts)
    assert torch.equal(joined_draws(one.sample(8, seed=0)), joined_draws(other.sample(8, seed=0)))
    for component, covariance in zip(one.components, covariances, strict=True):
        assert_close(component.covariance.to_dense(), naive(covariance))


def test_a_basis_may_be_marked_as_missing_in_a_dict():
    covariance = kronecker(TREES["plain"])
    outputs = with_leaf(covariance.output_basis, w=MISSING)
    marked = Kronecker(covariance.variance, outputs, covariance.input_basis)
    del outputs["w"]
    absent = Kronecker(covariance.variance, outputs, covariance.input_basis)
    assert torch.equal(marked.to_dense(), absent.to_dense())
    assert torch.equal(marked.restricted(lambda path, _: path == "w").to_dense(), marked.to_dense()[-6:, -6:])


def test_the_curvature_of_an_embedding_makes_no_matrix_over_its_tokens():
    params = {"embedding": torch.zeros(30_000, 16), "head": torch.zeros(16, 16)}
    counts = torch.arange(30_000.0)
    outputs, inputs = ({"embedding": leaf, "head": torch.eye(16)} for leaf in (counts, torch.eye(16)))
    with zoo.Largest() as largest:
        covariance = Kronecker.from_factors(params, outputs, inputs, prior_precision=1.0)
        posterior = fb.temper(Gaussian(params, covariance), 0.5)
        at = posterior.sample(1, seed=0)
        posterior.log_prob(entry(at, 0))
        fb.kl(posterior, Gaussian(params, covariance))
        fb.restrict(posterior, "embedding").entropy()
    assert_close(posterior.variance["embedding"][:, 1], 0.5 / (counts + 1))
    assert largest.nbytes <= 2 * 8 * params["embedding"].numel()


def test_eigenvalues_that_rounding_made_negative_count_as_zero():
    params = {"w": torch.zeros(2, 2, dtype=F64)}
    factor = {"w": torch.diag(torch.tensor([1.0, -1e-9], dtype=F64))}
    variance = Kronecker.from_factors(params, factor, factor, 0.5).diagonal()["w"]
    assert_close(variance, torch.tensor([[1 / 1.5, 2.0], [2.0, 2.0]], dtype=F64))
    vector = {"w": factor["w"].diagonal()}
    assert_close(Kronecker.from_factors(params, vector, factor, 0.5).diagonal()["w"], variance)


def test_the_prior_of_a_kronecker_product_is_differentiable():
    params, outputs, inputs = ({"w": t} for t in (randn(2, 3), psd("w", 2, 0), psd("w", 3, 1)))
    prior = torch.tensor(0.8, dtype=F64)

    def logdet(prior):
        return Kronecker.from_factors(params, outputs, inputs, prior).logdet()

    def expected(prior):
        return -torch.logdet(torch.kron(outputs["w"], inputs["w"]) + prior * torch.eye(6, dtype=F64))

    assert_close(grad(logdet)(prior), grad(expected)(prior))
    mapped = vmap(logdet)(torch.tensor([0.5, 1.0], dtype=F64))
    assert_close(mapped, torch.stack([expected(torch.tensor(p, dtype=F64)) for p in (0.5, 1.0)]))


# Errors.

ONES = {"w": torch.ones(2, 3), "b": torch.ones(2)}
FACTORS = {"w": torch.ones(2, 3, 4), "b": torch.ones(2, 4)}
EYES = {"w": torch.eye(2), "b": torch.eye(2)}, {"w": torch.eye(3), "b": torch.eye(1)}


def with_leaf(tree, **leaves):
    return {**tree, **leaves}


ERRORS = {
    "integer_variance": (
        lambda: LowRankPlusDiagonal(with_leaf(ONES, b=torch.ones(2).int()), FACTORS),
        TypeError,
        r"`LowRankPlusDiagonal\(variance, \.\.\.\)`.*'b' is torch\.int32",
    ),
    "variance_negative": (
        lambda: LowRankPlusDiagonal(with_leaf(ONES, b=-torch.ones(2)), FACTORS),
        ValueError,
        "not negative; 'b' has a smallest entry of -1",
    ),
    "variance_not_finite": (
        lambda: Kronecker(with_leaf(ONES, w=torch.full((2, 3), math.inf)), *EYES),
        ValueError,
        r"`Kronecker\(variance, \.\.\.\)` should be finite.*'w'",
    ),
    "precision_zero": (
        lambda: LowRankPrecision(with_leaf(ONES, b=torch.tensor([0.0, 1.0])), FACTORS),
        ValueError,
        r"`LowRankPrecision\(precision, \.\.\.\)` should be finite and positive; 'b'.*prior_precision",
    ),
    "precision_nan": (
        lambda: LowRankPrecision(with_leaf(ONES, b=torch.tensor([math.nan, 1.0])), FACTORS),
        ValueError,
        "finite and positive; 'b'",
    ),
    "factors_lack_a_leaf": (
        lambda: LowRankPlusDiagonal(ONES, {"w": FACTORS["w"]}),
        ValueError,
        r"`LowRankPlusDiagonal\(\.\.\., factors\)`.*'b' is missing",
    ),
    "factors_with_a_leaf_too_many": (
        lambda: LowRankPrecision({"w": ONES["w"]}, FACTORS),
        ValueError,
        r"`LowRankPrecision\(\.\.\., factors\)`.*'b' is not expected",
    ),
    "factors_of_another_shape": (
        lambda: LowRankPlusDiagonal(ONES, with_leaf(FACTORS, b=torch.ones(4, 2))),
        ValueError,
        r"without the last axis 'b' has shape \(4,\), not \(2,\)",
    ),
    "factors_without_a_last_axis": (
        lambda: Dense({"gain": torch.tensor(1.0)}),
        ValueError,
        r"'gain' has shape \(\).*unsqueeze",
    ),
    "factors_of_two_ranks": (
        lambda: Dense(with_leaf(FACTORS, w=torch.ones(2, 3, 5))),
        ValueError,
        "'w' has 5 where 'b' has 4.*zeros",
    ),
    "factors_not_finite": (
        lambda: Dense(with_leaf(FACTORS, w=torch.full((2, 3, 4), math.nan))),
        ValueError,
        r"`Dense\(factors\)` should be finite; 'w'",
    ),
    "factors_are_integers": (
        lambda: Dense({"w": torch.ones(2, 2).long()}),
        TypeError,
        r"'w' is torch\.int64",
    ),
    "factors_are_numbers": (lambda: Dense({"w": 1.0}), TypeError, "'w' is float"),
    "basis_of_another_shape": (
        lambda: Kronecker(ONES, EYES[0], with_leaf(EYES[1], w=torch.eye(2))),
        ValueError,
        r"`Kronecker\(\.\.\., input_basis\)`.*'w' has shape \(2, 2\), not \(3, 3\)",
    ),
    "basis_of_a_leaf_that_is_not_there": (
        lambda: Kronecker({"w": torch.ones(2, 3)}, EYES[0], {}),
        ValueError,
        r"`Kronecker\(\.\.\., output_basis, \.\.\.\)`.*'b' is not expected\. A leaf may be missing",
    ),
    "basis_is_a_vector": (
        lambda: Kronecker(ONES, {"b": torch.ones(2)}, {}),
        ValueError,
        r"'b' has shape \(2,\), not \(2, 2\)",
    ),
    "basis_is_none": (
        lambda: Kronecker(ONES, None, {}),
        TypeError,
        "output_basis.*not have None.*`{}` if all",
    ),
    "basis_of_a_leaf_is_none": (
        lambda: Kronecker(ONES, {}, {"w": None}),
        TypeError,
        r"`Kronecker\(\.\.\., input_basis\)`.*leave the leaf out",
    ),
    "basis_not_finite": (
        lambda: Kronecker(ONES, {}, {"w": torch.full((3, 3), math.nan)}),
        ValueError,
        r"`Kronecker\(\.\.\., input_basis\)` should be finite; 'w'",
    ),
    "factor_missing": (
        lambda: Kronecker.from_factors(ONES, {"w": torch.eye(2)}, EYES[1], 1.0),
        ValueError,
        "grad_cov=.*'b' is missing",
    ),
    "diagonal_factor_of_another_length": (
        lambda: Kronecker.from_factors(ONES, with_leaf(EYES[0], w=torch.ones(3)), EYES[1], 1.0),
        ValueError,
        r"grad_cov=.*as a vector; 'w' has shape \(3,\), not \(2,\)",
    ),
    "factor_of_another_shape": (
        lambda: Kronecker.from_factors(ONES, with_leaf(EYES[0], b=torch.eye(3)), EYES[1], 1.0),
        ValueError,
        r"grad_cov=.*'b' has shape \(3, 3\), not \(2, 2\)",
    ),
    "factor_not_finite": (
        lambda: Kronecker.from_factors(
            ONES, EYES[0], with_leaf(EYES[1], w=torch.full((3, 3), math.nan)), 1.0
        ),
        ValueError,
        "input_cov=.*should be finite; 'w'",
    ),
    "prior_zero_where_curvature_is": (
        lambda: Kronecker.from_factors(ONES, with_leaf(EYES[0], b=torch.zeros(2, 2)), EYES[1], 0.0),
        ValueError,
        "positive precision.*'b'.*smallest eigenvalue of 0.*larger `prior_precision`",
    ),
    "prior_of_each_parameter": (
        lambda: Kronecker.from_factors(ONES, *EYES, prior_precision=ONES),
        ValueError,
        r"prior_precision=\.\.\.\)` should be one number.*got shape \(2,\).*'b'",
    ),
    "prior_lacks_a_leaf": (
        lambda: Kronecker.from_factors(ONES, *EYES, prior_precision={"w": 1.0}),
        ValueError,
        "'b' is missing",
    ),
    "scale_zero": (lambda: Diagonal(ONES).scaled(0.0), ValueError, r"`scaled\(factor\)` should be positive"),
    "scale_nan": (
        lambda: Dense(FACTORS).scaled(math.nan),
        ValueError,
        r"`scaled\(factor\)` should be positive",
    ),
    "scale_of_several_numbers": (
        lambda: Diagonal(ONES).scaled(torch.ones(2)),
        ValueError,
        r"should be one number, got shape \(2,\)",
    ),
    "scale_of_one_number_with_an_axis": (
        lambda: vmap(Diagonal(ONES).scaled)(torch.ones(2, 1)),
        ValueError,
        r"should be one number, got shape \(1,\)",
    ),
    "scale_is_text": (
        lambda: Diagonal(ONES).scaled("2"),
        TypeError,
        r"`scaled\(factor\)` should be a number, got str\.",
    ),
    "scale_is_a_truth": (lambda: Dense(FACTORS).scaled(True), TypeError, r"be a number, got bool\."),
    "scale_is_a_tensor_of_truth": (
        lambda: Dense(FACTORS).scaled(torch.tensor(True)),
        TypeError,
        r"be a number, got torch\.bool\.",
    ),
    "vector_of_another_shape": (
        lambda: Diagonal(ONES).matvec({"w": torch.ones(2, 3), "b": torch.ones(3)}),
        ValueError,
        r"`matvec\(vector\)`.*'b' has shape \(3,\), not \(2,\)",
    ),
    "vector_lacks_a_leaf": (
        lambda: Dense(FACTORS).solve({"w": torch.ones(2, 3)}),
        ValueError,
        r"`solve\(vector\)`.*'b' is missing",
    ),
    "rank_too_low_to_invert": (lambda: Dense(FACTORS).logdet(), ValueError, "rank is at most 4.*of 8"),
    "rows_dependent": (
        lambda: Dense({"w": torch.ones(2, 3)}).logdet(),
        ValueError,
        r"linearly dependent.*torch\.float32",
    ),
    "density_beside_too_few_columns": (
        lambda: Gaussian(ONES, Dense(FACTORS)).log_prob(ONES),
        ValueError,
        r"`log_prob\(params\)` has no density to give: its rank is at most 4",
    ),
    "density_where_a_variance_is_zero": (
        lambda: Gaussian(ONES, LowRankPlusDiagonal(with_leaf(ONES, b=torch.zeros(2)), FACTORS)).log_prob(
            ONES
        ),
        ValueError,
        "`log_prob.*variance of 'b' is zero",
    ),
    "mean_of_another_dtype": (
        lambda: Gaussian(with_leaf(ONES, w=torch.ones(2, 3, dtype=F64)), Diagonal(ONES)),
        ValueError,
        r"in it 'w' is torch\.float32 on cpu, not torch\.float64 on cpu\..*`funcbayes\.to",
    ),
    "mean_on_another_device": (
        lambda: Gaussian(fb.to(ONES, device="meta"), Diagonal(ONES)),
        ValueError,
        r"in it 'b' is torch\.float32 on cpu, not torch\.float32 on meta\.",
    ),
    "mean_of_other_leaves": (
        lambda: Gaussian({"w": torch.ones(2, 3)}, Dense(FACTORS)),
        ValueError,
        "'b' is not expected",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_covariances_refuse(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_diagonal_covariance_gives_the_variance_itself():
    posterior = gaussian(linear_params())
    assert posterior.variance is posterior.covariance.variance
