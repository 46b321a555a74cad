"""How well chains have mixed: effective sample sizes and split R-hat.

Both follow Vehtari, Gelman, Simpson, Carpenter & Bürkner (2021), "Rank-normalization, folding, and
localization: an improved R-hat for assessing convergence of MCMC", https://arxiv.org/abs/1903.08008.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Numbers that are worked on at a time: what is found for one event does not depend on the others.
_NUMBERS = 1 << 22


def effective_sample_size(values: Tensor, *, rank_normalized: bool = True) -> Tensor:
    """Find how many independent draws would say as much of a mean as the draws of the chains.

    Let there be ``m`` half chains of length ``n``, with variances ``s_j^2`` whose mean is ``W``, and
    autocorrelations ``rho_tj`` at lag ``t``, and let ``var`` be that of :func:`split_r_hat`. Then

        rho_t = 1 - (W - mean over j of s_j^2 rho_tj) / var,
        ESS = m n / tau,    tau = -1 + 2 * sum of P_k,

    Vehtari et al. (2021), section 3.2, where ``P_k = rho_2k + rho_(2k+1)`` is summed as long as it is
    positive, and never larger than those before: Geyer's (1992) initial monotone sequence. ``tau`` is at
    least ``1 / log10(m n)``: draws of antithetic chains may count for more than one each.

    Args:
        values: Any function of the draws ``(M, T, *s)``: ``T`` states of each of ``M`` chains in the order
            they were reached; at least 4. If ``T`` is odd, the middle one is left out.
        rank_normalized: Whether values are replaced by normal scores of their ranks among all draws (the bulk
            ESS, Vehtari et al. 2021, section 4), which is finite for any distribution. ``False`` to look at
            the mean of ``values`` itself, for a Monte Carlo standard error say.

    Returns:
        ESS of each event ``s``, in the dtype of ``values`` if that is of floating point. NaN where a value is
        not finite, and where all are equal: then nothing is known of mixing, for the chains may be stuck.

    Raises:
        TypeError: If ``values`` is no tensor.
        ValueError: If it has no axes of chains and draws, or fewer than 4 draws.

    Example:
        >>> import torch
        >>> from funcbayes import sgmcmc
        >>> walk = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0)).cumsum(1)
        >>> float(sgmcmc.effective_sample_size(walk)) < 20
        True
    """
    return _by_event(_ess, values, rank_normalized, "sgmcmc.effective_sample_size(values)")


def split_r_hat(values: Tensor, *, rank_normalized: bool = True) -> Tensor:
    """Compare the variance between chains, cut into halves, with that within them; 1 if they agree.

    With ``m`` half chains of length ``n``, the mean ``W`` of their variances and the variance ``B / n`` of
    their means,

        R-hat = sqrt(var / W),    var = (n - 1) / n * W + B / n,

    Vehtari et al. (2021), section 3.1, who advise to use draws only if it is below 1.01.

    Args:
        values: Any function of the draws ``(M, T, *s)``, as in :func:`effective_sample_size`.
        rank_normalized: Whether values are replaced by normal scores of their ranks, and so are their
            distances from the median, which shows chains that differ in their scale; the larger of both is
            given (section 4 there). ``False`` for the formula as it stands.

    Returns:
        R-hat of each event ``s``; NaN where a value is not finite and where all are equal, infinite where
        chains do not move and differ.

    Raises:
        TypeError: If ``values`` is no tensor.
        ValueError: If it has no axes of chains and draws, or fewer than 4 draws.

    Example:
        >>> import torch
        >>> from funcbayes import sgmcmc
        >>> draws = torch.randn(4, 500, generator=torch.Generator().manual_seed(0))
        >>> float(sgmcmc.split_r_hat(draws)) < 1.01
        True
        >>> float(sgmcmc.split_r_hat(draws + torch.arange(4)[:, None])) > 1.3
        True
    """
    return _by_event(_r_hat, values, rank_normalized, "sgmcmc.split_r_hat(values)")


def _by_event(
    statistic: Callable[[Tensor, bool], Tensor], values: Any, rank_normalized: bool, call: str
) -> Tensor:
    """Find a statistic of half chains ``(m, n, E)`` for every event, some events at a time."""
    if not isinstance(values, Tensor):
        raise TypeError(
            f"`{call}` should be given a tensor, got {type(values).__name__}. For each leaf of a tree: "
            "`{name: effective_sample_size(leaf) for name, leaf in chains.params.items()}`."
        )
    if values.ndim < 2 or values.shape[0] == 0 or values.shape[1] < 4:
        raise ValueError(
            f"`{call}` should be given values of shape (chains, draws, ...) with at least 4 draws, got shape "
            f"{tuple(values.shape)}."
        )
    event = values.shape[2:]
    flat = values.detach().flatten(2) if event else values.detach().unsqueeze(-1)
    found = [flat.new_empty(0, dtype=torch.float64)]
    for part in flat.split(max(1, _NUMBERS // (flat.shape[0] * flat.shape[1])), -1):
        part = part.double()
        sensible = part.isfinite().all(0).all(0) & (part != part[0, 0]).any(0).any(0)
        part = torch.where(sensible, part, 0.0)
        found.append(torch.where(sensible, statistic(part, rank_normalized), torch.nan))
    dtype = values.dtype if values.is_floating_point() else torch.get_default_dtype()
    return torch.cat(found).reshape(event).to(dtype)


def _ess(values: Tensor, rank_normalized: bool) -> Tensor:
    halves = _halves(_normal_scores(values) if rank_normalized else values)
    m, n = halves.shape[:2]
    covariance = _autocovariance(halves).mean(0) * n / (n - 1)  # (n, E), over chains
    within = covariance[0]
    rho = 1 - (within - covariance) / _variance(within, halves)
    pairs = rho[: n // 2 * 2].unflatten(0, (n // 2, 2)).sum(1)
    # Once one is not positive, the sum is cut off; until then none is larger than those before.
    counts = (pairs > 0).long().cumprod(0)
    tau = -1 + 2 * (pairs.cummin(0).values * counts).sum(0)
    size = m * n
    return size / tau.clamp_min(1 / torch.tensor(size, dtype=tau.dtype).log10())


def _r_hat(values: Tensor, rank_normalized: bool) -> Tensor:
    if not rank_normalized:
        return _plain_r_hat(values)
    median = values.flatten(0, 1).quantile(0.5, 0)
    folded = _plain_r_hat(_normal_scores((values - median).abs()))
    return torch.fmax(
        _plain_r_hat(_normal_scores(values)), folded
    )  # NaN where all are as far from the median


def _plain_r_hat(values: Tensor) -> Tensor:
    halves = _halves(values)
    within = halves.var(1).mean(0)
    return (_variance(within, halves) / within).sqrt()


def _variance(within: Tensor, halves: Tensor) -> Tensor:
    """Of all draws, from the variances within and between half chains."""
    n = halves.shape[1]
    return (n - 1) / n * within + halves.mean(1).var(0)


def _halves(values: Tensor) -> Tensor:
    """``(M, T, E) -> (2 M, T // 2, E)``."""
    n = values.shape[1] // 2
    return torch.cat([values[:, :n], values[:, values.shape[1] - n :]])


def _normal_scores(values: Tensor) -> Tensor:
    """Normal quantiles of ``(rank - 3/8) / (S + 1/4)``, Vehtari et al. (2021), section 4."""
    flat = values.flatten(0, 1).T.contiguous()  # (E, S)
    ordered = flat.sort(-1).values
    # Equal values share the mean of their ranks.
    below = torch.searchsorted(ordered, flat)
    up_to = torch.searchsorted(ordered, flat, right=True)
    ranks = (below + up_to + 1).double() / 2
    scores = torch.special.ndtri((ranks - 0.375) / (flat.shape[-1] + 0.25))
    return scores.T.reshape(values.shape)


def _autocovariance(values: Tensor) -> Tensor:
    """Of each chain ``(m, n, E)`` at every lag, sums divided by ``n``."""
    n = values.shape[1]
    spectrum = torch.fft.rfft(values - values.mean(1, keepdim=True), n=2 * n, dim=1)
    return torch.fft.irfft(spectrum * spectrum.conj(), n=2 * n, dim=1)[:, :n] / n
