"""How good predictions are: scores of a :class:`~funcbayes.Prediction` against what was observed.

All are pure functions that return a scalar tensor in the dtype of what they are given, at least
float32: a metric is read at its third digit, which bfloat16 does not have. ``diversity``, ``disagreement``
and ``pairwise_kl`` need no observations and return one number a row, ``(N,)``.

**Classes.** ``accuracy``, ``brier`` and ``ece`` take a prediction made with a ``Categorical`` or
``Bernoulli`` likelihood, or a tensor of class probabilities: ``(N, C)``, or dense ``(N, *positions)``
with a class axis among them. Every label that is not ignored counts the same, so dense outputs are
averaged over rows and positions. Each label of a ``Bernoulli`` is a choice between two classes.
"""

from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from ._prediction import Prediction
from .likelihoods import Bernoulli, Categorical
from .likelihoods._checks import check_finite, check_targets
from .likelihoods._layout import wide


def nll(prediction: Prediction, y: Tensor) -> Tensor:
    """Negative log predictive density in nats, averaged over rows; lower is better.

    ``-(1/N) sum_n log sum_s w_s p(y_n | f_s(x_n))``: of the mixture over draws, so that disagreement
    between draws is in it. Outputs and positions of a row are summed inside each draw, ignored labels
    adding 0; this is the joint density of a row, not a mean over its positions.

    Args:
        prediction: Made with a likelihood.
        y: Targets as the likelihood takes them, ``N`` rows.

    Raises:
        TypeError: If ``prediction`` is not a ``Prediction``.
        ValueError: If there are no rows, or ``y`` does not fit the likelihood.

    Example:
        >>> import torch, funcbayes as fb
        >>> from funcbayes import metrics
        >>> posterior = fb.Ensemble({"w": torch.tensor([0.0, 2.0])})
        >>> y = torch.zeros(3)
        >>> prediction = fb.predict(
        ...     lambda p, x: p["w"] * x, None, posterior, torch.ones(3), likelihood=fb.likelihoods.Normal(1.0)
        ... )
        >>> metrics.nll(prediction, y)
        tensor(1.4852)
    """
    if not isinstance(prediction, Prediction):
        hint = " For class probabilities: `torch.nn.functional.nll_loss(probs.log(), y)`."
        raise TypeError(
            "`nll(prediction, y)` should be given what `predict(..., likelihood=...)` returns, got "
            f"{type(prediction).__name__}.{hint if isinstance(prediction, Tensor) else ''}"
        )
    log_prob = prediction.log_prob(y)
    _check_not_empty(log_prob, "nll(prediction, y)")
    return -wide(log_prob).mean()


def accuracy(
    prediction: Prediction | Tensor,
    y: Tensor,
    *,
    class_axis: int | None = None,
    ignore_index: int | None = None,
) -> Tensor:
    """Share of labels that have the highest probability; the first of several that share it.

    Args:
        prediction: Prediction over classes, or class probabilities ``(N, C)`` or ``(N, *positions)``.
        y: Labels, integers in the shape of the probabilities without the class axis; for ``Bernoulli``
            0 or 1 in the shape of the outputs.
        class_axis: Axis of the classes in a tensor, -1 if not given; a prediction knows its own.
        ignore_index: Label that does not count, for a tensor, -100 if not given; a prediction knows its own.

    Raises:
        TypeError: If ``prediction`` or ``y`` is of the wrong kind.
        ValueError: If shapes do not fit, probabilities do not sum to 1, or no label counts.

    Example:
        >>> import torch
        >>> from funcbayes import metrics
        >>> probs = torch.tensor([[0.6, 0.4], [0.1, 0.9]])
        >>> metrics.accuracy(probs, torch.tensor([0, 0]))
        tensor(0.5000)
    """
    # Not torchmetrics: it counts in float32, and averages over classes unless told otherwise.
    probs, labels = _counted(prediction, y, class_axis, ignore_index, "accuracy(prediction, y)")
    return (probs.argmax(-1) == labels).to(probs.dtype).mean()


