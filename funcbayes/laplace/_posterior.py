"""The Laplace approximation: a Gaussian at a mode, with the curvature there."""

import math
from typing import Any

import torch
from torch import Tensor

from .._functorch import is_concrete
from .._tree import Fixed, Params, difference, is_parameter, map_leaves, named_leaves, parameters_of, select
from ..covariances._flat import at_least_single, dtype_of, without_columns
from ..covariances._kronecker import sides
from ..curvature import Curvature, Diag, EigenKron, Kron, LowRank
from ..curvature._curvature import Structure
from ..posteriors import Gaussian
from ._precision import Precision, precision_of
from ._prior import Numbers, Prior

_STRUCTURES: dict[type[Curvature], Structure] = {
    Diag: "diag",
    Kron: "kron",
    EigenKron: "kron",
    LowRank: "low_rank",
}


def posterior(
    params: Params,
    c: Curvature,
    prior_precision: Numbers = 1.0,
    prior_mean: Numbers = 0.0,
    prior: Gaussian | None = None,
    noise_std: float | Tensor | None = None,
    temperature: float | Tensor = 1.0,
    linearized: bool = True,
) -> Gaussian:
    """Make the Gaussian ``N(params, (H / temperature + prior precision)^-1)``.

    MacKay (1992), "A practical Bayesian framework for backpropagation networks"; Ritter et al. (2018), "A
    scalable Laplace approximation for neural networks"; Daxberger et al. (2021), "Laplace redux". Another
    prior, noise or temperature costs no new curvature.

    Args:
        params: The mode: parameters at which the curvature was found.
        c: The curvature ``H``, **summed** over the data: one of :mod:`funcbayes.curvature`.
        prior_precision: Precision (1 / variance) of the Gaussian prior, in one over squared units of the
            parameter: one number; a tree with a number for each leaf; or, but for Kronecker curvatures, with
            one for each parameter.
        prior_mean: Its mean, a number or a tree like the parameters. It does not move the posterior, whose
            mean is the mode; it matters for the evidence.
        prior: A whole Gaussian in place of these two, over the covered leaves: an old posterior is the prior
            of a continual update. Its structure has to go with the curvature's: independent parameters or
            low-rank precisions with ``Diag`` and ``LowRank``, Kronecker with Kronecker (where the sum of two
            products is projected on the nearest one in the eigenbasis of its partial traces), any with
            ``Full``.
        noise_std: For a ``Normal`` likelihood: the noise, in place of that of the likelihood.
        temperature: Divides the curvature, and not the prior: below 1 as if there were more data.
        linearized: Whether the Gaussian is over the parameters of the linearised model, as a GGN is (Immer et
            al. 2021, "Improving predictions of Bayesian neural nets via local linearization"): ``predict``
            evaluates draws so. Through the network itself they can be far worse.

    Returns:
        A Gaussian over the leaves that the curvature covers, with ``Diagonal``, ``Kronecker``,
        ``LowRankPrecision`` or ``Dense`` covariance.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If a number is out of range, or trees do not match.
        RuntimeError: If the precision is not positive definite, as with a Hessian that is indefinite; its
            smallest eigenvalue is given.

    Example:
        >>> import torch, funcbayes as fb
        >>> fn, params = fb.make_functional(torch.nn.Linear(2, 1, bias=False))
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
        >>> c = fb.curvature.ggn(fn, params, (x, torch.zeros(2, 1)), fb.likelihoods.Normal(1.0), "diag")
        >>> fb.laplace.posterior(params, c, 2.0).variance["weight"]  # 1 / (10 + 2), 1 / (4 + 2)
        tensor([[0.0833, 0.1667]])
    """
    call = "laplace.posterior"
    leaves, precision, _ = _prepared(
        *(params, c, prior_precision, prior_mean, prior, noise_std, temperature),
        call=call,
    )
    # Of a model that is covered wholly the buffers belong to every draw: nothing else has to be given.
    is_whole = set(parameters_of(params)) == set(leaves)
    mean = select(params, lambda name, leaf: name in leaves or (is_whole and isinstance(leaf, Fixed)))
    # A copy: parameters that are trained in place later do not move it.
    with torch.inference_mode(False):
        mean = map_leaves(lambda leaf: leaf.detach().clone(), mean)
    return Gaussian(mean, precision.covariance(), linearized)


def log_marginal_likelihood(
    params: Params,
    c: Curvature,
    prior_precision: Numbers = 1.0,
    prior_mean: Numbers = 0.0,
    prior: Gaussian | None = None,
    noise_std: float | Tensor | None = None,
    temperature: float | Tensor = 1.0,
) -> Tensor:
    """Find the evidence: the log probability of the data, with parameters integrated out.

    ``log p(D|theta) / temperature - 1/2 [logdet P - logdet P0 + (theta - m0)^T P0 (theta - m0)]`` with the
    posterior precision ``P = H / temperature + P0`` (MacKay 1992; Immer et al. 2021, "Scalable marginal
    likelihood estimation for model selection in deep learning", eq. 7). It is differentiable in the precision
    and mean of the prior, the noise and the temperature.

    Args:
        params: As for :func:`posterior`.
        c: As for :func:`posterior`; it carries the log likelihood ``log p(D|theta)``.
        prior_precision: As for :func:`posterior`.
        prior_mean: As for :func:`posterior`.
        prior: As for :func:`posterior`.
        noise_std: As for :func:`posterior`.
        temperature: As for :func:`posterior`.

    Returns:
        A scalar, in nats and **summed** over the data.

    Raises:
        TypeError: As for :func:`posterior`.
        ValueError: As for :func:`posterior`.
        RuntimeError: As for :func:`posterior`.

    Example:
        >>> import torch, funcbayes as fb
        >>> fn = lambda params, x: x @ params["w"]
        >>> data = (torch.ones(1, 1), torch.ones(1, 1))
        >>> params = {"w": torch.full((1, 1), 0.5)}
        >>> c = fb.curvature.ggn(fn, params, data, fb.likelihoods.Normal(1.0), "full")
        >>> fb.laplace.log_marginal_likelihood(params, c)  # y ~ N(0, 1 + 1): -1/4 - log(4 pi) / 2
        tensor(-1.5155)
    """
    found = evidence(
        *(params, c, prior_precision, prior_mean, prior, noise_std, temperature),
        call="laplace.log_marginal_likelihood",
    )
    leaves = covered_leaves(params, c, "laplace.log_marginal_likelihood")
    return found.to(at_least_single(dtype_of(leaves)))


