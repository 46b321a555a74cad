"""Links: class probabilities of logits that are Gaussian.

The integral ``E[softmax(f)]`` over ``f ~ N(mean, covariance)`` has no closed form. Each function here is an
approximation of it, for every row on its own: a row's result does not depend on the rows beside it. Classes
are on the last axis; before it there may be any axes, of which the first counts rows.

All compute in at least float32 and give the dtype of ``mean``. With ``log=True`` they give log probabilities
in the layout of ``log_class_probs`` of the likelihood: finite where a probability underflows, and what a log
density or an entropy is made of.
"""

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ._checks import positive_int
from ._functorch import is_concrete
from ._random import Seed, fold, normal, resolve_seed
from .covariances._flat import as_double
from .likelihoods import Bernoulli, Categorical

_NUMEL = 1 << 22  # Monte Carlo makes about this many logits at a time


def probit(mean: Tensor, variance: Tensor, *, log: bool = False) -> Tensor:
    """Approximate ``E[softmax(f)]`` by ``softmax(mean / sqrt(1 + pi/8 variance))``.

    The logistic sigmoid is close to a probit function, whose expectation is known: MacKay (1992), "The
    evidence framework applied to classification networks", his moderated output. For several classes the
    same factor is applied to each logit: Lu, Ie & Sha (2020), "Mean-field approximation to
    Gaussian-softmax integral", ``mf0``. Correlations between logits are not used.

    Args:
        mean: Of the logits, ``(N, C)``.
        variance: Diagonal of their covariance, ``(N, C)``.
        log: Whether to give log probabilities.

    Returns:
        Probabilities ``(N, C)``; ``softmax(mean)`` as the variance vanishes.

    Raises:
        TypeError: If a tensor is not of floating point.
        ValueError: If ``variance`` has another shape than ``mean``.
    """
    _check("probit", mean, variance=(variance, mean.shape))
    return _given(Categorical(), Categorical().log_class_probs(_moderated(mean, variance)), mean, log)


def probit_bernoulli(mean: Tensor, variance: Tensor, *, log: bool = False) -> Tensor:
    """Approximate ``E[sigmoid(f)]`` by ``sigmoid(mean / sqrt(1 + pi/8 variance))``, for each logit.

    Args:
        mean: Of the logits, ``(N, ...)``.
        variance: Of each logit, likewise.
        log: Whether to give ``[log p(0), log p(1)]`` on a new last axis.

    Returns:
        ``p(y = 1)``, ``(N, ...)``. Source: MacKay (1992), see :func:`probit`.

    Raises:
        TypeError: If a tensor is not of floating point.
        ValueError: If ``variance`` has another shape than ``mean``.
    """
    _check("probit_bernoulli", mean, variance=(variance, mean.shape))
    return _given(Bernoulli(), Bernoulli().log_class_probs(_moderated(mean, variance)), mean, log)


def laplace_bridge(mean: Tensor, variance: Tensor, row_sums: Tensor, *, log: bool = False) -> Tensor:
    """Approximate ``E[softmax(f)]`` by the mean of the Dirichlet that the Laplace bridge gives.

    First the Gaussian is conditioned on logits that sum to zero, ``m <- m - S1 (1^T m) / (1^T S 1)`` and
    ``S <- S - S1 1^T S / (1^T S 1)``; then, with ``K`` classes,
    ``alpha_k = (1 - 2/K + exp(m_k) K^-2 sum_l exp(-m_l)) / S_kk`` and ``p = alpha / sum(alpha)``: Hobbhahn,
    Kristiadi & Hennig (2022), "Fast predictive uncertainty for classification with Bayesian deep networks",
    after MacKay (1998), "Choice of basis for Laplace approximation".

    Only how variances compare matters, so as all vanish alike this is not ``softmax(mean)``.

    Args:
        mean: Of the logits, ``(N, C)`` with at least two classes.
        variance: Diagonal of their covariance ``S``, ``(N, C)``.
        row_sums: ``S1``, sums of the rows of ``S``, ``(N, C)``.
        log: Whether to give log probabilities.

    Returns:
        Probabilities ``(N, C)``.

    Raises:
        TypeError: If a tensor is not of floating point.
        ValueError: If shapes differ, or there are fewer than two classes.
    """
    mean_0, variance_0 = _sum_zero("laplace_bridge", mean, variance, row_sums)
    return _given(Categorical(), _log_dirichlet_mean(mean_0, variance_0), mean, log)