def brier(
    prediction: Prediction | Tensor,
    y: Tensor,
    *,
    class_axis: int | None = None,
    ignore_index: int | None = None,
) -> Tensor:
    """Brier score, ``(1/N) sum_n sum_c (p_nc - 1[y_n = c])^2``, from 0 (best) to 2.

    Summed over classes, as Brier (1950, "Verification of forecasts expressed in terms of probability")
    defines it. For two classes this is twice the ``(p - y)^2`` that others report, scikit-learn's
    ``brier_score_loss`` for binary labels among them; that holds for ``Bernoulli`` too.

    Args:
        prediction: As for :func:`accuracy`.
        y: As for :func:`accuracy`.
        class_axis: As for :func:`accuracy`.
        ignore_index: As for :func:`accuracy`.

    Raises:
        TypeError: As :func:`accuracy`.
        ValueError: As :func:`accuracy`.

    Example:
        >>> import torch
        >>> from funcbayes import metrics
        >>> metrics.brier(torch.tensor([[0.75, 0.25]]), torch.tensor([0]))
        tensor(0.1250)
    """
    probs, labels = _counted(prediction, y, class_axis, ignore_index, "brier(prediction, y)")
    observed = torch.nn.functional.one_hot(labels, probs.shape[-1])
    return (probs - observed).square().sum(-1).mean()


def ece(
    prediction: Prediction | Tensor,
    y: Tensor,
    num_bins: int = 15,
    *,
    class_axis: int | None = None,
    ignore_index: int | None = None,
) -> Tensor:
    """Expected calibration error of the top label, ``sum_b (n_b / N) |accuracy_b - confidence_b|``.

    The confidence is the highest probability, in bins of equal width that are open below and closed
    above, ``(b/B, (b+1)/B]``: Guo et al. (2017), section 2, https://arxiv.org/abs/1706.04599. It depends
    on ``num_bins``, and is biased upwards for few rows.

    Args:
        prediction: As for :func:`accuracy`.
        y: As for :func:`accuracy`.
        num_bins: ``B``, at least 1.
        class_axis: As for :func:`accuracy`.
        ignore_index: As for :func:`accuracy`.

    Raises:
        TypeError: As :func:`accuracy`.
        ValueError: As :func:`accuracy`, or if ``num_bins`` is not an int of at least 1.

    Example:
        >>> import torch
        >>> from funcbayes import metrics
        >>> probs = torch.tensor([[0.7, 0.3], [0.7, 0.3]])
        >>> metrics.ece(probs, torch.tensor([0, 1]))
        tensor(0.2000)
    """
    if not isinstance(num_bins, int) or isinstance(num_bins, bool) or num_bins < 1:
        raise ValueError(f"`ece(num_bins=...)` should be an int of at least 1, got {num_bins!r}.")
    # Not torchmetrics: it computes in float32, closes bins below, and for two classes uses p(y = 1)
    # where the top label is meant.
    probs, labels = _counted(prediction, y, class_axis, ignore_index, "ece(prediction, y)")
    confidence = probs.amax(-1)
    # Divided, not `linspace`: each edge is then the number nearest to b/B, and 0.2 is on the edge 3/15.
    edges = torch.arange(1, num_bins, dtype=probs.dtype, device=probs.device) / num_bins
    bins = torch.bucketize(confidence.detach(), edges)
    # n_b |accuracy_b - confidence_b| is the sum of these over the bin; empty bins need no care.
    gaps = (probs.argmax(-1) == labels).to(probs.dtype) - confidence
    sums = [torch.where(bins == b, gaps, 0).sum() for b in range(num_bins)]
    return torch.stack(sums).abs().sum() / len(labels)


def rmse(prediction: Prediction | Tensor, y: Tensor) -> Tensor:
    """Root mean squared error of the predictive mean, over all rows and outputs, in the units of ``y``.

    Args:
        prediction: A prediction, or a tensor of means ``(N, ...)``.
        y: Targets in exactly the shape of the mean.

    Raises:
        TypeError: If ``prediction`` or ``y`` is of the wrong kind.
        ValueError: If shapes differ, even where they would broadcast; if there are no rows, or ``y`` is
            not finite.

    Example:
        >>> import torch
        >>> from funcbayes import metrics
        >>> metrics.rmse(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
        tensor(1.4142)
    """
    call = "rmse(prediction, y)"
    mean = prediction.mean if isinstance(prediction, Prediction) else prediction
    if not isinstance(mean, Tensor) or not mean.is_floating_point():
        raise TypeError(
            f"`{call}` should be given a `Prediction` or a floating-point tensor of means, got {_kind(mean)}."
        )
    check_targets(y, mean.shape, mean, call)
    check_finite(y, call)
    _check_not_empty(y, call)
    from torchmetrics.functional import mean_squared_error  # here: importing it takes longer than torch

    # Wide, because torchmetrics sums in the dtype it is given.
    mean = wide(mean)
    return mean_squared_error(mean, y.to(mean.dtype), squared=False)


