"""The Laplace approximation over functions: linear algebra among the data, not among the parameters."""

import functools
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from .._checks import positive_int
from .._jacobian import RowGradients, blocks
from .._jacobian._gradients import Formed
from .._jacobian._gram import gram
from .._linearized_prediction import LinearizedPrediction, Link, check_link, seed_of
from .._output_covariance import Form, Jacobian, Terms, by_outputs, contracted, independent_terms
from .._predict_linearized import Pushforward, wants_covariance
from .._random import Seed, fold, permutation, resolve_seed
from .._tree import Params, Where, as_tree, num_rows, taken
from ..covariances._flat import as_double, at_least_single
from ..curvature._columns import ggn_columns
from ..curvature._data_term import DataTerm, data_term, noise_of
from ..curvature._pass import Problem, refuse_infinite
from ..likelihoods import Likelihood
from ..likelihoods._checks import check_is_likelihood
from ..training._data import Data, are_tensors
from ._posterior import check_numbers
from ._prior import Numbers, Prior

_CALL = "laplace.functional"


@dataclass(frozen=True)
class FunctionalLaplace:
    """A Gaussian process that a network and its data make; of :func:`functional`.

    Attributes:
        fn: Pure model.
        params: The mode.
        num_data: Rows of data it holds, ``N``.
        log_marginal_likelihood: The evidence, a scalar.
    """

    fn: Any
    params: Params
    num_data: int
    log_marginal_likelihood: Tensor
    _names: tuple[str, ...]
    _gradients: dict[str, list[RowGradients]]  # by leaf, in several parts
    _variance: dict[str, Tensor]  # of the prior, by leaf, in double precision as all that follows
    _root: Tensor  # lower Cholesky factor of I + f R D^-1 R^T
    _factor: Tensor

    def predict(
        self,
        x: Any,
        *,
        likelihood: Likelihood | None = None,
        link: Link = "probit",
        joint: bool = False,
        num_samples: int = 1000,
        seed: Seed | None = None,
        max_bytes: int | None = None,
    ) -> LinearizedPrediction:
        """Predict: as :func:`funcbayes.predict_linearized` with the posterior over parameters, to rounding.

        Args:
            x: Inputs.
            likelihood: As for :func:`funcbayes.predict_linearized`.
            link: As for :func:`funcbayes.predict_linearized`.
            joint: As for :func:`funcbayes.predict_linearized`.
            num_samples: As for :func:`funcbayes.predict_linearized`.
            seed: As for :func:`funcbayes.predict_linearized`.
            max_bytes: As for :func:`funcbayes.predict_linearized`.

        Returns:
            The prediction.
        """
        if likelihood is not None:
            check_is_likelihood(likelihood, "predict(likelihood=...)")
        check_link(link, likelihood, "predict")
        num_samples = positive_int(num_samples, "predict(num_samples=...)")
        if max_bytes is not None:
            max_bytes = positive_int(max_bytes, "predict(max_bytes=...)")
        component = Pushforward(
            *(self.fn, self.params, self._names, as_tree(x), self._terms),
            call="FunctionalLaplace.predict",
            joint=joint,
            wants_covariance=wants_covariance(likelihood, link),
            max_bytes=max_bytes,
        ).component()
        if likelihood is not None:
            likelihood.check(component.mean, None, call="predict(likelihood=...)")
        return LinearizedPrediction(
            components=(component,),
            weights=torch.ones(1, dtype=torch.float64),
            likelihood=likelihood,
            link=link,
            num_samples=num_samples,
            seed=seed_of(likelihood, link, seed),
        )

    def _terms(self, jacobian: Jacobian, form: Form) -> Terms:
        return by_outputs(lambda some: self._terms_of_outputs(some, form), jacobian, form)

    def _terms_of_outputs(self, jacobian: Jacobian, form: Form) -> Terms:
        # J (D + f R^T R)^-1 J^T = J D^-1 J^T - f K^T (I + f R D^-1 R^T)^-1 K with K = R D^-1 J^T.
        # Both in double precision and of the same gradients, since where data are many it is nearly nothing.
        count, dtype = len(jacobian.block.outputs[0]), self._root.dtype
        yield from independent_terms(self._variance, jacobian, form, dtype=dtype)
        own = {name: [gradient] for name, gradient in jacobian.gradients.items()}
        if not own:
            return
        cross = _kernel(self._gradients, own, self._variance)
        white = torch.linalg.solve_triangular(self._root, cross * self._factor.sqrt(), upper=False)
        white = white.mT.unflatten(0, (count, -1))  # (n, F, N K)
        yield -contracted(white, white, form)


