"""Choosing the prior precision by held-out data, on a grid, with one curvature and one projection on it."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._checks import positive_int
from .._linearized_prediction import Component, LinearizedPrediction, Link, check_link
from .._output_covariance import (
    Form,
    Jacobian,
    Terms,
    contracted,
    gathered,
    in_bases,
    independent_terms,
    jacobians,
    outside,
    residual_terms,
)
from .._random import Seed, resolve_seed
from .._tree import Params, named_leaves
from ..covariances._flat import as_double, ravel_columns
from ..curvature import Curvature, Diag, EigenKron, Full, Kron, LowRank
from ..curvature._data_term import data_term, noise_of
from ..curvature._pass import Problem, refuse_infinite
from ..likelihoods import Bernoulli, Categorical, Likelihood, Normal
from ..training._data import Data
from ._posterior import checked_leaves
from ._precision import not_negative_by_rounding

_CALL = "laplace.minimize_validation_nll"
_Spectral = Callable[[Jacobian], Callable[[float], Terms]]


@dataclass(frozen=True)
class GridSearch:
    """What a search over a grid found.

    Attributes:
        prior_precision: The best of the grid, a scalar.
        grid: All of it, ``(G,)``.
        nll: Mean negative log probability of the held-out targets at each, ``(G,)``; infinite where it is not
            finite, or the posterior precision is not positive definite.
    """

    prior_precision: Tensor
    grid: Tensor
    nll: Tensor


def minimize_validation_nll(
    fn: Any,
    params: Params,
    c: Curvature,
    data: Data,
    likelihood: Likelihood,
    *,
    grid: Tensor | Sequence[float] | None = None,
    link: Link = "probit",
    noise_std: float | Tensor | None = None,
    temperature: float | Tensor = 1.0,
    num_samples: int = 1000,
    seed: Seed | None = None,
    batch_size: int | None = None,
    max_bytes: int | None = None,
) -> GridSearch:
    """Choose the prior precision under which held-out targets are most probable.

    Their probabilities are those of the linearised predictive. The model is evaluated and differentiated once
    on the held-out rows, and gradients are turned once into the eigenbasis of the curvature, where another
    prior precision is another number to divide by.

    Args:
        fn: Pure model.
        params: The mode.
        c: The curvature of the training data there.
        data: Held-out ``(x, y)``, or a re-iterable of such batches.
        likelihood: ``Categorical``, ``Bernoulli`` or ``Normal``.
        grid: Prior precisions, each for all parameters; ``None`` for 21 from 1e-4 to 1e4, evenly in
            logarithms.
        link: As for :func:`funcbayes.predict_linearized`.
        noise_std: For ``Normal``: noise of the posterior and the predictive; ``None`` for that of
            ``likelihood``.
        temperature: As for :func:`posterior`.
        num_samples: For ``link="mc"``: how many draws of the logits.
        seed: For ``link="mc"``.
        batch_size: Rows a batch, for data in tensors.
        max_bytes: As for :func:`funcbayes.curvature.ggn`.

    Returns:
        The best of the grid, and the scores of all.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If the grid is empty or not positive, or data are empty.
        NotImplementedError: If the likelihood has no closed form under a linearised model.
        RuntimeError: If outputs or the log likelihood of a batch are not finite; or no score is.

    Example:
        >>> import torch, funcbayes as fb
        >>> fn, params = fb.make_functional(torch.nn.Linear(2, 3))
        >>> x, y = torch.randn(30, 2), torch.randint(0, 3, (30,))
        >>> categorical = fb.likelihoods.Categorical()
        >>> c = fb.curvature.ggn(fn, params, (x[:20], y[:20]), categorical)
        >>> found = fb.laplace.minimize_validation_nll(fn, params, c, (x[20:], y[20:]), categorical)
        >>> q = fb.laplace.posterior(params, c, found.prior_precision)
    """
    leaves = checked_leaves(params, c, noise_std, temperature, call=_CALL)
    precisions = _checked_grid(grid)
    num_samples = positive_int(num_samples, f"{_CALL}(num_samples=...)")
    problem = Problem.of(
        *(fn, params, data, likelihood, lambda name, leaf: name in leaves),
        call=_CALL,
        batch_size=batch_size,
        max_bytes=max_bytes,
    )
    if not isinstance(likelihood, Categorical | Bernoulli | Normal):
        raise NotImplementedError(
            f"`{_CALL}(likelihood=...)` has no closed form for {type(likelihood).__name__}. Choose by "
            "evidence: `laplace.maximize_evidence`."
        )
    check_link(link, likelihood, _CALL)
    if noise_std is not None and not isinstance(likelihood, Normal):
        raise ValueError(f"`{_CALL}(noise_std=...)` goes with `Normal`, got {type(likelihood).__name__}.")
    likelihood = likelihood if noise_std is None else Normal(noise_std)
    factor = c.data.factor(noise_of(likelihood)) / temperature
    seed = int(resolve_seed(seed)) if link == "mc" else 0
    form: Form = "variance" if link == "probit" and not isinstance(likelihood, Normal) else "covariance"
    spectral, lowest = _spectral(c, factor, form)
    usable = precisions > -lowest.cpu()  # under the others there is no posterior
    tried = {g: float(precisions[g]) for g in usable.nonzero().flatten().tolist()}
    totals, count = torch.where(usable, 0.0, torch.inf).double(), 0
    with torch.no_grad():
        for number, x, y in problem.batches():
            for jacobian in jacobians(fn, params, problem.names, x, call=_CALL, max_bytes=problem.max_bytes):
                outputs, own = jacobian.block.outputs[0], y[jacobian.block.rows]
                likelihood.check(outputs, own, call=problem.quoted(number))
                refuse_infinite(outputs[None], data_term(likelihood, outputs[None], own, 0), number, _CALL)
                for g, found in _by_precision(jacobian, spectral, outputs, tried, form):
                    variance = found if form == "variance" else found.diagonal(dim1=-2, dim2=-1)
                    component = Component(outputs, variance, lambda found=found: found, None)
                    prediction = LinearizedPrediction(
                        components=(component,),
                        weights=torch.ones(1),
                        likelihood=likelihood,
                        link=link,
                        num_samples=num_samples,
                        seed=seed,
                    )
                    totals[g] -= prediction.log_prob(own).double().sum().cpu()
                count += len(own)
    nll = (totals / max(count, 1)).nan_to_num(nan=torch.inf, posinf=torch.inf)
    if not bool(nll.isfinite().any()):
        raise RuntimeError(
            f"No score in `{_CALL}` is finite. Look for rows that are not, or at the curvature."
        )
    lead = next(iter(leaves.values()))
    best = precisions[nll.argmin()].to(lead)
    return GridSearch(best, precisions.to(lead.dtype), nll.to(lead.dtype))


def _checked_grid(grid: Tensor | Sequence[float] | None) -> Tensor:
    if grid is None:
        return torch.logspace(-4, 4, 21, dtype=torch.float64)
    values = torch.as_tensor(grid, dtype=torch.float64).cpu()
    if values.ndim != 1 or not len(values) or not bool(((values > 0) & values.isfinite()).all()):
        raise ValueError(
            f"`{_CALL}(grid=...)` should be positive and finite numbers, at least one, got {values.tolist()}."
        )
    return values


def _by_precision(
    jacobian: Jacobian, spectral: _Spectral, outputs: Tensor, tried: Mapping[int, float], form: Form
) -> Iterator[tuple[int, Tensor]]:
    """Variances or covariances of the outputs of some rows, under each of several prior precisions."""
    flat = outputs.reshape(len(outputs), -1)
    parts: dict[int, list[Tensor]] = {g: [] for g in tried}
    for piece in jacobian.pieces() if form == "variance" else [jacobian]:
        terms = spectral(piece)
        for g, precision in tried.items():
            parts[g].append(gathered(terms(precision), flat[:, piece.covered], form))
    for g, of_outputs in parts.items():
        yield g, torch.cat(of_outputs, 1)


def _spectral(c: Curvature, factor: Tensor, form: Form) -> tuple[_Spectral, Tensor]:
    """Terms of the covariance of the outputs, given a Jacobian, as a function of the prior precision.

    And the lowest eigenvalue of the curvature.
    """
    nothing = torch.zeros_like(factor)
    if isinstance(c, Kron):
        c = c.eigen
    if isinstance(c, Diag):
        leaves = c.leaves
        lowest = torch.stack([leaf.min() for leaf in leaves.values()]).min() * factor
        return lambda jacobian: _by_eigenvalues(leaves, jacobian, factor, form), lowest
    if isinstance(c, EigenKron):
        values, bases = c.leaves, (named_leaves(c.output_basis), named_leaves(c.input_basis))
        return lambda jacobian: _by_eigenvalues(values, in_bases(jacobian, *bases), factor, form), nothing
    if isinstance(c, LowRank):
        return _low_rank(c, factor, form), nothing
    if isinstance(c, Full):
        return _full(c, factor, form)
    raise TypeError(f"`{_CALL}` does not know a curvature {type(c).__name__}.")


def _by_eigenvalues(
    values: Mapping[str, Tensor], jacobian: Jacobian, factor: Tensor, form: Form
) -> Callable[[float], Terms]:
    wide = {name: as_double(leaf) * factor for name, leaf in values.items()}
    return lambda precision: independent_terms(
        {name: 1 / (leaf + precision) for name, leaf in wide.items()}, jacobian, form
    )


def _full(c: Full, factor: Tensor, form: Form) -> tuple[_Spectral, Tensor]:
    values, vectors = torch.linalg.eigh(as_double(c.matrix))
    values = not_negative_by_rounding(values, c) * factor
    sizes = [leaf.numel() for leaf in c.leaves.values()]
    shaped = zip(c.leaves.items(), vectors.split(sizes), strict=True)
    columns = {name: part.reshape(*leaf.shape, -1).to(leaf.dtype) for (name, leaf), part in shaped}

    def of(jacobian: Jacobian) -> Callable[[float], Terms]:
        pushed = jacobian.times(columns)
        return lambda precision: _weighed(pushed, 1 / (values + precision), form)

    return of, values[0]


def _low_rank(c: LowRank, factor: Tensor, form: Form) -> _Spectral:
    values = as_double(c.eigenvalues).clamp_min(0) * factor
    # They are orthonormal to the rounding of their dtype.
    vectors = torch.linalg.qr(ravel_columns(c.leaves, c.leaves)).Q
    sizes = [leaf.shape[:-1].numel() for leaf in c.leaves.values()]
    shaped = zip(c.leaves.items(), vectors.split(sizes), strict=True)
    basis = {name: part.reshape(leaf.shape) for (name, leaf), part in shaped}
    ones = {name: leaf.new_ones(leaf.shape[:-1]) for name, leaf in c.leaves.items()}

    def of(jacobian: Jacobian) -> Callable[[float], Terms]:
        # What no eigenvector sees has the variance of the prior.
        along, beside = outside(jacobian, ones, basis, form)
        if beside is None:
            beside = functools.reduce(torch.add, residual_terms(jacobian, ones, basis, along, form))

        def of_precision(precision: float) -> Terms:
            yield beside / precision
            yield from _weighed(along, 1 / (values + precision), form)

        return of_precision

    return of


def _weighed(pushed: Tensor, variances: Tensor, form: Form) -> Terms:
    yield contracted(pushed * variances.to(pushed.dtype), pushed, form)