def laplace_bridge_normalized(
    mean: Tensor, variance: Tensor, row_sums: Tensor, *, log: bool = False
) -> Tensor:
    """Approximate ``E[softmax(f)]`` by the Laplace bridge at a variance for which it is good.

    As :func:`laplace_bridge`, with logits that sum to zero divided by ``sqrt(c)`` and their covariance by
    ``c`` before the bridge, where ``c`` is their mean variance over ``sqrt(K / 2)``: the normalisation of
    Hobbhahn et al. (2022), since the bridge is poor at large variances.

    Args:
        mean: Of the logits, ``(N, C)`` with at least two classes.
        variance: Diagonal of their covariance ``S``, ``(N, C)``.
        row_sums: ``S1``, sums of the rows of ``S``, ``(N, C)``.
        log: Whether to give log probabilities.

    Returns:
        Probabilities ``(N, C)``. As all variances vanish they go to the most probable class.

    Raises:
        TypeError: If a tensor is not of floating point.
        ValueError: If shapes differ, or there are fewer than two classes.
    """
    mean_0, variance_0 = _sum_zero("laplace_bridge_normalized", mean, variance, row_sums)
    scale = variance_0.mean(-1, keepdim=True) / math.sqrt(mean.shape[-1] / 2)
    # That the variances are divided by it, too, cancels in alpha / sum(alpha).
    return _given(Categorical(), _log_dirichlet_mean(mean_0 / scale.sqrt(), variance_0), mean, log)


def monte_carlo(
    mean: Tensor, covariance: Tensor, *, num_samples: int, seed: Seed | None = None, log: bool = False
) -> Tensor:
    """Estimate ``E[softmax(f)]`` by the average over draws of the logits, without bias.

    All rows are given the same normals, so that a row has the same result in any company. Estimates of
    different rows therefore err together.

    Args:
        mean: Of the logits, ``(N, C)``.
        covariance: ``(N, C, C)``, positive semi-definite to rounding. A singular one is fine.
        num_samples: Number of draws ``S``. The standard error of a probability is at most ``0.5 / sqrt(S)``.
        seed: Draw ``i`` is a function of it and of ``i``; ``None`` takes one number from torch's global
            state.
        log: Whether to give log probabilities.

    Returns:
        Probabilities ``(N, C)``, differentiable in both tensors.

    Raises:
        TypeError: If a tensor is not of floating point, or ``num_samples`` is no int.
        ValueError: If ``covariance`` is not ``(N, C, C)`` or not positive semi-definite, or ``num_samples``
            is below 1.
    """
    count = positive_int(num_samples, "monte_carlo(num_samples=...)")
    _check("monte_carlo", mean, covariance=(covariance, (*mean.shape, *mean.shape[-1:])))
    center, _ = _at_least_single(mean, covariance)
    root = _root(covariance, "monte_carlo(mean, covariance)").to(center.dtype)
    noise = _noise(count, center.shape[-1:], seed, center)

    def log_probs(part: Tensor) -> Tensor:
        deviations = (root @ part.mT).movedim(-1, 0)  # (S, N, C)
        return Categorical().log_class_probs(center + deviations)

    return _given(Categorical(), _log_mean_exp(log_probs, noise, mean.numel()), mean, log)


def monte_carlo_bernoulli(
    mean: Tensor, variance: Tensor, *, num_samples: int, seed: Seed | None = None, log: bool = False
) -> Tensor:
    """Estimate ``E[sigmoid(f)]`` for each logit by the average over draws, without bias.

    Args:
        mean: Of the logits, ``(N, ...)``.
        variance: Of each logit, likewise: how they are correlated makes no difference.
        num_samples: Number of draws ``S``.
        seed: As in :func:`monte_carlo`, whose draws are shared between rows likewise.
        log: Whether to give ``[log p(0), log p(1)]`` on a new last axis.

    Returns:
        ``p(y = 1)``, ``(N, ...)``.

    Raises:
        TypeError: If a tensor is not of floating point, or ``num_samples`` is no int.
        ValueError: If ``variance`` has another shape than ``mean``, or ``num_samples`` is below 1.
    """
    count = positive_int(num_samples, "monte_carlo_bernoulli(num_samples=...)")
    _check("monte_carlo_bernoulli", mean, variance=(variance, mean.shape))
    center, spread = _at_least_single(mean, variance)
    # The clamp keeps the derivative of the square root finite at 0.
    std = spread.clamp_min(torch.finfo(spread.dtype).tiny).sqrt()
    noise = _noise(count, center.shape[1:], seed, center)

    def log_probs(part: Tensor) -> Tensor:
        return Bernoulli().log_class_probs(center + std * part.unsqueeze(1))

    return _given(Bernoulli(), _log_mean_exp(log_probs, noise, 2 * mean.numel()), mean, log)


def _given(likelihood: Bernoulli | Categorical, log_probs: Tensor, mean: Tensor, log: bool) -> Tensor:
    """What the caller asked for, in the dtype of ``mean``."""
    return (log_probs if log else likelihood.mean_of_log_probs(log_probs)).to(mean.dtype)


def _moderated(mean: Tensor, variance: Tensor) -> Tensor:
    center, spread = _at_least_single(mean, variance)
    # Rounding may have made a variance negative.
    return center / (1 + math.pi / 8 * spread.clamp_min(0)).sqrt()


