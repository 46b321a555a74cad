"""Choosing among members that are there already, by how well they predict held-out rows together.

The negative log likelihood of a mixture needs of each member only the log density of every row: members are
evaluated once, and all search is done on that table.
"""

import math

import torch
from torch import Tensor
from torch.func import vmap

from .._checks import check_model, positive_int
from .._functional import Model
from .._predict import predict
from .._tree import Params, device_of, index
from ..likelihoods import Likelihood
from ..likelihoods._checks import check_is_likelihood
from ..likelihoods._layout import wide
from ..posteriors import Ensemble, Mixture
from ..training._data import Data
from ..training._early_stopping import open_rows


def select(
    fn: Model,
    params: Params,
    ensemble: Ensemble,
    data: Data,
    likelihood: Likelihood,
    num_members: int,
    *,
    with_replacement: bool = True,
    chunk_size: int | None = None,
) -> Ensemble:
    """Build an ensemble step by step from the members that help most.

    Starting from none, every step adds the member with which the equally weighted mixture of all added so
    far has the lowest mean negative log likelihood over ``data`` (Caruana et al. 2004, "Ensemble selection
    from libraries of models", section 2). With replacement a member may be added again, so that weights
    are counts (section 2.1); it is what keeps one poor member from being forced in.

    Args:
        fn: Pure model.
        params: Its parameters; ``None`` if the ensemble covers them all.
        ensemble: Members to choose from; their weights do not enter.
        data: Rows that the members were not trained on: ``(x, y)``, ``x`` any pytree of tensors, or a
            re-iterable of such batches.
        likelihood: ``p(y|f)``.
        num_members: How many are added.
        with_replacement: Whether one member may be added more than once.
        chunk_size: Members evaluated at a time, as for :func:`funcbayes.predict`.

    Returns:
        The chosen members in the order they had, each once, weighted by how often it was added: at most
        ``num_members`` of them. New tensors without a graph.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If ``num_members`` is out of range, or data are empty or do not fit the likelihood.
        RuntimeError: If the log density of a row is NaN.

    Example:
        >>> import torch, funcbayes as fb
        >>> members = fb.Ensemble({"w": torch.tensor([1.0, 5.0, 2.9])})
        >>> x = torch.ones(10)
        >>> chosen = fb.ensemble.select(
        ...     lambda p, x: p["w"] * x, None, members, (x, 3 * x), fb.likelihoods.Normal(1.0), num_members=1
        ... )
        >>> chosen.members["w"]
        tensor([2.9000])
    """
    call = "ensemble.select"
    num_members = positive_int(num_members, f"{call}(num_members=...)")
    _check(fn, ensemble, likelihood, call)
    if not with_replacement:
        _check_at_most(num_members, ensemble, f"{call}(num_members=..., with_replacement=False)")
    table = log_density_table(fn, params, ensemble, data, likelihood, chunk_size=chunk_size, call=call)
    counts = greedy_counts(table, num_members, with_replacement=with_replacement)
    return _chosen(ensemble, counts > 0, counts)


def prune(
    fn: Model,
    params: Params,
    ensemble: Ensemble,
    data: Data,
    likelihood: Likelihood,
    num_members: int,
    *,
    chunk_size: int | None = None,
) -> Ensemble:
    """Drop members one by one, each time the one that is missed least.

    Every step drops the member without which the mixture of the others, their weights divided by their
    sum, has the lowest mean negative log likelihood over ``data``, until ``num_members`` are left: backward
    elimination, where :func:`select` goes forward.

    Args:
        fn: Pure model.
        params: Its parameters; ``None`` if the ensemble covers them all.
        ensemble: Members, with their weights.
        data: As for :func:`select`.
        likelihood: ``p(y|f)``.
        num_members: How many are left.
        chunk_size: As for :func:`select`.

    Returns:
        The members that are left in the order they had, their weights divided by their sum. New tensors
        without a graph.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If ``num_members`` is out of range, or data are empty or do not fit the likelihood.
        RuntimeError: If the log density of a row is NaN.

    Example:
        >>> import torch, funcbayes as fb
        >>> members = fb.Ensemble({"w": torch.tensor([1.0, 5.0, 2.9])})
        >>> x = torch.ones(10)
        >>> left = fb.ensemble.prune(
        ...     lambda p, x: p["w"] * x, None, members, (x, 3 * x), fb.likelihoods.Normal(1.0), num_members=1
        ... )
        >>> left.members["w"]
        tensor([2.9000])
    """
    call = "ensemble.prune"
    num_members = positive_int(num_members, f"{call}(num_members=...)")
    _check(fn, ensemble, likelihood, call)
    _check_at_most(num_members, ensemble, f"{call}(num_members=...)")
    weights = ensemble.weights.detach().cpu().double()
    table = log_density_table(fn, params, ensemble, data, likelihood, chunk_size=chunk_size, call=call)
    kept = backward_kept(table, weights, num_members)
    return _chosen(ensemble, kept, weights)