def ood_auroc(scores_in: Tensor, scores_out: Tensor) -> Tensor:
    """Area under the ROC curve of telling out-of-distribution rows by their score.

    The probability that a row from outside has a higher score than one from inside, ties counting half:
    0.5 for a score that says nothing, 1 for one that separates (Hanley & McNeil 1982; Hendrycks & Gimpel
    2017, https://arxiv.org/abs/1610.02136).

    Args:
        scores_in: Scores of rows inside the distribution, ``(N,)``; **higher means further outside**, as
            for ``prediction.entropy`` or ``prediction.mutual_information``. Negate a confidence.
        scores_out: Scores of rows outside of it, ``(M,)``.

    Raises:
        TypeError: If scores are not tensors of real numbers.
        ValueError: If scores are not one number a row, NaN, or none at all.

    Example:
        >>> import torch
        >>> from funcbayes import metrics
        >>> metrics.ood_auroc(torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.2, 0.9]))
        tensor(0.7500)
    """
    _check_scores(scores_in, "scores_in")
    _check_scores(scores_out, "scores_out")
    # Not torchmetrics: it puts scores outside [0, 1] through a sigmoid in float32, which ties 20 with 30.
    # The Mann-Whitney statistic is the same area; twice of it is an integer, so nothing is rounded.
    scores = torch.cat([scores_in.detach(), scores_out.detach()])
    _, place, count = torch.unique(scores, return_inverse=True, return_counts=True)
    twice_rank = 2 * count.cumsum(0) - count + 1  # ranks from 1; ties share the mean of theirs
    num_in, num_out = len(scores_in), len(scores_out)
    twice_wins = twice_rank[place[num_in:]].sum() - num_out * (num_out + 1)
    dtype = torch.promote_types(scores.dtype, torch.float32)
    return twice_wins.to(dtype) / (2 * num_in * num_out)


def diversity(prediction: Prediction) -> Tensor:
    """Variance over draws of each draw's predictive mean, averaged over the outputs of a row: ``(N,)``.

    The average of ``prediction.epistemic_variance``, with its denominator:
    ``sum_s w_s (m_s - m)^2 / (1 - sum_s w_s^2)``, unbiased for equal weights and 0 for a single atom. For
    classes the outputs are all class probabilities; positions are averaged over, too.

    Args:
        prediction: Any prediction; without a likelihood the means are the raw outputs.

    Raises:
        TypeError: If ``prediction`` is not a ``Prediction``.

    Example:
        >>> import torch, funcbayes as fb
        >>> from funcbayes import metrics
        >>> posterior = fb.Ensemble({"w": torch.tensor([0.0, 2.0])})
        >>> metrics.diversity(fb.predict(lambda p, x: p["w"] * x, None, posterior, torch.ones(3)))
        tensor([2., 2., 2.])
    """
    _check_is_prediction(prediction, "diversity(prediction)")
    return _mean_of_rows(wide(prediction.epistemic_variance))


