"""Curvatures against sums over rows of Jacobians and Hessians that are written out."""

import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import optree
import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset
from zoo import F64, entry, from_module, randn, randn_like, seeded, shifted, stacked

import funcbayes as fb
from funcbayes import curvature
from funcbayes._tree import named_leaves
from funcbayes.curvature import Diag, EigenKron, Full, Kron, LowRank, _columns, _curvature, _products
from funcbayes.likelihoods import Bernoulli, Categorical, HeteroscedasticNormal, Normal, Poisson

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    pytest.mark.filterwarnings("ignore:The Hessian in .* is indefinite:UserWarning"),
]

NUM_ROWS = 5


# What is expected, in flat vectors of all leaves in the order of their paths.


def flat(tree):
    return torch.cat([leaf.reshape(-1) for leaf in named_leaves(tree).values()])


def unflat(vector, like):
    """The tree of a vector: leaves of ``like`` in the order of paths."""
    leaves = named_leaves(like)
    parts = dict(zip(leaves, vector.split([leaf.numel() for leaf in leaves.values()]), strict=True))
    return fb._tree.map_named(lambda name, leaf: parts[name].reshape(leaf.shape), like)


def index_of(params, name):
    """Where the numbers of a leaf are in a flat vector."""
    start = 0
    for other, leaf in named_leaves(params).items():
        if other == name:
            return slice(start, start + leaf.numel())
        start += leaf.numel()
    raise KeyError(name)


def row(x, n):
    return optree.tree_map(lambda leaf: leaf[n : n + 1], x)


def jacobian(fn, params, x):
    """``(N, outputs, P)``, by reverse mode row by row."""
    with sdpa_kernel(SDPBackend.MATH):
        return torch.stack(
            [
                torch.func.jacrev(lambda v, n=n: fn(unflat(v, params), row(x, n)).reshape(-1))(flat(params))
                for n in range(zoo_rows(x))
            ]
        )


def zoo_rows(x):
    return len(optree.tree_leaves(x)[0])


# Likelihoods. The Fisher in the outputs is the Hessian of the cross entropy to the distribution itself.


def cross_entropy_of_classes(axis, ignore=-100):
    def cross_entropy(f, own, y):
        terms = -(own.softmax(axis) * f.log_softmax(axis)).sum(axis)
        return terms[y != ignore].sum()

    return cross_entropy


def cross_entropy_of_normals(noise_std):
    return lambda f, own, y: (((f - own) / noise_std) ** 2).sum() / 2


def cross_entropy_of_labels(f, own, y):
    return F.binary_cross_entropy_with_logits(f, own.sigmoid(), reduction="sum")


def cross_entropy_of_counts(f, own, y):
    return (f.exp() - own.exp() * f).sum()


def cross_entropy_of_noisy(f, own, y):
    (mean, log_variance), (own_mean, own_log_variance) = f.chunk(2, -1), own.chunk(2, -1)
    squares = own_log_variance.exp() + (mean - own_mean) ** 2
    return 0.5 * (log_variance + squares / log_variance.exp()).sum()


def labels(below, *shape, ignored=None):
    y = torch.randint(below, shape, generator=seeded(7))
    if ignored is not None:
        y[torch.rand(shape, generator=seeded(8)) < 0.4] = ignored
    return y


class Case(NamedTuple):
    likelihood: Any
    event: tuple[int, ...]
    y: Tensor
    cross_entropy: Callable[..., Tensor]


N = NUM_ROWS
VECTOR = torch.tensor([0.3, 2.0], dtype=F64)
MAP = randn(2, 3, seed=3).exp()
# Likelihoods with a noise that is chosen later are those of unit noise here.
CASES: dict[str, Callable[[], Case]] = {
    "normal": lambda: Case(Normal(1.0), (2,), randn(N, 2, seed=4), cross_entropy_of_normals(1.0)),
    "normal_0.3": lambda: Case(Normal(0.3), (2,), randn(N, 2, seed=4), cross_entropy_of_normals(1.0)),
    "normal_one_output": lambda: Case(Normal(1.0), (), randn(N, seed=4), cross_entropy_of_normals(1.0)),
    "normal_vector": lambda: Case(
        Normal(VECTOR), (2,), randn(N, 2, seed=4), cross_entropy_of_normals(VECTOR)
    ),
    "normal_positions": lambda: Case(
        Normal(torch.tensor(0.5)), (3, 2), randn(N, 3, 2, seed=4), cross_entropy_of_normals(1.0)
    ),
    "normal_map": lambda: Case(Normal(MAP), (2, 3), randn(N, 2, 3, seed=4), cross_entropy_of_normals(MAP)),
    "categorical": lambda: Case(Categorical(), (3,), labels(3, N), cross_entropy_of_classes(-1)),
    "categorical_ignored": lambda: Case(
        Categorical(ignore_index=-1), (3,), labels(3, N, ignored=-1), cross_entropy_of_classes(-1, -1)
    ),
    "categorical_images": lambda: Case(
        Categorical(class_axis=1, ignore_index=7),
        (3, 2, 2),
        labels(3, N, 2, 2, ignored=7),
        cross_entropy_of_classes(0, 7),
    ),
    "categorical_tokens": lambda: Case(Categorical(), (4, 3), labels(3, N, 4), cross_entropy_of_classes(-1)),
    "bernoulli": lambda: Case(Bernoulli(), (2,), labels(2, N, 2), cross_entropy_of_labels),
    "bernoulli_one_output": lambda: Case(Bernoulli(), (), labels(2, N), cross_entropy_of_labels),
    "poisson": lambda: Case(Poisson(), (2,), labels(5, N, 2), cross_entropy_of_counts),
    "heteroscedastic": lambda: Case(
        HeteroscedasticNormal(), (4,), randn(N, 2, seed=4), cross_entropy_of_noisy
    ),
    "heteroscedastic_positions": lambda: Case(
        HeteroscedasticNormal(), (3, 2), randn(N, 3, 1, seed=4), cross_entropy_of_noisy
    ),
}


def of(table):
    return pytest.mark.parametrize("make", table.values(), ids=table.keys())


def network(event):
    """A network with outputs ``(N, *event)``, its leaves and inputs."""
    width = math.prod(event)

    def fn(params, x):
        h = F.linear(x, params["body"]["w"], params["body"]["b"]).tanh()
        return F.linear(h, params["head"]).reshape(-1, *event)

    params = {"body": {"w": randn(3, 2), "b": randn(3, seed=1)}, "head": 0.5 * randn(width, 3, seed=2)}
    return fn, params, randn(NUM_ROWS, 2, seed=3)


def fishers(case, outputs):
    """``(N, outputs, outputs)``."""
    found = []
    for f, y in zip(outputs, case.y, strict=True):
        own = f.detach()
        of_row = torch.autograd.functional.hessian(
            lambda v, own=own, y=y: case.cross_entropy(v.reshape(own.shape), own, y), own.reshape(-1)
        )
        found.append(of_row)
    return torch.stack(found)


def expected_ggn(fn, params, x, case):
    j, middle = jacobian(fn, params, x), fishers(case, fn(params, x))
    return torch.einsum("nap,nab,nbq->pq", j, middle, j)


def expected_scores(fn, params, x, likelihood, y):
    """Gradients ``(N, P)`` of the log likelihood of each row."""
    return torch.stack(
        [
            torch.func.grad(
                lambda v, n=n: likelihood.log_prob(fn(unflat(v, params), row(x, n)), y[n : n + 1]).sum()
            )(flat(params))
            for n in range(zoo_rows(x))
        ]
    )


def dense(c, params):
    """A curvature as a matrix, as its docstring says what it is."""
    if isinstance(c, Full):
        return c.matrix
    if isinstance(c, Diag):
        return torch.diag(flat(c.diagonal))
    if isinstance(c, LowRank):
        vectors = joined_vectors(c)
        return vectors * c.eigenvalues @ vectors.mT
    return torch.block_diag(*(block(c, name) for name in named_leaves(c_like(c))))


def c_like(c):
    return c.output_sum if isinstance(c, Kron) else c.eigenvalues


def kron(a, b):
    return torch.kron(a.contiguous(), b.contiguous())


def block(c, name):
    """The matrix of one leaf."""

    def part(tree, size):
        found = named_leaves(tree).get(name)
        if found is None:
            return torch.eye(size, dtype=F64)
        return torch.diag(found) if found.ndim == 1 else found

    if isinstance(c, Kron):
        return kron(part(c.output_sum, 0), part(c.input_sum, 0)) / named_leaves(c.count)[name]
    values = named_leaves(c.eigenvalues)[name]
    basis = kron(part(c.output_basis, len(values)), part(c.input_basis, values.shape[1]))
    return basis * values.reshape(-1) @ basis.mT


# The GGN.


@of(CASES)
def test_the_full_ggn_is_the_sum_over_rows_of_jacobians_around_the_fisher(make):
    case = make()
    fn, params, x = network(case.event)
    c = curvature.ggn(fn, params, (x, case.y), case.likelihood, "full")
    assert_close(c.matrix, expected_ggn(fn, params, x, case))
    assert_close(c.eigenvalues, torch.linalg.eigvalsh(c.matrix))


@of(CASES)
def test_the_diagonal_ggn_is_the_diagonal_of_the_matrix(make):
    case = make()
    fn, params, x = network(case.event)
    c = curvature.ggn(fn, params, (x, case.y), case.likelihood, "diag")
    expected = unflat(expected_ggn(fn, params, x, case).diagonal(), params)
    assert_close(c.diagonal, expected)


@of(CASES)
def test_the_low_rank_ggn_of_every_eigenvalue_is_the_matrix(make):
    case = make()
    fn, params, x = network(case.event)
    expected = expected_ggn(fn, params, x, case)
    c = curvature.ggn(fn, params, (x, case.y), case.likelihood, "low_rank", rank=len(expected), seed=0)
    assert_close(dense(c, params), expected, rtol=1e-6, atol=1e-9)


@of(CASES)
def test_products_with_the_ggn_and_the_hessian_are_those_of_the_matrices(make):
    case = make()
    fn, params, x = network(case.event)
    vector = randn_like(params, 9)
    noise = case.likelihood.noise_std if isinstance(case.likelihood, Normal) else 1.0
    scale = noise**-2 if isinstance(noise, float) or noise.numel() == 1 else 1.0
    product = curvature.ggn_matvec(fn, params, (x, case.y), case.likelihood)
    assert_close(flat(product(vector)), scale * expected_ggn(fn, params, x, case) @ flat(vector))
    assert_close(product(vector), product(vector), rtol=0, atol=0)

    def loss(v):
        return -case.likelihood.log_prob(fn(unflat(v, params), x), case.y).sum()

    hessian = torch.autograd.functional.hessian(loss, flat(params))
    product = curvature.hvp(fn, params, (x, case.y), case.likelihood)
    assert_close(flat(product(vector)), hessian @ flat(vector))


def unit_loss(case, fn, params, x):
    """Minus the log likelihood as a function of a flat vector, with noise that is chosen later set to 1."""
    likelihood = case.likelihood
    if isinstance(likelihood, Normal) and torch.as_tensor(likelihood.noise_std).numel() == 1:
        likelihood = Normal(1.0)
    return lambda v: -likelihood.log_prob(fn(unflat(v, params), x), case.y).sum()