def log_density_table(
    fn: Model,
    params: Params,
    ensemble: Ensemble,
    data: Data,
    likelihood: Likelihood,
    *,
    chunk_size: int | None,
    call: str,
) -> Tensor:
    """``log p(y_n | f_k(x_n))`` of every member and row, float64 ``(K, N)`` on the CPU."""
    parts = []
    with torch.no_grad():
        for batch in open_rows(data, call, "data").plain_batches(device_of(params, ensemble)):
            x, y = batch.member(0)
            outputs = wide(predict(fn, params, ensemble, x, chunk_size=chunk_size).samples)
            if not parts:
                likelihood.check(outputs[0], y, call=f"{call}(data=...)")
            parts.append(vmap(likelihood.log_prob, in_dims=(0, None))(outputs, y).cpu().double())
    table = torch.cat(parts, 1)
    if bool(table.isnan().any()):
        k, n = table.isnan().nonzero()[0].tolist()
        raise RuntimeError(f"The log density of member {k} in `{call}` is NaN at row {n} of the data.")
    return table


def greedy_counts(log_densities: Tensor, num_steps: int, *, with_replacement: bool) -> Tensor:
    """How often greedy forward selection adds each member.

    Args:
        log_densities: ``(K, N)``.
        num_steps: How many members are added.
        with_replacement: Whether one may be added again.

    Returns:
        Counts ``(K,)``, int64, that sum to ``num_steps``. Of several equally good members the first is added.
    """
    counts = torch.zeros(len(log_densities), dtype=torch.int64)
    total = torch.full_like(log_densities[0], -math.inf)  # log of the sum of the densities added so far
    for _ in range(num_steps):
        sums = torch.logaddexp(total, log_densities)  # (K, N): with each one added
        scores = sums.mean(1)  # but for the log of how many there are, the same for all
        if not with_replacement:
            scores = scores.masked_fill(counts > 0, -math.inf)
            # Where nothing is possible the argmax would be the first, whether it is there or not.
            best = int(scores.argmax()) if bool(scores.isfinite().any()) else int((counts == 0).nonzero()[0])
        else:
            best = int(scores.argmax())
        counts[best] += 1
        total = sums[best]
    return counts


def backward_kept(log_densities: Tensor, weights: Tensor, num_left: int) -> Tensor:
    """Which members are left by backward elimination.

    Args:
        log_densities: ``(K, N)``.
        weights: ``(K,)``, not negative.
        num_left: How many are left.

    Returns:
        Booleans ``(K,)``. Of several equally dispensable members the first is dropped.
    """
    left = list(range(len(log_densities)))
    weights = weights.double()
    while len(left) > num_left:
        of_left = weights[left]
        joint = log_densities[left] + of_left.log()[:, None]
        # The sum of the others, from the sums before and after: subtracting from the whole would cancel.
        nothing = torch.full_like(joint[:1], -math.inf)
        before = torch.cat([nothing, joint[:-1].logcumsumexp(0)])
        after = torch.cat([joint[1:].flip(0).logcumsumexp(0).flip(0), nothing])
        others = torch.stack([of_left[torch.arange(len(left)) != i].sum() for i in range(len(left))])
        scores = torch.logaddexp(before, after).mean(1) - others.log()
        scores = torch.where(others > 0, scores, -math.inf)
        del left[int(scores.argmax())]
    kept = torch.zeros(len(log_densities), dtype=torch.bool)
    kept[left] = True
    return kept


def _chosen(ensemble: Ensemble, kept: Tensor, weights: Tensor) -> Ensemble:
    device = ensemble.weights.device
    with torch.no_grad():
        members = index(ensemble.members, kept.nonzero()[:, 0].to(device))
    return Ensemble(members, weights[kept].double().to(device))


def _check(fn: Model, ensemble: Ensemble, likelihood: Likelihood, call: str) -> None:
    check_model(fn, call)
    if isinstance(ensemble, Mixture):
        raise TypeError(
            f"`{call}(fn, params, ensemble, ...)` should be given an Ensemble, whose members cover the same "
            "leaves, got a Mixture. If its components do, `to_ensemble(posterior, num_samples)` makes an "
            "Ensemble of it; if they do not, choose among the members of one component at a time."
        )
    if not isinstance(ensemble, Ensemble):
        raise TypeError(
            f"`{call}(fn, params, ensemble, ...)` should be given an Ensemble, got "
            f"{type(ensemble).__name__}. Of another posterior, draws are made into one by "
            "`to_ensemble(posterior, num_samples)`."
        )
    check_is_likelihood(likelihood, f"{call}(likelihood=...)")


def _check_at_most(num_members: int, ensemble: Ensemble, quoted: str) -> None:
    if num_members > ensemble.num_members:
        raise ValueError(
            f"`{quoted}` should be at most the number of members, {ensemble.num_members}, got {num_members}."
        )