def functional(
    fn: Any,
    params: Params,
    data: Data,
    likelihood: Likelihood,
    *,
    prior_precision: Numbers = 1.0,
    prior_mean: Numbers = 0.0,
    where: Where | None = None,
    noise_std: float | Tensor | None = None,
    temperature: float | Tensor = 1.0,
    num_points: int | None = None,
    seed: Seed | None = None,
    batch_size: int | None = None,
    max_bytes: int | None = None,
    progress: bool = False,
) -> FunctionalLaplace:
    """Fit the Laplace approximation with the whole GGN as a Gaussian process over functions.

    The posterior of the linearised model is a Gaussian process with the kernel ``J(x) P0^-1 J(x')^T`` (Khan
    et al. 2019, "Approximate inference turns deep networks into Gaussian processes"; Immer et al. 2021,
    "Improving predictions of Bayesian neural nets via local linearization", section 3.2). It is exactly that
    of ``structure="full"``, with a matrix of ``N C`` rows in place of ``P``: for few data and many
    parameters. Neither ``(P, P)`` nor ``(N C, P)`` is formed for linear layers.

    Args:
        fn: Pure model.
        params: The mode.
        data: As for :func:`funcbayes.curvature.ggn`.
        likelihood: ``p(y|f)``.
        prior_precision: As for :func:`posterior`.
        prior_mean: As for :func:`posterior`.
        where: Which leaves are uncertain; ``None`` for all.
        noise_std: As for :func:`posterior`.
        temperature: As for :func:`posterior`.
        num_points: A subset of so many rows in place of all, drawn at random, for data in tensors: then
            uncertainty is that of having seen only these.
        seed: Of that subset.
        batch_size: Rows a batch, for data in tensors.
        max_bytes: As for :func:`funcbayes.curvature.ggn`.
        progress: Whether to show a bar over the batches.

    Returns:
        What predicts, and the evidence.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If a number is out of range, or data are empty.
        RuntimeError: If a loss is not finite; the batch is named. Or if rounding leaves no posterior.

    Example:
        >>> import torch, funcbayes as fb
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 50), torch.nn.Tanh(), torch.nn.Linear(50, 1))
        >>> fn, params = fb.make_functional(net)
        >>> x = torch.randn(10, 2)
        >>> normal = fb.likelihoods.Normal(0.1)
        >>> process = fb.laplace.functional(fn, params, (x, x.sum(1, keepdim=True)), normal)
        >>> process.predict(torch.randn(5, 2), likelihood=normal).variance.shape
        torch.Size([5, 1])
    """
    if num_points is not None:
        data = _subset(data, num_points, seed)
    problem = Problem.of(
        *(fn, params, data, likelihood, where),
        call=_CALL,
        batch_size=batch_size,
        max_bytes=max_bytes,
        progress=progress,
    )
    check_numbers(noise_std, temperature, has_noise=noise_of(likelihood) is not None, call=_CALL)
    leaves = {name: leaf.detach() for name, leaf in problem.leaves.items()}
    prior = Prior.of(leaves, prior_precision, prior_mean, None, _CALL)
    assert prior.precision is not None
    variance = {name: 1 / number for name, number in prior.precision.items()}
    gradients, term = _gathered(problem)
    factor = as_double(term.factor(noise_std) / temperature)
    root = _root(_kernel(gradients, gradients, variance), factor)
    occam = 2 * root.diagonal().log().sum() + prior.quadratic(leaves)
    evidence = term.at(noise_std) / temperature - 0.5 * occam
    return FunctionalLaplace(
        fn,
        as_tree(params),
        int(term.num_data),
        evidence.to(at_least_single(next(iter(leaves.values())).dtype)),
        problem.names,
        gradients,
        variance,
        root,
        factor,
    )