def evidence(
    params: Params,
    c: Curvature,
    prior_precision: Numbers = 1.0,
    prior_mean: Numbers = 0.0,
    prior: Gaussian | None = None,
    noise_std: float | Tensor | None = None,
    temperature: float | Tensor = 1.0,
    *,
    call: str,
) -> Tensor:
    """The log marginal likelihood in double precision."""
    leaves, precision, given = _prepared(
        *(params, c, prior_precision, prior_mean, prior, noise_std, temperature),
        call=call,
    )
    occam = precision.logdet() - given.logdet(leaves) + given.quadratic(leaves)
    return c.data.at(noise_std) / temperature - 0.5 * occam


def _prepared(
    params: Params,
    c: Any,
    prior_precision: Numbers,
    prior_mean: Numbers,
    prior: Gaussian | None,
    noise_std: float | Tensor | None,
    temperature: float | Tensor,
    *,
    call: str,
) -> tuple[dict[str, Tensor], Precision, Prior]:
    """The covered leaves, the posterior's precision and the prior, after checks."""
    leaves = checked_leaves(params, c, noise_std, temperature, call=call)
    given = Prior.of(leaves, prior_precision, prior_mean, prior, call)
    given.check_goes_with(_STRUCTURES.get(type(c), "full"), call)
    factor = c.data.factor(noise_std) / temperature
    like = select(params, lambda name, leaf: name in leaves)
    return leaves, precision_of(c, given, factor, like), given


def checked_leaves(
    params: Params, c: Any, noise_std: float | Tensor | None, temperature: float | Tensor, *, call: str
) -> dict[str, Tensor]:
    """The leaves that a curvature covers, after checks of it and of numbers."""
    if not isinstance(c, Curvature):
        raise TypeError(
            f"`{call}(params, c)` should be given one of `funcbayes.curvature`, got {type(c).__name__}. Find "
            "it with `curvature.ggn(fn, params, data, likelihood)`."
        )
    check_numbers(noise_std, temperature, has_noise=c.data.has_noise, call=call)
    if c.data.num_data.ndim:
        raise ValueError(
            f"`{call}(params, c)` should be given the curvature of one network, got those of "
            f"{len(c.data.num_data)}. `laplace.fit(..., stacked=True)` makes posteriors of all."
        )
    return covered_leaves(params, c, call)


def check_numbers(
    noise_std: float | Tensor | None, temperature: float | Tensor, *, has_noise: bool, call: str
) -> None:
    """Refuse numbers out of range, and a noise where there is none to choose."""
    check_positive(temperature, f"{call}(temperature=...)")
    if noise_std is not None:
        check_positive(noise_std, f"{call}(noise_std=...)")
        if not has_noise:
            raise ValueError(
                f"`{call}(noise_std=...)` goes with a curvature of a `Normal` likelihood with one noise for "
                "all outputs; leave it out."
            )


def covered_leaves(params: Params, c: Curvature, call: str) -> dict[str, Tensor]:
    """The leaves of ``params`` that a curvature covers, by path."""
    there = named_leaves(params)
    for name in c.leaves:
        if name not in there or not is_parameter(there[name]):
            raise ValueError(
                f"`{call}(params, c)` should have the leaves that the curvature covers in `params`; {name!r} "
                "is missing."
            )
    leaves = {name: there[name] for name in c.leaves}
    differing = _difference(c, leaves)
    if differing:
        raise ValueError(f"`{call}(params, c)` should have a curvature of `params`; in it {differing}.")
    return leaves


def _difference(c: Curvature, leaves: dict[str, Tensor]) -> str | None:
    """In words how the leaves of a curvature differ from those of the parameters."""
    if isinstance(c, LowRank):
        return difference(without_columns(c.leaves), leaves)
    if not isinstance(c, Kron | EigenKron):
        return difference(c.leaves, leaves)
    found = c.leaves if isinstance(c, EigenKron) else {}
    if isinstance(c, Kron):
        inputs = named_leaves(c.input_sum)
        found = {name: _placeholder(len(one), len(inputs[name])) for name, one in c.leaves.items()}
    differing = difference(found, {name: _placeholder(*sides(leaf)) for name, leaf in leaves.items()})
    return None if differing is None else f"as matrices {differing}"


def _placeholder(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def check_positive(number: float | Tensor, call: str) -> None:
    """Refuse what is no positive number."""
    if isinstance(number, bool) or not isinstance(number, float | int | Tensor):
        raise TypeError(f"`{call}` should be a number, got {type(number).__name__}.")
    if isinstance(number, Tensor) and number.ndim:
        raise ValueError(f"`{call}` should be one number, got shape {tuple(number.shape)}.")
    if isinstance(number, Tensor) and not is_concrete(number):
        return
    value = float(torch.as_tensor(number).detach())
    if not 0 < value < math.inf:
        raise ValueError(f"`{call}` should be positive and finite, got {value:g}.")