def _sum_zero(call: str, mean: Tensor, variance: Tensor, row_sums: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variances given that logits sum to zero."""
    _check(call, mean, variance=(variance, mean.shape), row_sums=(row_sums, mean.shape))
    num_classes = mean.shape[-1]
    if num_classes < 2:
        raise ValueError(
            f"`{call}(mean, ...)` should have at least two classes on its last axis, got shape "
            f"{tuple(mean.shape)}. For one logit of two classes: `probit_bernoulli`."
        )
    eps = torch.finfo(variance.dtype).eps  # of the numbers that were given, whatever they are computed in
    center, spread, rows = _at_least_single(mean, variance, row_sums)
    largest = spread.amax(-1, keepdim=True)
    total = rows.sum(-1, keepdim=True)  # 1^T S 1, at most C trace(S)
    # If the sum is certain the limit is taken in which its uncertainty is independent of the differences.
    is_certain = total <= eps * num_classes * spread.sum(-1, keepdim=True)
    share = torch.where(is_certain, 1 / num_classes, rows / torch.where(is_certain, 1, total))
    along = torch.where(is_certain, 0, rows * share)
    # Where nothing but rounding is left, classes count as equally uncertain.
    floor = (eps * largest).clamp_min(torch.finfo(spread.dtype).tiny)
    return center - share * center.sum(-1, keepdim=True), torch.maximum(spread - along, floor)


def _log_dirichlet_mean(mean: Tensor, variance: Tensor) -> Tensor:
    """``log(alpha / sum(alpha))`` of the bridge."""
    num_classes = mean.shape[-1]
    # In logs, since exp(m_k) overflows beside an exp(-m_l) that underflows.
    terms = mean + (-mean).logsumexp(-1, keepdim=True) - 2 * math.log(num_classes)
    if num_classes > 2:  # else the constant is zero
        constant = torch.full_like(terms, math.log1p(-2 / num_classes))
        terms = torch.stack([terms, constant]).logsumexp(0)
    return (terms - variance.log()).log_softmax(-1)


def _root(covariance: Tensor, call: str) -> Tensor:
    """``L`` with ``L L^T = covariance``, in double precision, for a singular matrix, too."""
    matrix = as_double(covariance)
    eps, size = torch.finfo(matrix.dtype).eps, matrix.shape[-1]
    if not size:
        return matrix
    largest = matrix.detach().diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None]
    margin = (4 * size * eps * largest).clamp_min(torch.finfo(matrix.dtype).tiny)
    identity = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
    root, info = torch.linalg.cholesky_ex(matrix + margin * identity)
    if is_concrete(info) and not bool(info.any()):
        return root
    # Rounding has made an eigenvalue negative. Shifting all by so much keeps the derivative, which a root
    # from eigenvectors does not have where eigenvalues coincide.
    lowest = torch.linalg.eigvalsh(matrix.detach())[..., :1, None]
    if is_concrete(lowest) and bool(
        (-lowest > 8 * size * torch.finfo(covariance.dtype).eps * largest + margin).any()
    ):
        raise ValueError(
            f"`{call}` should have covariances that are positive semi-definite, got a smallest eigenvalue of "
            f"{float(lowest.min()):.3g} where the largest variance is {float(largest.max()):.3g}."
        )
    return torch.linalg.cholesky(matrix + (margin + 2 * (-lowest).clamp_min(0)) * identity)


def _noise(count: int, shape: torch.Size, seed: Seed | None, like: Tensor) -> Tensor:
    """Standard normals ``(S, *shape)``."""
    keys = fold(fold(resolve_seed(seed), torch.arange(count)), "link")
    return normal(keys, shape, dtype=like.dtype, device=like.device)


def _log_mean_exp(log_probs: Callable[[Tensor], Tensor], noise: Tensor, numel: int) -> Tensor:
    """``log mean exp`` over the first axis of ``log_probs(noise)``, which has ``numel`` entries a draw."""
    parts = [log_probs(part).logsumexp(0) for part in noise.split(max(_NUMEL // max(numel, 1), 1))]
    return torch.stack(parts).logsumexp(0) - math.log(len(noise))


def _at_least_single(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In the dtype they promote to, or float32."""
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
    return tuple(tensor.to(dtype) for tensor in tensors)


def _check(call: str, mean: Tensor, **others: tuple[Tensor, Sequence[int]]) -> None:
    """Refuse tensors that are not of floating point or have unexpected shapes."""
    names = ", ".join(("mean", *others))
    for name, tensor in (("mean", mean), *((name, tensor) for name, (tensor, _) in others.items())):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            what = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(
                f"`{name}` in `{call}({names})` should be a tensor of floating point, got {what}."
            )
    if not mean.ndim:
        raise ValueError(f"`mean` in `{call}({names})` should have an axis of rows, (N, ...), got a scalar.")
    for name, (tensor, shape) in others.items():
        if tensor.shape != torch.Size(shape):
            raise ValueError(
                f"`{name}` in `{call}({names})` should have shape {tuple(shape)} for a mean of shape "
                f"{tuple(mean.shape)}, got {tuple(tensor.shape)}."
            )