def _gathered(problem: Problem) -> tuple[dict[str, list[RowGradients]], DataTerm]:
    """Gradients of the columns of the GGN for all rows by leaf, and the log likelihood."""
    columns, found, total = ggn_columns(problem.likelihood), [], None
    counts: list[tuple[int, int, int]] = []
    for number, x, y in problem.shown_batches():
        for block in blocks(
            *(problem.fn, problem.params, problem.names, x),
            num_columns=columns.count,
            call=_CALL,
            max_bytes=problem.max_bytes,
        ):
            outputs, own = block.outputs, y[block.rows]
            problem.likelihood.check(outputs[0], own, call=problem.quoted(number))
            term = data_term(problem.likelihood, outputs, own, columns.noise_power)
            refuse_infinite(outputs, term, number, _CALL)
            total = term if total is None else total + term
            for some in columns.make(outputs, own, 0, block.num_columns):
                gradients = block.gradients(some)
                if not all(gradient.is_finite() for gradient in gradients.values()):
                    raise RuntimeError(
                        f"The gradients in `{_CALL}` are not finite in batch {number}, though its loss is. "
                        "float64, or smaller outputs, may help."
                    )
                found.append(gradients)
                counts.append((1, some.shape[2], some.shape[0]))
    assert total is not None
    zero = {name: leaf.detach().new_zeros(()) for name, leaf in problem.leaves.items()}
    by_leaf: dict[str, list[RowGradients]] = {
        name: [
            part[name] if name in part else Formed(_like(zero[name], count, shape), shape)
            for part, count in zip(found, counts, strict=True)
        ]
        for name, shape in problem.shapes.items()
    }
    return by_leaf, problem.scalars(total)


def _like(zero: Tensor, counts: tuple[int, int, int], shape: torch.Size) -> Tensor:
    """The gradients of rows in which a leaf has no part, one number of memory."""
    return zero.expand(*counts, shape[:1].numel(), shape[1:].numel())


def _kernel(
    one: dict[str, list[RowGradients]], two: dict[str, list[RowGradients]], variance: dict[str, Tensor]
) -> Tensor:
    """``J P0^-1 J'^T``, ``(N K, N' K')``."""
    terms = (gram(one[name], two[name], variance[name]) for name in one if name in two)
    return functools.reduce(torch.add, terms)


def _root(kernel: Tensor, factor: Tensor) -> Tensor:
    """Lower Cholesky factor of ``I + f R D^-1 R^T``."""
    kernel = (kernel + kernel.mT) * (factor / 2)
    kernel.diagonal().add_(1)
    root, info = torch.linalg.cholesky_ex(kernel)
    if int(info) or not bool(root.isfinite().all()):
        raise RuntimeError(
            f"The posterior of `{_CALL}` is lost in rounding: the prior says next to nothing beside the "
            "data. A larger `prior_precision` helps, or a model in float64."
        )
    return root


def _subset(data: Data, num_points: int, seed: Seed | None) -> Data:
    if not are_tensors(data):
        raise ValueError(
            f"`{_CALL}(num_points=...)` should be given data in tensors, `data=(x, y)`, got "
            f"{type(data).__name__}."
        )
    count = num_rows(as_tree(data[0])) or 0
    if isinstance(num_points, bool) or not isinstance(num_points, int) or not 1 <= num_points <= count:
        raise ValueError(f"`{_CALL}(num_points=...)` should be an int from 1 to {count}, got {num_points!r}.")
    chosen = permutation(fold(int(resolve_seed(seed)), "points"), count)[:num_points].sort().values
    return _rows(data[0], chosen), taken(data[1], chosen)


def _rows(x: Any, chosen: Tensor) -> Any:
    return optree.tree_map(
        lambda leaf: taken(leaf, chosen) if isinstance(leaf, Tensor) and leaf.ndim else leaf,
        as_tree(x),
    )