@of(CASES)
def test_the_hessian_is_the_one_of_autograd(make):
    case = make()
    fn, params, x = network(case.event)
    expected = torch.autograd.functional.hessian(unit_loss(case, fn, params, x), flat(params))
    data = (x, case.y)
    assert_close(curvature.hessian(fn, params, data, case.likelihood).matrix, expected)
    c = curvature.hessian(fn, params, data, case.likelihood, "diag", batch_size=2)
    assert_close(c.diagonal, unflat(expected.diagonal(), params))
    c = curvature.hessian(fn, params, data, case.likelihood, "low_rank", rank=len(expected), seed=0)
    values, vectors = torch.linalg.eigh(expected)
    kept = values > 0  # negative ones are left out
    assert_close(
        dense(c, params), vectors[:, kept] * values[kept] @ vectors[:, kept].mT, rtol=1e-6, atol=1e-9
    )


@of(CASES)
def test_the_empirical_fisher_is_the_sum_of_squared_scores(make):
    case = make()
    fn, params, x = network(case.event)
    likelihood = case.likelihood
    chosen_later = isinstance(likelihood, Normal) and torch.as_tensor(likelihood.noise_std).numel() == 1
    scores = expected_scores(fn, params, x, Normal(1.0) if chosen_later else likelihood, case.y)
    expected = scores.mT @ scores
    data = (x, case.y)
    assert_close(curvature.empirical_fisher(fn, params, data, likelihood, "full").matrix, expected)
    c = curvature.empirical_fisher(fn, params, data, likelihood)
    assert_close(c.diagonal, unflat(expected.diagonal(), params))
    c = curvature.empirical_fisher(fn, params, data, likelihood, "low_rank", seed=0)
    assert_close(dense(c, params), expected, rtol=1e-6, atol=1e-9)
    assert c.rank <= NUM_ROWS
    # With the noise that there is, directly.
    scores = expected_scores(fn, params, x, likelihood, case.y)
    assert c.data.noise_power == 4
    assert_close(dense(c, params) * c.data.factor(), scores.mT @ scores, rtol=1e-6, atol=1e-9)


@of(CASES)
def test_the_fisher_by_monte_carlo_is_the_ggn_but_for_its_standard_error(make):
    mc_samples, few = 500, 20
    case = make()
    fn, params, x = network(case.event)
    options = {"mc_samples": mc_samples, "seed": 3}
    exact = expected_ggn(fn, params, x, case).diagonal()
    got = flat(curvature.fisher(fn, params, (x, case.y), case.likelihood, "diag", **options).diagonal)
    # One draw: sum over rows of squared scores; its variance from the spread over independent estimates.
    single = torch.stack(
        [
            flat(
                curvature.fisher(
                    fn, params, (x, case.y), case.likelihood, "diag", mc_samples=few, seed=seed
                ).diagonal
            )
            for seed in range(100, 120)
        ]
    )
    sem = single.std(0) * (few / mc_samples) ** 0.5
    assert ((got - exact).abs() <= 5 * sem + 1e-9).all()
    assert (sem < 0.2 * exact + 1e-9).all()  # or this would say little


def test_each_structure_of_the_fisher_is_of_the_same_drawn_targets():
    case = CASES["categorical"]()
    fn, params, x = network(case.event)

    def fisher(structure, seed=5):
        return curvature.fisher(fn, params, (x, case.y), case.likelihood, structure, mc_samples=3, seed=seed)

    matrix = fisher("full").matrix
    assert_close(flat(fisher("diag").diagonal), matrix.diagonal())
    assert_close(dense(fisher("low_rank"), params), matrix)
    bias = index_of(params, "body.b")  # whose factor is the block itself
    assert_close(block(fisher("kron"), "body.b"), matrix[bias, bias])
    assert not torch.equal(fisher("full", seed=6).matrix, matrix)
    assert not torch.equal(curvature.ggn(fn, params, (x, case.y), case.likelihood, "full").matrix, matrix)


def test_the_fisher_does_not_depend_on_the_targets_but_for_those_ignored():
    case = CASES["categorical_ignored"]()
    fn, params, x = network(case.event)
    other = torch.where(case.y == -1, -1, (case.y + 1) % 3)
    whole = torch.where(case.y == -1, 0, case.y)

    def fisher(y):
        return curvature.fisher(fn, params, (x, y), case.likelihood, "full", seed=5).matrix

    assert torch.equal(fisher(case.y), fisher(other))
    assert (fisher(whole) - fisher(case.y)).diagonal().sum() > 0.1


def test_drawn_targets_depend_on_the_seed_and_on_the_batches():
    case = CASES["categorical"]()
    fn, params, x = network(case.event)
    data = (x, case.y)
    parts = list(zip(x.split(2), case.y.split(2), strict=True))

    def fisher(data, **options):
        return flat(curvature.fisher(fn, params, data, case.likelihood, "diag", **options).diagonal)

    assert torch.equal(fisher(data, seed=1), fisher(data, seed=1))
    for other in (
        fisher(parts, seed=1),
        fisher(data, seed=1, batch_size=2),
        fisher(data, seed=1, max_bytes=1),
    ):
        assert_close(other, fisher(data, seed=1))  # what is drawn belongs to the row
    assert not torch.equal(fisher(data, seed=1), fisher(data, seed=2))
    torch.manual_seed(4)
    first = fisher(data)
    torch.manual_seed(4)
    assert torch.equal(fisher(data), first)


# Kronecker products, in the notation of Eschenhagen et al. (2023): a layer maps inputs a_nr to s_nr = W a_nr
# at positions r; b_nr is the derivative of the outputs f_n in s_nr.


class Layered(NamedTuple):
    """A network of which inputs and outputs of each layer can be looked at.

    ``run(params, x, shifts)`` returns outputs, and for each layer its inputs ``(N, R, d_in)``; ``shifts``
    ``(N, R, d_out)`` are added to what comes out.
    """

    run: Callable[..., Any]
    params: Any
    x: Any
    shapes: dict[str, tuple[int, int]]  # positions and outputs of each layer
    event: tuple[int, ...]

    def fn(self, params, x):
        return self.run(params, x, None)[0]


def shifted_by(s, shifts, name):
    return s if shifts is None else s + shifts[name].reshape(s.shape)


def dense_layers(event=(2,)):
    def run(params, x, shifts):
        s = shifted_by(F.linear(x, params["w"], params["b"]), shifts, "w")
        h = s.tanh()
        f = shifted_by(F.linear(h, params["v"]), shifts, "v")
        return f.reshape(-1, *event), {"w": x.unsqueeze(1), "v": h.unsqueeze(1)}

    width = math.prod(event)
    params = {"w": randn(4, 3), "b": randn(4, seed=1), "v": randn(width, 4, seed=2)}
    return Layered(run, params, randn(N, 3, seed=3), {"w": (1, 4), "v": (1, width)}, event)


def token_layers(event=(3, 2), last="tokens"):
    """Linear layers at positions; outputs for each of them, or for all together."""

    def run(params, x, shifts):
        h = shifted_by(F.linear(x, params["w"], params["b"]), shifts, "w").tanh()
        h = h + h.flip(1) ** 2  # positions meet
        f = shifted_by(F.linear(h, params["v"]), shifts, "v")
        return f if last == "tokens" else f.mean(1), {"w": x, "v": h}

    params = {"w": randn(4, 3), "b": randn(4, seed=1), "v": randn(2, 4, seed=2)}
    return Layered(run, params, randn(N, 3, 3, seed=3), {"w": (3, 4), "v": (3, 2)}, event)


def image_layers(event=(3, 2, 2)):
    """Convolutions, with classes on the second axis."""

    def run(params, x, shifts):
        s = F.conv2d(x, params["w"], params["b"], stride=2, padding=1)
        h = shifted_by(s, shifts, "w").tanh()
        f = shifted_by(F.conv2d(h, params["v"]), shifts, "v")
        inputs = {
            "w": F.unfold(x, 3, stride=2, padding=1).mT,  # (N, R, C k k)
            "v": F.unfold(h, 2).mT,
        }
        return f, inputs

    params = {"w": randn(4, 2, 3, 3), "b": randn(4, seed=1), "v": randn(3, 4, 2, 2, seed=2)}
    return Layered(run, params, randn(N, 2, 5, 6, seed=3), {"w": (9, 4), "v": (4, 3)}, event)


def output_major(layered):
    """Shifts of images have channels before places."""
    return layered.x.ndim == 4


def factors(layered, case, sharing):
    """``A`` and ``G`` of each layer, and ``G`` of its bias."""
    found = {name: [0.0, 0.0, 0.0] for name in layered.shapes}
    middle = fishers(case, layered.fn(layered.params, layered.x))
    for n in range(N):
        x = row(layered.x, n)
        zeros = {
            name: torch.zeros((d, r) if output_major(layered) else (r, d), dtype=F64)
            for name, (r, d) in layered.shapes.items()
        }
        derivatives = torch.func.jacrev(
            lambda shifts, x=x: layered.run(layered.params, x, shifts)[0].reshape(-1)
        )(zeros)
        inputs = layered.run(layered.params, x, None)[1]
        for name, (count, _) in layered.shapes.items():
            a, b = inputs[name][0], derivatives[name]  # (R, d_in), (outputs, R, d_out)
            b = b.mT if output_major(layered) else b
            assert a.shape[0] == b.shape[1] == count
            if sharing == "reduce":
                a, b = a.mean(0, keepdim=True), b.sum(1, keepdim=True)
            for r in range(a.shape[0]):
                g = b[:, r].mT @ middle[n] @ b[:, r]
                found[name][0] = found[name][0] + torch.outer(a[r], a[r]) / (N * a.shape[0])
                found[name][1] = found[name][1] + g
    return found


KRON_CASES = {
    "mlp": (functools.partial(dense_layers, (3,)), "categorical"),
    "mlp_normal": (dense_layers, "normal"),
    "mlp_noisy": (functools.partial(dense_layers, (4,)), "heteroscedastic"),
    "tokens": (token_layers, "normal_positions"),
    "pooled": (functools.partial(token_layers, (2,), "pooled"), "bernoulli"),
    "images": (image_layers, "categorical_images"),
}


def all_kron_cases(table):
    return pytest.mark.parametrize(("make_layers", "case"), table.values(), ids=table.keys())


@all_kron_cases(KRON_CASES)
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_kronecker_factors_are_those_of_the_papers(make_layers, case, sharing):
    layered, case = make_layers(), CASES[case]()
    c = curvature.ggn(
        layered.fn, layered.params, (layered.x, case.y), case.likelihood, weight_sharing=sharing, batch_size=2
    )
    for name, (a, g, _) in factors(layered, case, sharing).items():
        assert_close(c.input_cov[name], a)
        assert_close(c.grad_cov[name], g)
        if name == "w":  # the bias of the layer has inputs of 1
            assert_close(c.grad_cov["b"], g)
            assert_close(c.input_cov["b"], torch.ones(1, 1, dtype=F64))


@all_kron_cases(KRON_CASES)
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_corrected_eigenvalues_are_the_diagonal_in_the_eigenbasis(make_layers, case, sharing):
    layered, case = make_layers(), CASES[case]()
    options = {"weight_sharing": sharing, "batch_size": 2}
    data = (layered.x, case.y)
    plain = curvature.ggn(layered.fn, layered.params, data, case.likelihood, **options)
    c = curvature.ggn(
        layered.fn, layered.params, data, case.likelihood, eigenvalue_correction=True, **options
    )
    assert isinstance(c, EigenKron)
    exact = expected_ggn(layered.fn, layered.params, layered.x, case)
    for name in layered.params:
        part = index_of(layered.params, name)
        of_leaf, basis = exact[part, part], kron(c.output_basis[name], c.input_basis[name])
        assert_close(basis.mT @ basis, torch.eye(len(basis), dtype=F64))
        turned_kron = basis.mT @ block(plain, name) @ basis
        assert_close(turned_kron, torch.diag(turned_kron.diagonal()))
        assert_close(plain.eigen.eigenvalues[name].reshape(-1), turned_kron.diagonal())
        assert_close(block(plain.eigen, name), block(plain, name))
        assert_close(c.eigenvalues[name].reshape(-1), (basis.mT @ of_leaf @ basis).diagonal())
        error, plain_error = (torch.linalg.norm(block(k, name) - of_leaf) for k in (c, plain))
        assert error <= plain_error + 1e-12 * torch.linalg.norm(of_leaf)
        if name == "w":
            assert error < 0.99 * plain_error