def disagreement(prediction: Prediction) -> Tensor:
    """Probability that two different draws predict different classes, ``(N,)``.

    ``(1 - sum_c W_c^2) / (1 - sum_s w_s^2)``, with ``W_c`` the weight of the draws whose most probable class
    is ``c``: two draws are taken by their weights, until they are not the same one. For equal weights it is
    the share of pairs that disagree (Fort et al. 2019, "Deep ensembles: a loss landscape perspective",
    https://arxiv.org/abs/1912.02757); 0 for a single atom. Of several classes that share the highest
    probability the first is predicted. Positions, and the labels of a ``Bernoulli``, are averaged over.

    Args:
        prediction: Made with a ``Categorical`` or ``Bernoulli`` likelihood, with its samples kept.

    Raises:
        TypeError: If ``prediction`` is not a ``Prediction``.
        ValueError: If it is not one over classes.
        RuntimeError: If samples were not kept.

    Example:
        >>> import torch, funcbayes as fb
        >>> from funcbayes import metrics
        >>> logits = torch.tensor([[[2.0, 0.0]], [[3.0, 0.0]], [[0.0, 1.0]]])
        >>> prediction = fb.predict(
        ...     lambda p, x: p["f"],
        ...     None,
        ...     fb.Ensemble({"f": logits}),
        ...     torch.zeros(1),
        ...     likelihood=fb.likelihoods.Categorical(),
        ... )
        >>> metrics.disagreement(prediction)
        tensor([0.6667])
    """
    log_probs = _log_probs_of_draws(prediction, "disagreement(prediction)")
    weights = prediction.weights.to(log_probs)
    labels = log_probs.argmax(-1)
    shares = torch.zeros(log_probs.shape[1:], dtype=log_probs.dtype, device=log_probs.device)
    # Draw by draw, for one-hot labels of all draws would take as much memory as the probabilities.
    for weight, label in zip(weights, labels, strict=True):
        shares = shares.scatter_add(-1, label.unsqueeze(-1), weight.expand_as(label.unsqueeze(-1)))
    # 1 - sum W^2 = sum W (1 - W) does not cancel where almost all agree.
    return _mean_of_rows(_over_pairs((shares * (1 - shares)).clamp_min(0).sum(-1), weights))


def pairwise_kl(prediction: Prediction) -> Tensor:
    """Mean Kullback-Leibler divergence between the class probabilities of two different draws, ``(N,)``.

    ``sum_{s != t} w_s w_t KL(p_s || p_t) / (1 - sum_s w_s^2)``, over both orders of each pair; 0 for a single
    atom, infinite where a draw rules out a class that another does not; in nats. Positions, and the labels
    of a ``Bernoulli``, are averaged over. It is at least the ``mutual_information``, which compares
    each draw with their mixture.

    Args:
        prediction: As for :func:`disagreement`.

    Raises:
        TypeError: As :func:`disagreement`.
        ValueError: As :func:`disagreement`.
        RuntimeError: As :func:`disagreement`.

    Example:
        >>> import torch, funcbayes as fb
        >>> from funcbayes import metrics
        >>> probs = torch.tensor([[[0.5, 0.5]], [[0.8, 0.2]]])
        >>> prediction = fb.predict(
        ...     lambda p, x: p["f"].log(),
        ...     None,
        ...     fb.Ensemble({"f": probs}),
        ...     torch.zeros(1),
        ...     likelihood=fb.likelihoods.Categorical(),
        ... )
        >>> metrics.pairwise_kl(prediction)
        tensor([0.2079])
    """
    log_probs = _log_probs_of_draws(prediction, "pairwise_kl(prediction)")
    weights = prediction.weights.to(log_probs)
    has_weight = weights > 0
    log_probs, weights = log_probs[has_weight], weights[has_weight]
    # The sum over t is linear in log p_t, so the pairs need no loop: KL of each draw from the (unnormalised)
    # geometric mean of all.
    average = torch.tensordot(weights, log_probs, 1)
    probs = log_probs.exp()
    terms = torch.where(probs > 0, probs * (log_probs - average), 0)
    return _mean_of_rows(_over_pairs(torch.tensordot(weights, terms, 1).sum(-1).clamp_min(0), weights))


def _check_is_prediction(prediction: Any, call: str) -> None:
    if not isinstance(prediction, Prediction):
        raise TypeError(f"`{call}` should be given what `predict(...)` returns, got {_kind(prediction)}.")


def _log_probs_of_draws(prediction: Prediction, call: str) -> Tensor:
    """Log class probabilities of each draw, ``(S, N, *positions, C)``."""
    _check_is_prediction(prediction, call)
    likelihood = _likelihood(prediction, None, None, call)
    log_probs = vmap(likelihood.log_class_probs)(wide(prediction.samples))
    if isinstance(likelihood, Bernoulli):
        return log_probs
    return log_probs.movedim(likelihood.class_axis + (likelihood.class_axis > 0), -1)


def _over_pairs(sums: Tensor, weights: Tensor) -> Tensor:
    """Sums over all pairs of draws as means over the pairs of different ones; 0 if there are none."""
    spread = (weights * (1 - weights)).sum()
    return torch.where(spread > 0, sums / spread.where(spread > 0, 1.0), 0.0)


def _mean_of_rows(values: Tensor) -> Tensor:
    """Average over all axes but that of rows."""
    return values if values.ndim == 1 else values.flatten(1).mean(1)


