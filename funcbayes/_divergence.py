"""Divergences between posteriors."""

import torch
from torch import Tensor

from ._tree import difference, parameters_of
from .covariances import Diagonal, Kronecker
from .covariances._flat import dtype_of, ravel
from .covariances._operator import trace_of_product
from .posteriors import Gaussian, Join, Posterior, join, restrict, to
from .posteriors._interface import covered_leaves


def kl(q: Posterior, p: Posterior) -> Tensor:
    """Kullback-Leibler divergence ``KL(q || p)`` in closed form, in nats, summed over all parameters.

    ``1/2 [tr(S_p^-1 S_q) + (m_p - m_q)^T S_p^-1 (m_p - m_q) - P + logdet S_p - logdet S_q]``, for Gaussians
    with covariances of any structures (Kullback 1959, section 9.1). If ``p`` is a join of Gaussians ``p_a``,
    ``sum_a [KL(q_a || p_a) + H(q_a)] - H(q)``, with marginals ``q_a`` and entropies ``H``. A join for ``q``
    needs a ``p`` that is independent between the same parts, too.

    Args:
        q: The approximation, say.
        p: The prior, say; over the same leaves.

    Returns:
        A scalar, differentiable in the tensors of both.

    Raises:
        TypeError: If one of them is no posterior.
        NotImplementedError: If one of them is neither a ``Gaussian`` nor a join of such, or ``q`` is a join
            and ``p`` has correlations between its parts.
        ValueError: If their leaves differ, or a covariance has no inverse.

    Example:
        >>> import torch, funcbayes as fb
        >>> mean, variance = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
        >>> q = fb.Gaussian(mean, fb.covariances.Diagonal(variance))
        >>> fb.kl(q, fb.Gaussian({"w": torch.ones(2)}, q.covariance))
        tensor(1.)
    """
    for posterior in (q, p):
        if not isinstance(posterior, Posterior):
            raise TypeError(f"`kl(q, p)` should be given two posteriors, got {type(posterior).__name__}.")
    q, p = _uncertain(q), _uncertain(p)
    if isinstance(q, Join) and isinstance(p, Gaussian) and isinstance(p.covariance, Diagonal | Kronecker):
        p = join(*_marginals(p, q))  # no leaf of it tells of another
    if isinstance(p, Join):
        return _kl_from_join(q, p)
    if not isinstance(q, Gaussian) or not isinstance(p, Gaussian):
        raise NotImplementedError(
            f"`kl(q, p)` has no closed form for {type(q).__name__} and {type(p).__name__}. Monte Carlo: "
            "average `q.log_prob(draw) - p.log_prob(draw)` over draws of `q`, where both have densities."
        )
    q_mean, p_mean = parameters_of(q.mean), parameters_of(p.mean)
    differing = difference(q_mean, p_mean)
    if differing:
        raise ValueError(f"`kl(q, p)` should have posteriors over the same leaves; in `q` {differing}.")
    if list(q_mean) != list(p_mean):
        raise ValueError(
            "`kl(q, p)` should have trees of one structure; their leaves are ordered differently."
        )
    dtype = dtype_of({"q": q_mean, "p": p_mean})
    q, p = to(q, dtype=dtype), to(p, dtype=dtype)
    precision = p.covariance.inverse()
    shift = ravel({name: p_mean[name] - leaf for name, leaf in q_mean.items()}, p.covariance.like).unsqueeze(
        -1
    )
    trace = trace_of_product(precision, q.covariance.operator())
    logdets = precision.logdet() - q.covariance.inverse().logdet()
    return (0.5 * (trace + precision.quadratic(shift) - len(shift) - logdets)).to(dtype)


def _kl_from_join(q: Posterior, p: Join) -> Tensor:
    if not isinstance(q, Gaussian | Join):
        raise NotImplementedError(f"`kl(q, p)` has no closed form for {type(q).__name__} and a Join.")
    differing = difference(_parameters(q), _parameters(p))
    if differing:
        raise ValueError(f"`kl(q, p)` should have posteriors over the same leaves; in `q` {differing}.")
    marginals = _marginals(q, p)
    terms = [kl(one, other) + _entropy(one) for one, other in zip(marginals, p.parts, strict=True)]
    return torch.stack(terms).sum() - _entropy(q)


def _marginals(posterior: Posterior, like: Join) -> list[Posterior]:
    """Marginals over the parameters of each part of ``like``."""
    of_parts = [set(_parameters(part)) for part in like.parts]
    return [restrict(posterior, lambda name, _, own=own: name in own) for own in of_parts]


def _entropy(posterior: Posterior) -> Tensor:
    parts = posterior.parts if isinstance(posterior, Join) else (posterior,)
    return torch.stack([part.entropy() for part in parts if isinstance(part, Gaussian)]).sum()


def _uncertain(posterior: Posterior) -> Posterior:
    """A join of Gaussians without the parts that only hold values which every draw has."""
    if not isinstance(posterior, Join):
        return posterior
    parts = [p for p in posterior.parts if _parameters(p) or any(form.effects for form in p.forms())]
    for part in parts:
        if not isinstance(part, Gaussian):
            raise NotImplementedError(f"`kl(q, p)` has no closed form for a {type(part).__name__} in a Join.")
    return join(*parts) if parts else posterior


def _parameters(posterior: Posterior) -> dict[str, Tensor]:
    return parameters_of(covered_leaves(posterior))