# Where a Kronecker product is exact.


def deep_linear(params, x):
    return F.linear(F.linear(x, params["w"], params["b"]), params["v"])


DEEP = {"w": (4, 3), "b": (4,), "v": (2, 4)}
EXPAND, REDUCE, BOTH = ("expand",), ("reduce",), ("expand", "reduce")


def leaves(shapes):
    return {name: randn(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}


def one_row(event):
    def make():
        layered = dense_layers(event)
        return layered.fn, layered.params, layered.x[:1]

    return make


def tokens_of(*shape, below=4):
    return torch.randint(below, shape, generator=seeded(3))


class Exact(NamedTuple):
    """When a Kronecker product is the matrix, and with which kinds of weight sharing."""

    make: Callable[[], Any]  # fn, params, x
    likelihood: Any
    sharing: tuple[str, ...]
    but: tuple[str, ...] = ()  # leaves for which it is not


def of_shapes(fn, shapes, *x_shape):
    return lambda: (fn, leaves(shapes), randn(*x_shape, seed=9))


EXACT: dict[str, Exact] = {
    # One row, one position: a single outer product around the Fisher of the outputs.
    "one_row_classes": Exact(one_row((3,)), Categorical(), BOTH),
    "one_row_counts": Exact(one_row((2,)), Poisson(), BOTH),
    "linear_regression": Exact(
        of_shapes(lambda p, x: F.linear(x, p["w"], p["b"]), {"w": (2, 3), "b": (2,)}, N, 3), Normal(0.7), BOTH
    ),
    "deep_linear": Exact(of_shapes(deep_linear, DEEP, N, 3), Normal(1.0), BOTH),
    "deep_linear_vector_noise": Exact(of_shapes(deep_linear, DEEP, N, 3), Normal(VECTOR), BOTH),
    # Expand: each position has an output of its own. Biases of all positions add up, but here none meet.
    "deep_linear_positions": Exact(of_shapes(deep_linear, DEEP, N, 4, 3), Normal(1.0), EXPAND),
    "pointwise_convolutions": Exact(
        of_shapes(
            lambda p, x: F.conv1d(F.conv1d(x, p["w"]), p["v"]).mT, {"w": (4, 3, 1), "v": (2, 4, 1)}, N, 3, 5
        ),
        Normal(1.0),
        EXPAND,
    ),
    # Reduce: positions are averaged in the end.
    "deep_linear_averaged": Exact(
        of_shapes(lambda p, x: deep_linear(p, x).mean(1), DEEP, N, 4, 3), Normal(1.0), REDUCE
    ),
    "convolution_averaged": Exact(
        of_shapes(
            lambda p, x: F.conv2d(x, p["w"], p["b"], padding=1, stride=2).mean((2, 3)),
            {"w": (2, 3, 3, 3), "b": (2,)},
            *(N, 3, 5, 4),
        ),
        Normal(1.0),
        REDUCE,
    ),
    "transposed_convolution": Exact(
        of_shapes(
            lambda p, x: F.conv_transpose1d(x, p["w"], p["b"], stride=2).flatten(1),
            {"w": (3, 2, 2), "b": (2,)},
            *(N, 3, 4),
        ),
        Normal(1.0),
        EXPAND,
        ("b",),
    ),
    "looked_up": Exact(
        lambda: (lambda p, x: F.embedding(x, p["w"]), leaves({"w": (4, 3)}), tokens_of(N)), Normal(1.0), BOTH
    ),
    "looked_up_with_padding": Exact(
        lambda: (
            lambda p, x: F.embedding(x, p["w"], padding_idx=2).flatten(1),
            leaves({"w": (4, 3)}),
            torch.tensor([[0, 2], [2, 2], [3, 2], [1, 2], [2, 0]]),
        ),
        Normal(1.0),
        BOTH,
    ),
    # A matrix that is used in some other way, of one row and one output.
    "other_use": Exact(
        of_shapes(lambda p, x: (x @ p["w"].T).tanh() @ p["v"].T, {"w": (4, 3), "v": (1, 4)}, 1, 3),
        Bernoulli(),
        BOTH,
    ),
    "vectors": Exact(
        of_shapes(
            lambda p, x: F.layer_norm(x, (3,), p["w"], p["b"]).tanh().sum(1) * p["gain"],
            {"w": (3,), "b": (3,), "gain": (3,)},
            *(N, 4, 3),
        ),
        Categorical(),
        BOTH,
    ),
}


@of(EXACT)
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("correction", [False, True])
def test_a_kronecker_product_is_exact_where_theory_says_so(make, sharing, correction):
    fn, params, x = make.make()
    outputs = fn(params, x)
    y = (
        (outputs.argmax(-1) + 1) % 3
        if isinstance(make.likelihood, Categorical)
        else torch.zeros_like(outputs)
    )
    options = {"weight_sharing": sharing, "eigenvalue_correction": correction}
    c = curvature.ggn(fn, params, (x, y), make.likelihood, **options)
    exact = curvature_by_hand(fn, params, x, make.likelihood)
    is_exact = []
    for name in params:
        part = index_of(params, name)
        if name not in make.but:
            got, expected = block(c, name), exact[part, part]
            is_exact.append(torch.allclose(got, expected, rtol=1e-6, atol=1e-9))
    assert all(is_exact) == (sharing in make.sharing)


def curvature_by_hand(fn, params, x, likelihood):
    cross_entropies = {
        Categorical: cross_entropy_of_classes(-1),
        Bernoulli: cross_entropy_of_labels,
        Poisson: cross_entropy_of_counts,
    }
    if isinstance(likelihood, Normal):
        noise = likelihood.noise_std
        cross_entropy = cross_entropy_of_normals(noise if isinstance(noise, Tensor) else 1.0)
    else:
        cross_entropy = cross_entropies[type(likelihood)]
    dummy = torch.zeros(len(x), dtype=torch.long)
    return expected_ggn(fn, params, x, Case(likelihood, (), dummy, cross_entropy))


@pytest.mark.parametrize("make_layers", [dense_layers, lambda: token_layers((2,), "pooled")])
def test_the_block_of_a_bias_is_exact_at_one_position_or_if_positions_are_reduced(make_layers):
    layered, case = make_layers(), CASES["poisson"]()
    c = curvature.ggn(
        layered.fn, layered.params, (layered.x, case.y), case.likelihood, weight_sharing="reduce"
    )
    part = index_of(layered.params, "b")
    exact = expected_ggn(layered.fn, layered.params, layered.x, case)
    assert_close(block(c, "b"), exact[part, part])


def test_the_trace_is_exact_for_a_matrix_that_no_layer_shows():
    def fn(params, x):
        return (x @ params["w"].T).tanh() @ params["v"].T

    params, x = leaves({"w": (4, 3), "v": (3, 4)}), randn(N, 3, seed=9)
    case = CASES["categorical"]()
    c = curvature.ggn(fn, params, (x, case.y), case.likelihood, batch_size=2)
    exact = expected_ggn(fn, params, x, case)
    for name in params:
        part = index_of(params, name)
        assert_close(block(c, name).trace(), exact[part, part].trace())
        of_leaf = exact[part, part].reshape(*params[name].shape, *params[name].shape)
        assert_close(c.grad_cov[name], torch.einsum("aibi->ab", of_leaf))


def test_groups_of_a_convolution_are_positions_with_gradients_in_their_own_outputs():
    """``G`` is block-diagonal, and ``A`` an average over groups as over pixels."""
    params, x = leaves({"w": (4, 2, 2)}), randn(N, 4, 4, seed=9)

    def fn(params, x):
        return F.conv1d(x, params["w"], groups=2).tanh().flatten(1)

    c = curvature.ggn(fn, params, (x, torch.zeros(N, 12)), Normal(1.0))
    a, g = torch.zeros(4, 4, dtype=F64), torch.zeros(4, 4, dtype=F64)
    slopes = 1 - fn(params, x).unflatten(1, (4, 3)) ** 2  # of the outputs in s
    for n in range(N):
        for r in range(3):
            for group in range(2):
                patch = x[n, 2 * group : 2 * group + 2, r : r + 2].reshape(-1)
                a += torch.outer(patch, patch) / (N * 3 * 2)
            g += torch.diag(slopes[n, :, r] ** 2)
    assert_close(c.input_cov["w"], a)
    assert_close(c.grad_cov["w"], g)


def test_a_table_has_counts_of_its_tokens_as_one_factor_and_gradients_as_the_other():
    params, x = leaves({"w": (5, 3), "v": (2, 3)}), tokens_of(N, 4, below=5)

    def fn(params, x):
        return F.linear(F.embedding(x, params["w"]).tanh().sum(1), params["v"])

    y = torch.zeros(N, 2)
    c = curvature.ggn(fn, params, (x, y), Normal(1.0), batch_size=2)
    assert_close(c.output_sum["w"], torch.bincount(x.flatten(), minlength=5).to(F64))
    expected = torch.zeros(3, 3, dtype=F64)
    for token in x.flatten():
        slope = torch.diag(1 - params["w"][token].tanh() ** 2)
        expected += slope @ params["v"].T @ params["v"] @ slope
    assert_close(c.input_cov["w"], expected / x.numel())
    corrected = curvature.ggn(fn, params, (x, y), Normal(1.0), eigenvalue_correction=True)
    assert "w" not in corrected.output_basis
    exact = curvature_by_hand(fn, params, x, Normal(1.0))[index_of(params, "w"), index_of(params, "w")]
    basis = kron(torch.eye(5, dtype=F64), corrected.input_basis["w"])
    assert_close(corrected.eigenvalues["w"].reshape(-1), (basis.mT @ exact @ basis).diagonal())


# Data in batches, and curvatures that add up.

KINDS: dict[str, Callable[..., Any]] = {
    "ggn": curvature.ggn,
    "fisher": functools.partial(curvature.fisher, mc_samples=2, seed=4),
    "empirical": curvature.empirical_fisher,
    "hessian": curvature.hessian,
}
STRUCTURES: dict[str, dict[str, Any]] = {
    "diag": {"structure": "diag"},
    "kron": {"structure": "kron"},
    "kron_reduced": {"structure": "kron", "weight_sharing": "reduce"},
    "kron_corrected": {"structure": "kron", "eigenvalue_correction": True},
    "low_rank": {"structure": "low_rank", "rank": 60, "seed": 1},
    "full": {"structure": "full"},
}
COMBINATIONS = [
    (kind, structure)
    for kind in KINDS
    for structure in STRUCTURES
    if kind != "hessian" or "kron" not in structure
]


def find(kind, structure, fn, params, data, likelihood, **options):
    return KINDS[kind](fn, params, data, likelihood, **{**STRUCTURES[structure], **options})


def combinations(*but):
    chosen = [pair for pair in COMBINATIONS if not set(but) & set(pair)]
    return pytest.mark.parametrize(("kind", "structure"), chosen, ids=["-".join(pair) for pair in chosen])


class Tagger(nn.Module):
    """Embeddings, attention, normalisation, a convolution over tokens, and classes for each token."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(4, 2, padding_idx=0)
        self.shift = nn.Parameter(torch.randn(2, 2))
        self.attention = nn.MultiheadAttention(2, 1, batch_first=True)
        self.norm, self.conv, self.head = nn.LayerNorm(2), nn.Conv1d(2, 2, 3, padding=1), nn.Linear(2, 3)

    def forward(self, x):
        h = self.embedding(x["tokens"]) + self.shift
        h = self.norm(2 * h + self.attention(h, h, h, need_weights=False)[0] + h**2)
        return self.head(F.silu(self.conv(h.mT)).mT) * x["scale"][:, None, None]


def tagging():
    """A model, its parameters, and data: dicts as inputs, and labels ``(N, 2)``, some ignored."""
    model = from_module(Tagger, None, "")
    x = {"tokens": tokens_of(7, 2), "scale": randn(7, seed=2).exp()}
    return model.fn, model.params, (x, labels(3, 7, 2, ignored=-100)), Categorical()


def split(data, size):
    x, y = data
    return [
        (optree.tree_map(lambda leaf, s=s: leaf[s : s + size], x), y[s : s + size])
        for s in range(0, len(y), size)
    ]


def numbers(c):
    """Everything that a curvature is, whatever the signs of its eigenvectors."""
    if isinstance(c, LowRank):
        return dense(c, None), dict(vars(c.data))
    if isinstance(c, EigenKron):
        return [block(c, name) for name in named_leaves(c.eigenvalues)], dict(vars(c.data))
    return c


def assert_same(one, other, **tolerance):
    tolerance = tolerance or {"rtol": 1e-6, "atol": 1e-8}
    assert_close(as_leaves(numbers(one)), as_leaves(numbers(other)), **tolerance)


def as_leaves(tree):
    return [leaf for leaf in optree.tree_leaves(tree) if isinstance(leaf, Tensor)]


@functools.cache  # many tests compare with it
def tagged(kind, structure):
    """The curvature of :func:`tagging`, of all rows at once."""
    return find(kind, structure, *tagging())


@combinations("fisher")
def test_sums_over_batches_are_those_of_one_batch(kind, structure):
    fn, params, data, likelihood = tagging()
    whole = tagged(kind, structure)
    in_threes = find(kind, structure, fn, params, data, likelihood, batch_size=3)
    given = find(kind, structure, fn, params, split(data, 3), likelihood)
    assert_same(in_threes, whole)
    assert_same(given, whole)


@combinations("fisher")
@pytest.mark.parametrize("max_bytes", [1, 3000])
def test_results_do_not_depend_on_how_much_memory_may_be_used(kind, structure, max_bytes):
    fn, params, data, likelihood = tagging()
    data = split(data, 3)[0]  # three rows and, of a Hessian, a few columns: each is a pass of its own
    options = {"where": ["conv.*", "head.*"]} if kind == "hessian" else {}
    whole = find(kind, structure, fn, params, data, likelihood, max_bytes=1 << 40, **options)
    assert_same(find(kind, structure, fn, params, data, likelihood, max_bytes=max_bytes, **options), whole)


def projecting():
    """A leaf that is not the weight of a layer: gradients of 5 MB for all rows, 18 kB for one."""
    y = torch.arange(300) % 10
    return lambda p, x: x @ p["w"], {"w": randn(25, 10) / 5}, (randn(300, 25), y), Categorical()


def many_classes():
    """A convolution with gradients of one row of 0.5 MB for all columns, 16 kB for one."""
    net = nn.Sequential(nn.Conv2d(8, 16, 4), nn.Flatten(), nn.Linear(64, 30)).double()
    fn, params = fb.make_functional(net)
    return fn, params, (randn(2, 8, 5, 5), torch.arange(2)), Categorical()


@pytest.mark.parametrize("structure", ["diag", "kron", "kron_corrected"])
@pytest.mark.parametrize("problem", [projecting, many_classes])
def test_gradients_have_no_more_bytes_than_they_may(problem, structure):
    fn, params, data, likelihood = problem()
    whole = find("ggn", structure, fn, params, data, likelihood)
    with zoo.Largest() as largest:
        bounded = find("ggn", structure, fn, params, data, likelihood, max_bytes=60_000)
    assert 0 < largest.nbytes < 150_000, largest.shape  # a factor of the convolution has 131 kB
    assert_same(bounded, whole)


@pytest.mark.parametrize(
    ("kind", "structure"),
    [("ggn", "low_rank"), ("fisher", "low_rank"), ("hessian", "low_rank"), ("hessian", "diag")],
)
def test_products_with_vectors_take_no_more_bytes_than_they_may(kind, structure):
    net = nn.Sequential(nn.Linear(3, 50), nn.Tanh(), nn.Linear(50, 2)).double()
    fn, params = fb.make_functional(net)
    params = randn_like(params)
    data = randn(200, 3), torch.arange(200) % 2  # one hidden layer of all rows has 80 kB
    options = {"where": "2.*"} | ({"rank": 4} if structure == "low_rank" else {})
    whole = find(kind, structure, fn, params, data, Categorical(), max_bytes=1 << 40, **options)
    with zoo.Largest() as largest:
        bounded = find(kind, structure, fn, params, data, Categorical(), max_bytes=30_000, **options)
    assert 0 < largest.nbytes <= 60_000, largest.shape  # 64 unit vectors have 52 kB
    assert_same(bounded, whole)


@pytest.mark.parametrize("product", [curvature.ggn_matvec, curvature.hvp])
def test_products_without_a_size_of_batches_are_of_some_rows_at_a_time(product, monkeypatch):
    fn, params, data, likelihood = tagging()
    vector = randn_like(params)
    whole = product(fn, params, data, likelihood)(vector)
    sizes = []

    def counting(params, x):
        sizes.append(len(x["tokens"]))
        return fn(params, x)

    monkeypatch.setattr(_products, "_BYTES", 1)
    by_rows = product(counting, params, data, likelihood)(vector)
    assert max(sizes[-3:]) == 1  # the first are of finding out about the model
    assert_close(flat(by_rows), flat(whole))


@combinations("hessian")
def test_results_do_not_depend_on_how_many_columns_are_taken_at_a_time(kind, structure, monkeypatch):
    fn, params, data, likelihood = tagging()
    whole = tagged(kind, structure)
    monkeypatch.setattr(_columns, "AT_ONCE", 1)
    assert_same(find(kind, structure, fn, params, data, likelihood), whole)


@combinations("fisher", "kron_corrected")
def test_curvatures_of_two_data_sets_add_up(kind, structure):
    fn, params, data, likelihood = tagging()
    first, second = split(data, 5)
    whole = tagged(kind, structure)
    one, two = (find(kind, structure, fn, params, part, likelihood) for part in (first, second))
    total = one + two
    assert type(total) is type(whole)
    if (kind, structure) == ("hessian", "low_rank"):  # of which each leaves out what is negative
        assert_close(dense(total, None), dense(one, None) + dense(two, None))
    else:
        assert_same(total, whole)
    assert_same(two + one, total)
    if structure == "low_rank":
        assert_close(total.eigenvalues, total.eigenvalues.sort(descending=True).values)
        vectors = joined_vectors(total)
        assert_close(vectors.mT @ vectors, torch.eye(total.rank, dtype=F64))


@combinations("hessian")
def test_a_loader_gives_what_its_tensors_give(kind, structure):
    case = CASES["categorical"]()
    fn, params, x = network(case.event)
    loader = DataLoader(TensorDataset(x, case.y), batch_size=2)
    with torch.random.fork_rng(devices=[]):
        got = find(kind, structure, fn, params, loader, case.likelihood)
    expected = find(
        kind, structure, fn, params, list(zip(x.split(2), case.y.split(2), strict=True)), case.likelihood
    )
    assert_same(got, expected)


def test_a_loader_that_shuffles_gives_the_same_sums():
    case = CASES["categorical"]()
    fn, params, x = network(case.event)
    loader = DataLoader(TensorDataset(x, case.y), batch_size=2, shuffle=True)
    for structure in STRUCTURES:
        assert_same(
            find("ggn", structure, fn, params, loader, case.likelihood),
            find("ggn", structure, fn, params, (x, case.y), case.likelihood),
        )


def test_empty_batches_of_a_loader_add_nothing():
    case = CASES["poisson"]()
    fn, params, x = network(case.event)
    parts = [(x[:0], case.y[:0]), (x[:2], case.y[:2]), (x[2:2], case.y[2:2]), (x[2:], case.y[2:])]
    got = curvature.ggn(fn, params, parts, case.likelihood, "full")
    assert_close(got.matrix, expected_ggn(fn, params, x, case))


# Which leaves.


@combinations("fisher")
@pytest.mark.parametrize(
    ("where", "names"),
    [
        ("head.*", ["head.bias", "head.weight"]),
        (("embedding.*", "shift"), ["embedding.weight", "shift"]),
        (lambda name, leaf: leaf.ndim == 1, ["attention.in_proj_bias", "attention.out_proj.bias", "conv.bias",
                                             "head.bias", "norm.bias", "norm.weight"]),
    ],
)  # fmt: skip
def test_where_chooses_leaves_and_holds_the_others(kind, structure, where, names):
    fn, params, data, likelihood = tagging()
    whole = tagged(kind, structure if structure != "low_rank" else "full")
    c = find(kind, structure, fn, params, data, likelihood, where=where)
    assert list(c.leaves) == names
    if structure == "low_rank":
        rows = torch.cat([torch.arange(len(flat(params)))[index_of(params, name)] for name in names])
        matrix = whole.matrix[rows][:, rows]
        values, vectors = torch.linalg.eigh(matrix)
        positive = vectors * values.clamp_min(0) @ vectors.mT
        assert_close(dense(c, None), positive, rtol=1e-6, atol=1e-7)
    elif structure == "full":
        rows = torch.cat([torch.arange(len(flat(params)))[index_of(params, name)] for name in names])
        assert_close(c.matrix, whole.matrix[rows][:, rows])
    elif structure == "diag":
        assert_close(c.diagonal, {name: whole.diagonal[name] for name in names})
    else:
        for name in names:
            assert_close(block(c, name), block(whole, name))


def test_leaves_in_any_container_may_be_chosen():
    def fn(params, x):
        first, (weight, bias), last = params
        return F.linear(F.linear(F.linear(x, first["w"]).tanh(), weight, bias), last["w"])

    params = [{"w": randn(4, 3)}, (randn(4, 4, seed=1), randn(4, seed=2)), {"w": randn(2, 4, seed=3)}]
    case = CASES["poisson"]()
    x = randn(N, 3, seed=3)
    expected = expected_ggn(fn, params, x, case)
    whole = curvature.ggn(fn, params, (x, case.y), case.likelihood, "full")
    assert_close(whole.matrix, expected)
    diag = curvature.ggn(fn, params, (x, case.y), case.likelihood, "diag", where=["1.1", "2.*"])
    rows = torch.cat([torch.arange(len(flat(params)))[index_of(params, name)] for name in ("1.1", "2.w")])
    assert_close(flat(diag.diagonal), expected.diagonal()[rows])
    assert isinstance(diag.diagonal, list)
    assert isinstance(diag.diagonal[0], type(fb.MISSING))
    assert curvature.ggn_matvec(fn, params, (x, case.y), case.likelihood, where="2.w")(
        [fb.MISSING, fb.MISSING, {"w": torch.ones(2, 4, dtype=F64)}]
    )[2]["w"].shape == (2, 4)


def test_values_that_are_fixed_are_part_of_the_model_and_not_of_its_curvature():
    def fn(params, x):
        scale = params["scale"].tensor if isinstance(params["scale"], fb.Fixed) else params["scale"]
        return F.linear(x * scale, params["w"])

    case, x = CASES["normal"](), randn(N, 3)
    params = {"w": randn(2, 3), "scale": fb.Fixed(randn(3).exp()), "count": torch.tensor(3)}
    c = curvature.ggn(lambda p, x: fn(p, x), params, (x, case.y), case.likelihood)
    assert list(c.leaves) == ["w"]
    scaled = x * params["scale"].tensor
    assert_close(block(c, "w"), torch.kron(torch.eye(2, dtype=F64), scaled.mT @ scaled))


# Several networks at once.


@combinations()
def test_several_networks_have_the_curvatures_of_each_alone(kind, structure):
    fn, params, data, likelihood = tagging()
    networks = [shifted(params, randn_like(params, seed, 0.2)) for seed in range(2)]
    rank = {"rank": 5} if structure == "low_rank" else {}
    options = {"batch_size": 3, **rank}
    together = find(kind, structure, fn, stacked(*networks), data, likelihood, stacked=True, **options)
    for k, network in enumerate(networks):
        alone = find(kind, structure, fn, network, data, likelihood, **options)
        assert type(together) is type(alone)
        assert_same(entry(together, k), alone)


class Twofold(nn.Module):
    """``vmap`` cannot take its recurrence."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRU(3, 2, batch_first=True), nn.Linear(2, 3)

    def forward(self, x):
        return self.head(self.cell(x)[0][:, -1])


class Sign(torch.autograd.Function):
    """A function that knows nothing of transforms."""

    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clone()


@pytest.mark.filterwarnings("ignore:`vmap` cannot take:UserWarning")
@pytest.mark.parametrize("structure", ["diag", "kron", "kron_corrected", "full"])
@pytest.mark.parametrize("make", [Twofold, lambda: nn.Sequential(nn.Linear(3, 4), Signs(), nn.Linear(4, 3))])
def test_several_networks_that_vmap_cannot_take_are_gone_through_one_by_one(structure, make):
    model = from_module(make, None, "")
    x, y = randn(4, 2, 3) if make is Twofold else randn(4, 3), labels(3, 4)
    networks = [shifted(model.params, randn_like(model.params, seed, 0.2)) for seed in range(2)]
    together = find("ggn", structure, model.fn, stacked(*networks), (x, y), Categorical(), stacked=True)
    for k, network in enumerate(networks):
        assert_same(entry(together, k), find("ggn", structure, model.fn, network, (x, y), Categorical()))


class Signs(nn.Module):
    def forward(self, x):
        return Sign.apply(x)


def test_networks_whose_matrices_differ_in_rank_are_padded_with_zeros():
    def fn(params, x):
        return F.linear(x, params["w"]).prod(-1, keepdim=True)

    case = CASES["normal"]()
    w = randn(2, 3)
    stackedw = torch.stack([w, torch.stack([w[0], 0 * w[1]]), 0 * w])
    x = randn(N, 3)
    c = curvature.ggn(fn, {"w": stackedw}, (x, case.y[:, :1]), Normal(1.0), "low_rank", stacked=True, seed=0)
    for k, ranks in enumerate((N, 3, 0)):
        own = entry(c, k)
        expected = curvature.ggn(fn, {"w": stackedw[k]}, (x, case.y[:, :1]), Normal(1.0), "full").matrix
        assert_close(dense(own, None), expected)
        assert (own.eigenvalues > 0).sum() == min(ranks, 6)
    twice = c + c
    assert_close(dense(entry(twice, 0), None), 2 * dense(entry(c, 0), None))
    assert_close(dense(entry(twice, 1), None), 2 * dense(entry(c, 1), None))


def test_stacked_curvatures_add_up():
    fn, params, data, likelihood = tagging()
    networks = stacked(*(shifted(params, randn_like(params, seed, 0.2)) for seed in range(2)))
    first, second = split(data, 5)
    for structure in ("diag", "kron", "full", "low_rank"):
        one, two, whole = (
            find("ggn", structure, fn, networks, part, likelihood, stacked=True)
            for part in (first, second, data)
        )
        for k in range(2):
            assert_same(entry(one + two, k), entry(whole, k))


# The largest eigenvalues.


def of_spectrum(values, seed=0):
    """A function of which the GGN for unit noise has the eigenvalues given, and others 0; its matrix."""
    size = len(values)
    basis = torch.linalg.qr(randn(size, size, seed=seed)).Q
    x = values.sqrt()[:, None] * basis.T  # x^T x has them

    def fn(params, x):
        return F.linear(x, torch.cat([params["a"].reshape(-1), params["b"]]).unsqueeze(0))

    params = {"a": torch.zeros(2, 3, dtype=F64), "b": torch.zeros(size - 6, dtype=F64)}
    return fn, params, (x, torch.zeros(len(x), 1, dtype=F64)), x.T @ x


SIZE = 80
SPECTRA = {
    "quadratic": torch.arange(1, SIZE + 1, dtype=F64) ** -2.0,
    "geometric": 0.7 ** torch.arange(SIZE, dtype=F64),
    "steps": torch.tensor([9.0] * 5 + [4.0] * 7 + [1.0] * 3 + [0.0] * (SIZE - 15), dtype=F64),
    "huge": 1e12 * 0.6 ** torch.arange(SIZE, dtype=F64),
    "tiny": 1e-12 * 0.6 ** torch.arange(SIZE, dtype=F64),
}


def joined_vectors(c):
    return torch.cat(
        [leaf.reshape(leaf.shape[:-1].numel(), c.rank) for leaf in named_leaves(c.eigenvectors).values()]
    )


@pytest.mark.parametrize("values", SPECTRA.values(), ids=SPECTRA.keys())
@pytest.mark.parametrize("rank", [1, 3, 10])
def test_the_largest_eigenvalues_are_those_of_the_matrix(values, rank):
    fn, params, data, matrix = of_spectrum(values)
    c = curvature.ggn(fn, params, data, Normal(1.0), "low_rank", rank=rank, seed=0)
    assert c.rank == rank
    assert_close(c.eigenvalues, values[:rank], rtol=1e-5, atol=0)
    vectors = joined_vectors(c)
    assert_close(vectors.mT @ vectors, torch.eye(rank, dtype=F64))
    error = torch.linalg.norm(matrix @ vectors - vectors * c.eigenvalues, dim=0)
    assert (error < 1e-2 * c.eigenvalues).all()
    assert (c.eigenvalues <= torch.linalg.eigvalsh(matrix).flip(0)[:rank] * (1 + 1e-10)).all()


@pytest.mark.parametrize("rank", [1, 2, 5, 20])
@pytest.mark.parametrize("true_rank", [0, 1, 3, 5])
def test_a_matrix_of_low_rank_is_found_exactly_and_nothing_beside_it(rank, true_rank):
    values = torch.zeros(30, dtype=F64)
    values[:true_rank] = torch.arange(true_rank, 0, -1)
    fn, params, data, matrix = of_spectrum(values)
    c = curvature.ggn(fn, params, data, Normal(1.0), "low_rank", rank=rank, seed=0)
    assert c.rank == min(rank, true_rank)
    assert_close(c.eigenvalues, values[: c.rank])
    if rank >= true_rank:
        assert_close(dense(c, params), matrix)
    assert_close(joined_vectors(c).mT @ joined_vectors(c), torch.eye(c.rank, dtype=F64))
    assert_close(dense(c + c, params), 2 * dense(c, params))


def test_eigenvalues_that_occur_once_for_every_output_are_all_found():
    """For a linear model and one noise the GGN is ``I (x) x^T x``."""
    x = (0.8 ** torch.arange(40, dtype=F64)) * torch.linalg.qr(randn(40, 40)).Q
    c = curvature.ggn(
        lambda p, x: F.linear(x, p["w"]),
        {"w": torch.zeros(10, 40, dtype=F64)},
        (x, torch.zeros(40, 10)),
        Normal(1.0),
        "low_rank",
        seed=0,
    )
    expected = torch.linalg.eigvalsh(x.mT @ x).flip(0)[:2].repeat_interleave(10)
    assert_close(c.eigenvalues, expected, rtol=0.02, atol=0)


def test_an_identity_has_as_many_eigenvectors_as_are_asked_for():
    c = curvature.ggn(
        *(lambda p, x: F.linear(x, p["w"]), {"w": randn(1, 30)}),
        *((torch.eye(30, dtype=F64), torch.zeros(30, 1)), Normal(1.0), "low_rank"),
        rank=12,
        seed=0,
    )
    assert_close(c.eigenvalues, torch.ones(12, dtype=F64))
    assert_close(joined_vectors(c).mT @ joined_vectors(c), torch.eye(12, dtype=F64))


def test_the_eigensolver_is_governed_by_its_seed_and_draws_one_number_without():
    values = SPECTRA["quadratic"]
    fn, params, data, _ = of_spectrum(values)

    def find(networks=params, **options):
        return curvature.ggn(fn, networks, data, Normal(1.0), "low_rank", rank=3, **options)

    assert torch.equal(joined_vectors(find(seed=1)), joined_vectors(find(seed=1)))
    assert not torch.equal(joined_vectors(find(seed=1)), joined_vectors(find(seed=2)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.randint(0, 2**63 - 1, ())
        after = torch.get_rng_state()
        for options in ({}, {"networks": stacked(params, params), "stacked": True}):
            torch.manual_seed(0)
            find(**options)
            assert torch.equal(torch.get_rng_state(), after)


def test_a_low_rank_matrix_is_truncated_to_its_largest_eigenvalues():
    fn, params, data, matrix = of_spectrum(SPECTRA["geometric"])
    c = curvature.ggn(fn, params, data, Normal(1.0), "low_rank", rank=8, seed=0)
    small = c.truncated(3)
    assert small.rank == 3
    assert_close(small.eigenvalues, c.eigenvalues[:3])
    assert_close(joined_vectors(small), joined_vectors(c)[:, :3])
    assert c.truncated(20).rank == 8


def test_a_negative_definite_hessian_has_no_positive_eigenvalues():
    def fn(params, x):
        return params["a"].square().sum().expand(len(x)) * x[:, 0]

    x, y = torch.ones(3, 1, dtype=F64), 10 * torch.ones(3, dtype=F64)
    params = {"a": torch.tensor([0.1, 0.2], dtype=F64)}
    c = curvature.hessian(fn, params, (x, y), Normal(1.0), "low_rank", rank=2, seed=0)
    assert c.rank == 0
    assert c.eigenvectors["a"].shape == (2, 0)


def test_products_are_symmetric_where_tokens_are_padded():
    fn, params, data, likelihood = tagging()
    for make in (curvature.ggn_matvec, curvature.hvp):
        product = make(fn, params, data, likelihood)
        u, v = randn_like(params, 1), randn_like(params, 2)
        assert_close(flat(product(u)) @ flat(v), flat(u) @ flat(product(v)))
        assert (product(u)["embedding.weight"][0] == 0).all()
    moved = {**params, "embedding.weight": params["embedding.weight"].clone()}
    moved["embedding.weight"][0] += 1
    assert_close(fb.linearize(fn, params)(moved, data[0]), fn(params, data[0]))


def test_a_matrix_of_many_panels_is_whole():
    """More parameters than are added to at a time."""
    x, y = randn(3, 40), torch.zeros(3, 30)
    params = {"w": randn(30, 40), "b": randn(30)}
    c = curvature.ggn(lambda p, x: F.linear(x, p["w"], p["b"]), params, (x, y), Normal(1.0), "full")
    assert len(c.matrix) == 1230
    ones = torch.cat([torch.ones(3, 1, dtype=F64), x], 1)
    gram = torch.kron(torch.eye(30, dtype=F64), ones.mT @ ones)  # outputs, then bias before weights
    order = torch.arange(30 * 41).reshape(30, 41)
    order = torch.cat([order[:, 0], order[:, 1:].reshape(-1)])
    assert_close(c.matrix, gram[order][:, order])


# What the data say.


@of(CASES)
@pytest.mark.parametrize("structure", ["diag", "low_rank", "kron_corrected"])
def test_the_log_likelihood_comes_with_a_curvature(make, structure):
    case = make()
    fn, params, x = network(case.event)
    c = find("ggn", structure, fn, params, (x, case.y), case.likelihood, batch_size=2)
    outputs = fn(params, x)
    expected = case.likelihood.log_prob(outputs, case.y).sum()
    assert c.data.at().dtype == F64
    assert_close(c.data.at(), expected)
    assert_close(c.data.num_data, torch.tensor(N, dtype=F64))
    assert_close(c.data.num_terms, case.likelihood.num_terms(outputs, case.y).to(F64))
    chosen_later = (
        isinstance(case.likelihood, Normal) and torch.as_tensor(case.likelihood.noise_std).numel() == 1
    )
    assert c.data.has_noise == chosen_later
    if not chosen_later:
        assert_close(c.data.at(0.3), expected)  # there is none to choose
        assert_close(c.data.factor(0.3), torch.ones((), dtype=F64))


@pytest.mark.parametrize(("kind", "power"), [("ggn", 2), ("fisher", 2), ("empirical", 4), ("hessian", 2)])
def test_another_noise_can_be_put_in_afterwards(kind, power):
    fn, params, x = network((2,))
    y = randn(N, 2, seed=4)
    c = find(kind, "full", fn, params, (x, y), Normal(0.5))
    residuals = ((y - fn(params, x)) ** 2).sum()
    assert_close(c.data.squared_residuals, residuals)
    assert_close(c.data.num_terms, torch.tensor(2.0 * N, dtype=F64))
    assert_close(c.data.noise_std, torch.tensor(0.5, dtype=F64))
    for noise in (0.5, 2.0, torch.tensor(0.1, dtype=F64)):
        other = find(kind, "full", fn, params, (x, y), Normal(noise))
        assert_close(c.data.at(noise), Normal(noise).log_prob(fn(params, x), y).sum())
        assert_close(c.data.at(noise), other.data.at())
        assert_close(c.data.factor(noise), torch.as_tensor(noise, dtype=F64) ** -power)
        assert_close(other.matrix, c.matrix)  # of unit noise, all of them
    assert_close(c.data.at(), c.data.at(0.5))
    if kind == "hessian":  # what it is of the noise that there is

        def loss(v):
            return -Normal(0.5).log_prob(fn(unflat(v, params), x), y).sum()

        exact = torch.autograd.functional.hessian(loss, flat(params))
        assert_close(c.matrix * c.data.factor(), exact)


def test_several_networks_have_a_log_likelihood_each():
    fn, params, data, likelihood = tagging()
    networks = [shifted(params, randn_like(params, seed, 0.2)) for seed in range(2)]
    c = curvature.ggn(fn, stacked(*networks), data, likelihood, "diag", stacked=True)
    expected = [likelihood.log_prob(fn(network, data[0]), data[1]).sum() for network in networks]
    assert_close(c.data.at(), torch.stack(expected))


# Types, modes and threads.


def lower(tree, dtype):
    return optree.tree_map(lambda t: t.to(dtype) if t.is_floating_point() else t, tree)


@combinations("fisher")  # whose draws are others in each precision
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_in_single_precision_at_least_and_near_those_in_double(kind, structure, dtype):
    fn, params, data, likelihood = tagging()
    rounded, x = lower(params, dtype), lower(data[0], dtype)
    c = find(kind, structure, fn, rounded, (x, data[1]), likelihood)
    assert all(leaf.dtype == torch.float32 for leaf in c.leaves.values()) or (
        isinstance(c, Full) and all(leaf.dtype == dtype for leaf in c.leaves.values())
    )
    assert c.data.at().dtype == F64
    exact = find(kind, structure, fn, lower(rounded, F64), (lower(x, F64), data[1]), likelihood)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    if dtype == torch.bfloat16 and kind == "hessian":
        tolerance = 0.5  # a difference of large terms
    got, expected = (dense(k, None).double() for k in (c, exact))
    assert torch.linalg.norm(got - expected) <= tolerance * torch.linalg.norm(expected)
    assert abs(c.data.at() - exact.data.at()) <= tolerance * abs(exact.data.at())


def test_residuals_are_not_rounded_to_the_precision_of_the_outputs():
    def fn(params, x):
        return x * params["w"]

    x = torch.ones(1000, 1, dtype=torch.bfloat16)
    y = torch.full((1000, 1), 100.125)  # no number of bfloat16
    c = curvature.ggn(fn, {"w": torch.ones(1, dtype=torch.bfloat16)}, (x, y), Normal(1.0), "diag")
    assert_close(c.data.squared_residuals, torch.tensor(1000 * 99.125**2, dtype=F64))


@combinations()
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_results_do_not_depend_on_the_mode_of_the_caller(kind, structure, mode):
    fn, params, data, likelihood = tagging()
    expected = tagged(kind, structure)
    with mode():
        own = optree.tree_map(torch.clone, (params, data))
        got = find(kind, structure, fn, own[0], own[1], likelihood)
        assert torch.is_grad_enabled() is False
    assert not any(leaf.requires_grad for leaf in as_leaves(got))
    assert_same(got, expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("make", [curvature.ggn_matvec, curvature.hvp])
@pytest.mark.parametrize("where", [None, "embedding.*"])
def test_products_do_not_depend_on_the_mode_of_the_caller(make, mode, where):
    fn, params, data, likelihood = tagging()
    vector = randn_like(params if where is None else zoo.covering(params, lambda p: p.startswith("emb")), 1)
    expected = make(fn, params, data, likelihood, where)(vector)
    with mode():
        params, vector = (optree.tree_map(torch.clone, tree) for tree in (params, vector))
        assert_close(make(fn, params, data, likelihood, where)(vector), expected)
    assert_close(make(fn, params, data, likelihood, where)(vector), expected)


@combinations()
def test_parameters_and_inputs_that_ask_for_gradients_change_nothing(kind, structure):
    fn, params, data, likelihood = tagging()
    expected = tagged(kind, structure)
    asking = optree.tree_map(lambda t: t.clone().requires_grad_(t.is_floating_point()), (params, data))
    got = find(kind, structure, fn, *asking, likelihood)
    assert not any(leaf.requires_grad for leaf in as_leaves(got))
    assert all(leaf.grad is None for leaf in as_leaves(asking))
    assert_same(got, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_four_threads_on_one_function_find_what_one_finds(kind):
    fn, params, data, likelihood = tagging()
    structures = [s for k, s in COMBINATIONS if k == kind]
    networks = [shifted(params, randn_like(params, seed, 0.2)) for seed in range(4)]
    options = {"where": ["conv.*", "head.*"]} if kind == "hessian" else {}

    def work(network, fn):
        few = {"low_rank": {"rank": 4}}
        return [find(kind, s, fn, network, data, likelihood, **few.get(s, {}), **options) for s in structures]

    expected = [work(network, fn) for network in networks]
    fresh = from_module(Tagger, None, "").fn
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(functools.partial(work, fn=fresh), networks)
        for got, right in zip(found, expected, strict=True):
            for a, b in zip(got, right, strict=True):
                assert_same(a, b)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fisher_by_monte_carlo_is_in_single_precision_at_least(structure, dtype):
    fn, params, data, likelihood = tagging()
    given = lower(params, dtype), (lower(data[0], dtype), data[1])
    c = find("fisher", structure, fn, *given, likelihood, mc_samples=50)
    exact = find("ggn", structure, fn, params, data, likelihood)
    trace = torch.trace(dense(exact, None))
    assert abs(torch.trace(dense(c, None)) - trace) < 0.3 * trace
    assert as_leaves(numbers(c))[0].dtype in (torch.float32, dtype)


# Models of other kinds.


class Words(nn.Module):
    """A recurrence, for which ``vmap`` has no rule, between layers."""

    def __init__(self):
        super().__init__()
        self.embedding, self.cell = nn.Embedding(5, 2), nn.LSTM(2, 3, batch_first=True)
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.cell(self.embedding(x))[0][:, -1])


def backward_jacobian(model, x):
    """``(N, outputs, P)``, by backward passes alone."""
    vector = flat(model.params)

    def outputs(v, n):
        with sdpa_kernel(SDPBackend.MATH):
            return model.fn(unflat(v, model.params), row(x, n)).reshape(-1)

    return torch.stack(
        [torch.autograd.functional.jacobian(lambda v, n=n: outputs(v, n), vector) for n in range(len(x))]
    )


ANY_MODEL = {
    "residual": zoo.MODELS["residual"],
    "tied": zoo.MODELS["tied"],
    "transformer": zoo.MODELS["transformer"],
    "recurrent": lambda: from_module(Words, zoo.tokens(3, 5), ""),
}


@pytest.mark.filterwarnings("ignore:`vmap` cannot take:UserWarning")
@pytest.mark.parametrize("structure", ["diag", "full", "kron_corrected", "low_rank"])
@pytest.mark.parametrize("name", ANY_MODEL)
def test_models_of_any_kind_have_the_curvature_of_their_jacobians(structure, name):
    model = ANY_MODEL[name]()
    x = model.inputs(3)
    outputs = model.fn(model.params, x)
    y = torch.randint(outputs.shape[-1], outputs.shape[:-1], generator=seeded(1))
    c = find("ggn", structure, model.fn, model.params, (x, y), Categorical())
    j = backward_jacobian(model, x)
    middle = fishers(Case(Categorical(), (), y, cross_entropy_of_classes(-1)), outputs)
    exact = torch.einsum("nap,nab,nbq->pq", j, middle, j)
    if structure == "full":
        assert_close(c.matrix, exact)
    elif structure == "diag":
        assert_close(flat(c.diagonal), exact.diagonal())
    elif structure == "low_rank":  # of as many rows as there are, so that it is all of it
        assert_close(dense(c, None), exact, rtol=1e-6, atol=1e-9)
    else:
        for leaf in named_leaves(model.params):
            part = index_of(model.params, leaf)
            assert_close(named_leaves(c.eigenvalues)[leaf].sum(), exact[part, part].trace())


@pytest.mark.parametrize("structure", ["diag", "full", "low_rank"])
@pytest.mark.parametrize("activation", [nn.SiLU, nn.Mish, nn.GELU, nn.Softplus, nn.ELU])
def test_hessians_of_activations_are_those_of_autograd_whether_or_not_they_have_a_forward_mode(
    structure, activation
):
    model = from_module(lambda: nn.Sequential(nn.Linear(2, 3), activation(), nn.Linear(3, 2)), None, "")
    x, y = randn(N, 2), randn(N, 2, seed=4)
    case = Case(Normal(1.0), (2,), y, cross_entropy_of_normals(1.0))
    expected = torch.autograd.functional.hessian(
        unit_loss(case, model.fn, model.params, x), flat(model.params)
    )
    c = find("hessian", structure, model.fn, model.params, (x, y), Normal(1.0))
    if structure == "full":
        assert_close(c.matrix, expected)
    elif structure == "diag":
        assert_close(flat(c.diagonal), expected.diagonal())
    else:
        values = torch.linalg.eigvalsh(expected).flip(0)
        assert_close(c.eigenvalues, values[: c.rank])
        assert (values[c.rank :] < 1e-9).all()


# Without draws, which are others for each batch, and the low-rank Hessian, which leaves out what is negative.
ADDED = [
    (kind, structure)
    for kind in KINDS
    for structure in ("diag", "full", "low_rank")
    if kind != "fisher" and (kind, structure) != ("hessian", "low_rank")
]


@pytest.mark.parametrize(("kind", "structure"), ADDED)
def test_a_layer_that_some_batches_skip_is_part_of_the_sums_of_the_others(kind, structure):
    """Where a batch takes another way than the first, nothing that was learned of that holds."""

    def fn(params, x):
        h = F.linear(x["x"], params["w"]).tanh()
        return F.linear(F.linear(h, params["skip"]).tanh() if x["deep"] > 0 else h, params["v"])

    params = {"w": randn(3, 2), "skip": randn(3, 3, seed=1), "v": randn(2, 3, seed=2)}
    y = randn(3, 2, seed=5)
    batches = [
        ({"x": randn(3, 2, seed=k), "deep": torch.tensor(float(deep))}, y)
        for k, deep in enumerate((1, -1, 1))
    ]
    whole = find(kind, structure, fn, params, batches, Normal(1.0))
    parts = [find(kind, structure, lambda p, x: fn(p, x), params, [b], Normal(1.0)) for b in batches]
    assert_close(dense(whole, params), sum(dense(part, params) for part in parts))


@pytest.mark.parametrize("correction", [False, True])
def test_batches_that_skip_a_layer_leave_its_kronecker_product_as_it_is(correction):
    def fn(params, x):
        h = F.embedding(x["tokens"], params["table"]) if x["deep"] > 0 else x["x"]
        h = F.linear(h, params["w"], params["b"]) if x["deep"] > 0 else h
        return F.linear(h.tanh(), params["v"])

    params = leaves({"table": (4, 3), "w": (3, 3), "b": (3,), "v": (2, 3)})
    y = torch.zeros(3, 2, dtype=F64)
    batches = [
        ({"tokens": tokens_of(3), "x": randn(3, 3, seed=k), "deep": torch.tensor(deep)}, y)
        for k, deep in enumerate((1.0, -1.0, -1.0))
    ]

    def ggn(batches):
        return curvature.ggn(
            lambda p, x: fn(p, x), params, batches, Normal(1.0), eigenvalue_correction=correction
        )

    whole, used = ggn(batches), ggn(batches[:1])
    for name in ("table", "w", "b"):
        assert_close(block(whole, name), block(used, name))
    if not correction:  # what every batch has is as it is of all
        parts = [ggn([batch]) for batch in batches]
        assert_close(whole.grad_cov["v"], sum(part.grad_cov["v"] for part in parts))
        assert_close(whole.input_cov["v"], sum(part.input_cov["v"] for part in parts) / 3)


# What is refused.


def linear_model():
    def fn(params, x):
        return F.linear(x, params["w"], params["b"])

    return fn, leaves({"w": (3, 2), "b": (3,)}), (randn(N, 2, seed=4), labels(3, N))


class Refused(NamedTuple):
    """A call ``(curvature function, fn, params, data)``, the error, and what it says."""

    call: Callable[..., Any]
    error: type[Exception]
    match: str


CLASSES = Categorical()
REFUSED: dict[str, Refused] = {
    "a_module": Refused(
        lambda f, fn, p, d: f(nn.Linear(2, 3), p, d, CLASSES),
        TypeError,
        r"function of \(params, x\), got an nn.Module, Linear\. Wrap it with `fn, params = make_functional",
    ),
    "no_function": Refused(lambda f, fn, p, d: f(3, p, d, CLASSES), TypeError, r"\(params, x\), got int"),
    "no_likelihood": Refused(
        lambda f, fn, p, d: f(fn, p, d, F.cross_entropy), TypeError, r"likelihood=\.\.\.\)` should be one of"
    ),
    "a_class_of_likelihoods": Refused(
        lambda f, fn, p, d: f(fn, p, d, Categorical), TypeError, r"likelihood=\.\.\.\)` should be one of"
    ),
    "where_nothing_is": Refused(
        lambda f, fn, p, d: f(fn, p, d, CLASSES, where="head.*"),
        ValueError,
        r"where='head\.\*'\)` should choose at least one parameter, got none of 'b', 'w'",
    ),
    "integers": Refused(
        lambda f, fn, p, d: f(fn, {**p, "count": torch.tensor(3)}, d, CLASSES, where="count"),
        TypeError,
        r"should choose parameters of floating point; 'count' is torch.int64",
    ),
    "one_shot_iterator": Refused(
        lambda f, fn, p, d: f(fn, p, iter([d]), CLASSES), TypeError, r"should be a re-iterable, got list_iter"
    ),
    "generator": Refused(
        lambda f, fn, p, d: f(fn, p, (b for b in [d]), CLASSES), TypeError, r"Write `list\(data\)`"
    ),
    "no_batches": Refused(lambda f, fn, p, d: f(fn, p, [], CLASSES), ValueError, r"at least one batch"),
    "empty_batches": Refused(
        lambda f, fn, p, d: f(fn, p, [(d[0][:0], d[1][:0])], CLASSES), ValueError, r"at least one"
    ),
    "no_rows": Refused(
        lambda f, fn, p, d: f(fn, p, (d[0][:0], d[1][:0]), CLASSES), ValueError, r"at least one row, got none"
    ),
    "rows_that_differ_in_number": Refused(
        lambda f, fn, p, d: f(fn, p, (d[0], d[1][:3]), CLASSES), ValueError, r"as many rows of x as of y"
    ),
    "labels_out_of_range": Refused(
        lambda f, fn, p, d: f(fn, p, (d[0], d[1] + 1), CLASSES), ValueError, r"should be from 0 to 2, .* to 3"
    ),
    "targets_of_another_shape": Refused(
        lambda f, fn, p, d: f(fn, p, (d[0], randn(N, 2)), Normal(1.0)),
        ValueError,
        r"should have shape \(5, 3\)",
    ),
    "inputs_that_are_not_finite": Refused(
        lambda f, fn, p, d: f(fn, p, (d[0] / 0, d[1]), CLASSES),
        RuntimeError,
        r"batch 0 .* nan, with outputs that are not all finite\. Look for",
    ),
    "inputs_that_are_not_finite_in_some_batch": Refused(
        lambda f, fn, p, d: f(fn, p, [d, d, (d[0] * float("nan"), d[1])], CLASSES),
        RuntimeError,
        r"batch 2 in",
    ),
    "parameters_that_are_not_finite": Refused(
        lambda f, fn, p, d: f(fn, {**p, "w": p["w"] / 0}, d, CLASSES), RuntimeError, r"batch 0 in"
    ),
    "targets_that_are_not_finite": Refused(
        lambda f, fn, p, d: f(fn, p, (d[0], randn(N, 3) / 0), Normal(1.0)), ValueError, r"finite"
    ),
    "rows_that_mix": Refused(
        lambda f, fn, p, d: f(lambda p, x: fn(p, x - x.mean(0)), p, d, CLASSES),
        ValueError,
        r"needs a model whose outputs for a row, the first axis, depend on that row alone",
    ),
    "batch_norm_in_training": Refused(
        lambda f, fn, p, d: f(lambda p, x: F.batch_norm(fn(p, x), None, None, training=True), p, d, CLASSES),
        ValueError,
        r"BatchNorm normalises by the batch",
    ),
    "batch_size_for_batches": Refused(
        lambda f, fn, p, d: f(fn, p, [d], CLASSES, batch_size=2), ValueError, r"batch_size=.* left out"
    ),
    "batch_size_0": Refused(
        lambda f, fn, p, d: f(fn, p, d, CLASSES, batch_size=0),
        ValueError,
        r"batch_size=\.\.\.\)` .* at least 1",
    ),
}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{f"{kind}-{structure}": functools.partial(find, kind, structure) for kind, structure in COMBINATIONS},
    "ggn_matvec": lambda fn, params, *args, **kwargs: curvature.ggn_matvec(fn, params, *args, **kwargs)(
        {k: v for k, v in params.items() if v.is_floating_point()}
    ),
    "hvp": lambda fn, params, *args, **kwargs: curvature.hvp(fn, params, *args, **kwargs)(
        {k: v for k, v in params.items() if v.is_floating_point()}
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
@pytest.mark.parametrize(
    "name", ["ggn-diag", "ggn-low_rank", "fisher-kron", "hessian-full", "ggn_matvec", "hvp"]
)
def test_bad_input_is_refused_with_a_word_on_what_to_write(case, name):
    with pytest.raises(case.error, match=case.match):
        case.call(FUNCTIONS[name], *linear_model())


OPTIONS: dict[str, Refused] = {
    "structure": Refused(
        lambda *args: curvature.ggn(*args, CLASSES, "block"),
        ValueError,
        r"`curvature\.ggn\(structure=\.\.\.\)` .* one of 'diag', 'kron', 'low_rank', 'full', got 'block'",
    ),
    "structure_of_a_hessian": Refused(
        lambda *args: curvature.hessian(*args, CLASSES, "kron"),
        ValueError,
        r"should be 'full', 'diag' or 'low_rank', got 'kron'.*`curvature\.ggn\(\.\.\., structure='kron'\)`",
    ),
    "weight_sharing": Refused(
        lambda *args: curvature.fisher(*args, CLASSES, weight_sharing="mean", seed=0),
        ValueError,
        r"`curvature\.fisher\(weight_sharing=\.\.\.\)` should be 'expand' or 'reduce', got 'mean'",
    ),
    "eigenvalue_correction": Refused(
        lambda *args: curvature.empirical_fisher(*args, CLASSES, "diag", eigenvalue_correction=True),
        ValueError,
        r"empirical_fisher\(eigenvalue_correction=True\)` goes with `structure='kron'`, got 'diag'",
    ),
    "rank": Refused(
        lambda *args: curvature.ggn(*args, CLASSES, "low_rank", rank=0),
        ValueError,
        r"rank=.* at least 1, got 0",
    ),
    "rank_of_a_hessian": Refused(
        lambda *args: curvature.hessian(*args, CLASSES, "low_rank", rank=0), ValueError, r"rank=.* at least 1"
    ),
    "rank_of_no_int": Refused(
        lambda *args: curvature.ggn(*args, CLASSES, "low_rank", rank=2.5),
        TypeError,
        r"should be an int, got f",
    ),
    "mc_samples": Refused(
        lambda *args: curvature.fisher(*args, CLASSES, mc_samples=0),
        ValueError,
        r"`curvature\.fisher\(mc_samples=\.\.\.\)` should be at least 1, got 0",
    ),
    "max_bytes": Refused(
        lambda *args: curvature.ggn(*args, CLASSES, max_bytes=0),
        ValueError,
        r"max_bytes=.* at least 1, got 0",
    ),
    "seed": Refused(
        lambda *args: curvature.fisher(*args, CLASSES, seed=0.5), TypeError, r"`seed` should be an int"
    ),
    "stacked": Refused(
        lambda fn, p, d: curvature.ggn(fn, {**p, "b": p["b"][:2]}, d, CLASSES, stacked=True),
        ValueError,
        r"stacked=True\)` should be given leaves with one leading axis over the members",
    ),
}


@pytest.mark.parametrize("case", OPTIONS.values(), ids=OPTIONS.keys())
def test_options_that_mean_nothing_are_refused(case):
    with pytest.raises(case.error, match=case.match):
        case.call(*linear_model())


def test_work_is_not_begun_where_an_option_is_refused():
    def fn(params, x):
        raise AssertionError("called")

    _, params, data = linear_model()
    for case in OPTIONS.values():
        with pytest.raises(case.error, match=case.match):
            case.call(fn, params, data)


@pytest.mark.parametrize("structure", ["diag", "full"])
def test_of_leaves_without_numbers_the_curvature_is_empty(structure):
    params = {"w": randn(2, 3), "none": torch.zeros(0, dtype=F64)}
    data = randn(4, 3), torch.arange(4) % 2
    c = curvature.ggn(lambda p, x: F.linear(x, p["w"]), params, data, CLASSES, structure, "none")
    assert not sum(leaf.numel() for leaf in c.leaves.values())


@pytest.mark.filterwarnings("error:The Hessian in")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64])
def test_a_convex_loss_has_no_indefinite_hessian_in_any_precision(dtype):
    x, w = (10 * randn(200, 8)).to(dtype), randn(3, 8).to(dtype)
    data = x, torch.arange(200) % 3
    curvature.hessian(lambda p, x: F.linear(x, p["w"]), {"w": w}, data, CLASSES, "low_rank", rank=10, seed=0)


@combinations("fisher")
def test_a_curvature_that_is_not_finite_is_refused_though_its_loss_is(kind, structure):
    def fn(params, x):
        return F.linear(x, params["w"]).abs().sqrt()  # of slope infinity at 0

    batches = [(randn(N, 2, seed=k), torch.zeros(N, 2, dtype=F64)) for k in range(3)]
    batches[1] = (torch.zeros(N, 2, dtype=F64), torch.ones(N, 2, dtype=F64))
    with pytest.raises(
        RuntimeError, match=r"not finite in batch 1, though its loss is\. float64, or smaller"
    ):
        find(kind, structure, fn, {"w": randn(2, 2)}, batches, Normal(1.0))


class Sum(NamedTuple):
    one: Callable[..., Any]
    other: Callable[..., Any]
    error: type[Exception]
    match: str


def ggn_of(structure="diag", likelihood=CLASSES, y=None, **options):
    def make(fn, params, data):
        targets = data[1] if y is None else y
        return curvature.ggn(fn, params, (data[0], targets), likelihood, structure, seed=0, **options)

    return make


NUMBERS = randn(N, 3, seed=8)
SUMS: dict[str, Sum] = {
    "structures": Sum(ggn_of(), ggn_of("full"), TypeError, r"one structure, got Diag and Full"),
    "structures_of_low_rank": Sum(ggn_of("low_rank"), ggn_of(), TypeError, r"got LowRank and Diag"),
    "something_else": Sum(ggn_of(), lambda *args: 1.0, TypeError, r"got Diag and float"),
    "leaves": Sum(ggn_of(), ggn_of(where="w"), ValueError, r"cover the same leaves; 'b' is missing"),
    "leaves_of_low_rank": Sum(
        ggn_of("low_rank", where="w"), ggn_of("low_rank"), ValueError, r"same leaves; 'b' is not expected"
    ),
    "leaves_of_kron": Sum(ggn_of("kron", where="w"), ggn_of("kron"), ValueError, r"'b' is not expected"),
    "eigenbases": Sum(
        ggn_of("kron", eigenvalue_correction=True),
        ggn_of("kron"),
        TypeError,
        r"do not add up\. Add those with",
    ),
    "noise": Sum(
        ggn_of(likelihood=Normal(1.0), y=NUMBERS),
        ggn_of(likelihood=Normal(0.5), y=NUMBERS),
        ValueError,
        r"one `noise_std`, got 1\.0 and 0\.5",
    ),
    "likelihoods": Sum(
        ggn_of(), ggn_of(likelihood=Normal(1.0), y=NUMBERS), ValueError, r"one kind and one likelihood"
    ),
    "kinds": Sum(
        ggn_of(),
        lambda fn, p, d: curvature.empirical_fisher(fn, p, d, CLASSES),
        ValueError,
        r"one kind and one likelihood",
    ),
}


@pytest.mark.parametrize("case", SUMS.values(), ids=SUMS.keys())
def test_curvatures_that_do_not_go_together_are_not_added(case):
    model = linear_model()
    with pytest.raises(case.error, match=case.match):
        case.one(*model) + case.other(*model)


@pytest.mark.parametrize("make", [curvature.ggn_matvec, curvature.hvp])
@pytest.mark.parametrize(
    ("vector", "match"),
    [
        ({"w": torch.ones(3, 2)}, "like the parameters; 'b' is missing"),
        ({"w": torch.ones(3, 2), "b": torch.ones(3), "c": torch.ones(3)}, "'c' is not expected"),
        ({"w": torch.ones(2, 3), "b": torch.ones(3)}, r"'w' has shape \(2, 3\), not \(3, 2\)"),
    ],
)
def test_products_with_trees_of_another_kind_are_refused(make, vector, match):
    product = make(*linear_model(), CLASSES)
    with pytest.raises(ValueError, match=match):
        product(vector)


def test_slow_leaves_are_named_with_their_cost():
    def fn(params, x):
        return F.linear(x @ params["slow"].T, params["fast"])

    params, x = {"slow": randn(200, 200), "fast": randn(2, 200)}, randn(2, 200)
    with pytest.warns(
        UserWarning, match=r"`curvature\.ggn` finds the gradients of 'slow' in .* row by row, 80,000"
    ):
        curvature.ggn(fn, params, (x, torch.zeros(2, 2)), Normal(1.0), "diag")


def test_what_is_left_out_is_not_warned_of(recwarn):
    def fn(params, x):
        return F.linear(x @ params["slow"].T, params["fast"])

    params, x = {"slow": randn(200, 200), "fast": randn(2, 200)}, randn(2, 200)
    curvature.ggn(fn, params, (x, torch.zeros(2, 2)), Normal(1.0), "diag", where="fast")
    curvature.ggn(fn, params, (x, torch.zeros(2, 2)), Normal(1.0), "low_rank", rank=1, seed=0)
    assert not recwarn


def test_progress_is_shown_where_it_is_asked_for(capsys):
    fn, params, (x, y) = linear_model()
    x, y = x[:4], y[:4]
    curvature.ggn(fn, params, (x, y), CLASSES, batch_size=2, progress=True)
    assert "curvature.ggn: 100%" in capsys.readouterr().err
    curvature.ggn(fn, params, (x, y), CLASSES, batch_size=2)
    assert capsys.readouterr().err == ""


@combinations("kron_corrected")
def test_the_sum_of_a_list_is_that_of_its_curvatures(kind, structure):
    fn, params, data, likelihood = tagging()
    parts = [find(kind, structure, fn, params, part, likelihood) for part in split(data, 4)]
    assert_close(as_leaves(numbers(sum(parts))), as_leaves(numbers(parts[0] + parts[1])))


def test_targets_that_are_refused_are_named_by_their_batch():
    fn, params, (x, y) = linear_model()
    for wrong in (y + 7, torch.where(y == 0, 99, y)):
        with pytest.raises(ValueError, match=r"curvature\.ggn\(data=...\), batch 1` should"):
            curvature.ggn(fn, params, [(x, y), (x, wrong)], CLASSES, "diag")


@pytest.mark.parametrize("structure", ["diag", "low_rank"])
def test_inputs_in_another_dtype_than_the_parameters_are_explained(structure):
    fn, params, (x, y) = linear_model()
    message = r"`curvature\.ggn` .* parameters, torch.float64, got torch.float32.*x\.to\(torch.float64\)"
    with pytest.raises(TypeError, match=message):
        curvature.ggn(fn, params, (x.float(), y), CLASSES, structure, seed=0)
    q = fb.Gaussian(params, fb.covariances.Diagonal({n: leaf.abs() for n, leaf in params.items()}))
    with pytest.raises(TypeError, match="`predict_linearized` .* torch.float64, got torch.float32"):
        fb.predict_linearized(fn, None, q, x.float())
    with pytest.raises(TypeError, match="`ggn_matvec` .* torch.float64, got torch.float32"):
        curvature.ggn_matvec(fn, params, (x.float(), y), CLASSES)(params)


def test_the_member_that_is_not_finite_is_named():
    fn, params, data = linear_model()
    broken = {name: leaf * math.nan for name, leaf in params.items()}
    for structure in ("diag", "full"):
        with pytest.raises(RuntimeError, match="likelihood of member 1 of batch 0 .* is nan, with outputs"):
            curvature.ggn(fn, stacked(params, broken, params), data, CLASSES, structure, stacked=True)


class CountingPasses(list):
    passes = 0

    def __iter__(self):
        self.passes += 1
        return super().__iter__()


def test_an_error_of_several_networks_that_is_not_of_vmap_comes_at_once():
    x = torch.ones(6, 3, dtype=F64)
    data = CountingPasses((x * scale, torch.zeros(6, 2, dtype=F64)) for scale in (1.0, math.nan))
    fn, passes = (lambda params, x: F.linear(x, params["w"])), []
    for w, several in ((randn(2, 3), False), (randn(4, 2, 3), True)):
        data.passes = 0
        with pytest.raises(RuntimeError, match="batch 1"):
            curvature.ggn(fn, {"w": w}, data, Normal(1.0), "diag", stacked=several)
        passes.append(data.passes)
    assert passes[0] == passes[1]  # and no second pass of the members one by one


class OwnOrder:
    """Batches in an order that no state of torch's decides."""

    def __init__(self, x, y, num_rows=None):
        self.x, self.y, self.num_rows, self.passes = x, y, num_rows, 0

    def __iter__(self):
        self.passes += 1
        order = torch.randperm(len(self.y), generator=torch.Generator().manual_seed(self.passes))
        for rows in order[: self.num_rows].split(4):
            yield self.x[rows], self.y[rows]


SEVERAL_PASSES = [
    ("ggn", {"structure": "low_rank", "rank": 8}),
    ("ggn", {"structure": "kron", "eigenvalue_correction": True}),
    ("empirical_fisher", {"structure": "low_rank", "rank": 8}),
    ("hessian", {"structure": "full"}),
    ("hessian", {"structure": "low_rank", "rank": 8}),
]


def several_rows():
    fn, params, _ = linear_model()
    return fn, params, randn(14, 2, seed=4), labels(3, 14)


@pytest.mark.parametrize(("kind", "options"), SEVERAL_PASSES)
def test_sums_over_several_passes_may_have_their_rows_in_any_order(kind, options):
    fn, params, x, y = several_rows()
    found, expected = (
        getattr(curvature, kind)(fn, params, data, CLASSES, seed=0, **options)
        for data in (OwnOrder(x, y), (x, y))
    )
    assert_close(dense(found, params), dense(expected, params))


@pytest.mark.parametrize(
    ("kind", "options", "num_rows"),
    [(*case, 12) for case in SEVERAL_PASSES] + [("fisher", {"structure": "low_rank", "rank": 8}, None)],
)
def test_passes_over_other_rows_are_refused(kind, options, num_rows, monkeypatch):
    monkeypatch.setattr(_curvature, "_UNIT_VECTORS", 4)  # so that a full Hessian takes several passes, too
    fn, params, x, y = several_rows()
    message = rf"curvature\.{kind}\(data=...\)` goes through the data several times .*shuffle=False"
    with pytest.raises(ValueError, match=message):
        getattr(curvature, kind)(fn, params, OwnOrder(x, y, num_rows), CLASSES, seed=0, **options)
