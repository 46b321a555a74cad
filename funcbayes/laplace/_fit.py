"""Curvature, prior and posterior in one call."""

from typing import Any, get_args

from torch import Tensor

from .._checks import check_model
from .._random import Seed
from .._tree import Params, Where, index, stack
from ..curvature import Curvature
from ..curvature._curvature import DEFAULT_RANK, Kind, Structure, found_by
from ..curvature._data_term import noise_of
from ..curvature._sums import WeightSharing
from ..likelihoods import Likelihood
from ..posteriors import Gaussian
from ..training._data import Data
from ._posterior import check_numbers, posterior
from ._prior import Numbers, Prior, chosen_leaves
from ._tuning import Per, check_per, maximize_evidence

_CALL = "laplace.fit"


def fit(
    fn: Any,
    params: Params,
    data: Data,
    likelihood: Likelihood,
    *,
    structure: Structure = "kron",
    where: Where | None = None,
    curvature: Kind = "ggn",
    prior_precision: Numbers = 1.0,
    prior_mean: Numbers = 0.0,
    prior: Gaussian | None = None,
    noise_std: float | Tensor | None = None,
    temperature: float | Tensor = 1.0,
    linearized: bool = True,
    tune: Per | None = None,
    stacked: bool = False,
    weight_sharing: WeightSharing = "expand",
    eigenvalue_correction: bool = False,
    mc_samples: int = 1,
    rank: int = DEFAULT_RANK,
    seed: Seed | None = None,
    batch_size: int | None = None,
    max_bytes: int | None = None,
    progress: bool = False,
) -> Gaussian:
    """Fit a Laplace approximation to a trained network: its curvature on the data, and a prior.

    In steps, which can be taken one by one to keep the curvature: ``c = curvature.ggn(fn, params, ...)``,
    then ``maximize_evidence(params, c)`` and ``posterior(params, c, prior_precision)``.

    Args:
        fn: Pure model.
        params: The mode: a network that was trained with the prior, as by
            ``training.fit(prior_precision=...)``.
        data: The training data, as for :func:`funcbayes.curvature.ggn`.
        likelihood: ``p(y|f)``.
        structure: ``"diag"``, ``"kron"``, ``"low_rank"`` or ``"full"``.
        where: Which leaves are uncertain: ``"head.*"`` for a last layer, ``"*lora*"``; ``None`` for all. The
            posterior is that of the chosen leaves with the others held. Single parameters are chosen by
            :func:`funcbayes.laplace.subnetwork`.
        curvature: Which one, a function of :mod:`funcbayes.curvature`. With ``"hessian"`` the Gaussian is
            that of the network itself, which ``linearized=False`` says.
        prior_precision: As for :func:`posterior`; with ``tune`` the start.
        prior_mean: As for :func:`posterior`.
        prior: As for :func:`posterior`.
        noise_std: As for :func:`posterior`.
        temperature: As for :func:`posterior`.
        linearized: As for :func:`posterior`.
        tune: Whether to choose the prior precision by evidence: one for the ``"model"``, for each ``"leaf"``,
            or for each ``"parameter"``. The noise stays that of the likelihood, with which predictions are
            made, too.
        stacked: Whether ``params`` are those of several networks, every leaf with a leading axis ``K``: the
            members of an ensemble. Their curvatures are found in one pass over the data.
        weight_sharing: As for :func:`funcbayes.curvature.ggn`.
        eigenvalue_correction: As for :func:`funcbayes.curvature.ggn`.
        mc_samples: As for :func:`funcbayes.curvature.fisher`.
        rank: As for :func:`funcbayes.curvature.ggn`.
        seed: As for :func:`funcbayes.curvature.ggn`, and of the targets that ``"fisher"`` draws.
        batch_size: As for :func:`funcbayes.curvature.ggn`.
        max_bytes: As for :func:`funcbayes.curvature.ggn`.
        progress: As for :func:`funcbayes.curvature.ggn`.

    Returns:
        The posterior. With ``stacked`` every leaf has a leading axis ``K``: ``mixture(posterior,
        stacked=True)`` is the mixture of Laplace approximations (Eschenhagen et al. 2021, "Mixtures of
        Laplace approximations for improved post-hoc uncertainty in deep learning"). With ``where`` too, each
        goes with its own network: ``mixture(join(posterior, Point(held)), stacked=True)``, where ``held``
        are the other leaves of ``params``. What one Gaussian has is found for each of a stack by ``vmap``:
        ``torch.vmap(lambda q: q.variance)(posterior)``.

    Raises:
        TypeError: As for :func:`funcbayes.curvature.ggn` and :func:`posterior`.
        ValueError: Likewise.
        RuntimeError: Likewise.

    Example:
        >>> import torch, funcbayes as fb
        >>> fn, params = fb.make_functional(torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Linear(8, 3)))
        >>> data = (torch.randn(20, 2), torch.randint(0, 3, (20,)))
        >>> q = fb.laplace.fit(fn, params, data, fb.likelihoods.Categorical(), where="1.*", tune="model")
        >>> sorted(q.mean)
        ['1.bias', '1.weight']
        >>> fb.predict(fn, params, q, torch.randn(5, 2), likelihood=fb.likelihoods.Categorical()).mean.shape
        torch.Size([5, 3])
    """
    check_model(fn, _CALL)
    if curvature not in get_args(Kind):
        raise ValueError(
            f"`{_CALL}(curvature=...)` should be 'ggn', 'fisher', 'empirical_fisher' or 'hessian', got "
            f"{curvature!r}."
        )
    if tune is not None:
        check_per(tune, f"{_CALL}(tune=...)", is_kronecker=structure == "kron")
    if tune is not None and prior is not None:
        raise ValueError(
            f"`{_CALL}(tune={tune!r})` tunes a prior precision, and `prior` has one: leave one out."
        )
    _check_beforehand(
        *(params, where, likelihood, structure, prior_precision, prior_mean, prior, noise_std, temperature),
        stacked=stacked,
    )
    if curvature == "hessian" and eigenvalue_correction:
        raise ValueError(f"`{_CALL}(curvature='hessian')` has no Kronecker eigenbasis to correct.")
    if curvature != "fisher" and mc_samples != 1:
        raise ValueError(
            f"`{_CALL}(mc_samples=...)` goes with `curvature='fisher'`, which draws targets, got "
            f"{curvature!r}: leave it out."
        )
    c = found_by(
        *(curvature, fn, params, data, likelihood, structure, where),
        call=_CALL,
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

    def of_one(params: Params, c: Curvature) -> Gaussian:
        chosen = prior_precision
        if tune is not None:
            chosen = maximize_evidence(
                *(params, c),
                per=tune,
                prior_precision=prior_precision,
                prior_mean=prior_mean,
                noise_std=noise_std,
                tune_noise=False,
                temperature=temperature,
            ).prior_precision
        return posterior(params, c, chosen, prior_mean, prior, noise_std, temperature, linearized)

    if not stacked:
        return of_one(params, c)
    count = len(c.data.num_data)
    return stack([of_one(index(params, k), index(c, k)) for k in range(count)])


def _check_beforehand(
    params: Params,
    where: Where | None,
    likelihood: Likelihood,
    structure: Structure,
    prior_precision: Numbers,
    prior_mean: Numbers,
    prior: Gaussian | None,
    noise_std: float | Tensor | None,
    temperature: float | Tensor,
    *,
    stacked: bool,
) -> None:
    """Refuse a prior and numbers that no curvature goes with, before one is found."""
    check_numbers(noise_std, temperature, has_noise=noise_of(likelihood) is not None, call=_CALL)
    leaves = chosen_leaves(params, where)
    if not leaves or (stacked and not all(leaf.ndim for leaf in leaves.values())):
        return  # which is refused with the data
    leaves = {name: leaf[0] if stacked else leaf for name, leaf in leaves.items()}
    Prior.of(leaves, prior_precision, prior_mean, prior, _CALL).check_goes_with(structure, _CALL)