def _counted(
    prediction: Prediction | Tensor, y: Tensor, class_axis: int | None, ignore_index: int | None, call: str
) -> tuple[Tensor, Tensor]:
    """Class probabilities ``(M, C)`` and labels ``(M,)`` of all that counts, checked."""
    likelihood = _likelihood(prediction, class_axis, ignore_index, call)
    given = prediction.mean if isinstance(prediction, Prediction) else prediction
    likelihood.check(given, y, call=call)
    labels = y.long().flatten()
    if isinstance(likelihood, Bernoulli):
        of_one = wide(given).flatten()
        probs, counts = torch.stack([1 - of_one, of_one], -1), torch.ones_like(labels, dtype=torch.bool)
    else:
        probs = wide(given).movedim(likelihood.class_axis, -1).flatten(0, -2)
        counts = labels != likelihood.ignore_index
    _check_probs(probs, given.dtype, call)
    if not bool(counts.all()):
        probs, labels = probs[counts], labels[counts]
    _check_not_empty(labels, call)
    return probs, labels


def _likelihood(
    prediction: Prediction | Tensor, class_axis: int | None, ignore_index: int | None, call: str
) -> Categorical | Bernoulli:
    """What says where the classes are and which labels count."""
    if isinstance(prediction, Prediction):
        likelihood = prediction.likelihood
        if not isinstance(likelihood, Categorical | Bernoulli):
            raise ValueError(
                f"`{call}` should be given a prediction over classes, got one with likelihood "
                f"{likelihood!r}. Write `predict(..., likelihood=likelihoods.Categorical())`."
            )
        if class_axis is not None or ignore_index is not None:
            raise ValueError(
                f"`{call}` takes `class_axis` and `ignore_index` with a tensor of probabilities; a "
                f"prediction has them from its likelihood, here {likelihood!r}. Leave them out."
            )
        return likelihood
    if not isinstance(prediction, Tensor) or not prediction.is_floating_point():
        raise TypeError(
            f"`{call}` should be given a `Prediction` or a tensor of class probabilities, got "
            f"{_kind(prediction)}."
        )
    if prediction.ndim < 2:
        raise ValueError(
            f"`{call}` should be given class probabilities (N, C), got shape {tuple(prediction.shape)}. "
            "For probabilities `p` of label 1: `torch.stack([1 - p, p], -1)`."
        )
    return Categorical(
        class_axis=-1 if class_axis is None else class_axis,
        ignore_index=-100 if ignore_index is None else ignore_index,
    )


def _check_probs(probs: Tensor, source: torch.dtype, call: str) -> None:
    """Refuse what are no distributions over the last axis; ``source`` is the dtype they came in."""
    sums = probs.detach().sum(-1)
    if not bool(sums.isfinite().all()):
        raise ValueError(f"`{call}` should be given finite probabilities, got NaN or infinity.")
    # Rounding each probability moves the sum by less than eps. The floor leaves room for probabilities
    # that were computed in float32, or printed, and are float64 now.
    tolerance = max(4 * torch.finfo(source).eps, 1e-4)
    if not probs.numel() or bool((probs >= 0).all() & ((sums - 1).abs() <= tolerance).all()):
        return
    furthest = sums[(sums - 1).abs().argmax()]
    raise ValueError(
        f"`{call}` should be given probabilities, not negative and with a sum of 1 over the class axis, got "
        f"a smallest one of {probs.detach().min():.3g} and a sum of {furthest:.3g}. If these are logits: "
        "`logits.softmax(class_axis)`."
    )


def _check_scores(scores: Tensor, name: str) -> None:
    call = "ood_auroc(scores_in, scores_out)"
    if not isinstance(scores, Tensor) or scores.is_complex():
        raise TypeError(f"`{name}` in `{call}` should be a tensor of real numbers, got {_kind(scores)}.")
    if scores.ndim != 1:
        raise ValueError(
            f"`{name}` in `{call}` should have shape (N,), one score a row, got {tuple(scores.shape)}. "
            "For a score at each position: `.flatten()`."
        )
    _check_not_empty(scores, call)
    if bool(scores.isnan().any()):
        raise ValueError(f"`{name}` in `{call}` should be numbers, got NaN.")


def _check_not_empty(values: Tensor, call: str) -> None:
    if not values.numel():
        raise ValueError(f"`{call}` should have at least one row with a label that counts, got none.")


def _kind(value: Any) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
