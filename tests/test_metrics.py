import math
import re
import subprocess
import sys

import pytest
import torch
from sklearn.metrics import brier_score_loss, roc_auc_score, root_mean_squared_error
from torch.testing import assert_close

import funcbayes as fb
from funcbayes import metrics
from funcbayes.likelihoods import Bernoulli, Categorical, Normal, Poisson

F64 = torch.float64


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=F64)


def labels(num_classes, *shape, seed=1):
    return torch.randint(num_classes, shape, generator=seeded(seed))


def scalar(value, dtype=F64):
    return torch.tensor(value, dtype=dtype)


def outputs_at_draws(outputs, likelihood, weights=None, **options):
    """Prediction whose draws have the given outputs (S, N, ...)."""
    posterior = fb.Ensemble({"f": outputs}, weights)
    rows = torch.zeros(outputs.shape[1])
    return fb.predict(lambda p, x: p["f"], None, posterior, rows, likelihood=likelihood, **options)


# Naive references: one label at a time, in Python's floats.


def counted(probs, y, class_axis, ignore_index=-100):
    rows = probs.double().movedim(class_axis, -1).reshape(-1, probs.shape[class_axis]).tolist()
    return [(p, label) for p, label in zip(rows, y.flatten().tolist(), strict=True) if label != ignore_index]


def naive_accuracy(pairs):
    return sum(p.index(max(p)) == label for p, label in pairs) / len(pairs)


def naive_brier(pairs):
    return sum(sum((q - (c == label)) ** 2 for c, q in enumerate(p)) for p, label in pairs) / len(pairs)


def naive_ece(pairs, num_bins):
    error = 0.0
    for b in range(num_bins):
        inside = [(p, y) for p, y in pairs if b / num_bins < max(p) <= (b + 1) / num_bins]
        if inside:
            share = sum(p.index(max(p)) == y for p, y in inside) / len(inside)
            confidence = sum(max(p) for p, _ in inside) / len(inside)
            error += len(inside) / len(pairs) * abs(share - confidence)
    return error


def naive_auroc(scores_in, scores_out):
    wins = sum((o > i) + 0.5 * (o == i) for i in scores_in.tolist() for o in scores_out.tolist())
    return wins / (len(scores_in) * len(scores_out))


OF_CLASSES = {"accuracy": metrics.accuracy, "brier": metrics.brier, "ece": metrics.ece}
NAIVE = {"accuracy": naive_accuracy, "brier": naive_brier, "ece": lambda pairs: naive_ece(pairs, 15)}
of_classes = pytest.mark.parametrize("name", OF_CLASSES)


def with_ignored(y, ignore_index):
    y = y.clone()
    y.view(-1)[::3] = ignore_index
    return y


LAYOUTS = {
    "rows": lambda: (randn(40, 5), labels(5, 40), -1, -100),
    "two classes": lambda: (randn(40, 2), labels(2, 40), -1, -100),
    "one class": lambda: (randn(4, 1), labels(1, 4), -1, -100),
    "ignored rows": lambda: (randn(40, 5), with_ignored(labels(5, 40), -100), -1, -100),
    "tokens": lambda: (randn(6, 7, 4), with_ignored(labels(4, 6, 7), -1), -1, -1),
    "images": lambda: (randn(3, 4, 5, 6), with_ignored(labels(4, 3, 5, 6), 255), 1, 255),
    "a class ignored": lambda: (randn(3, 4, 5), labels(4, 3, 5), -2, 0),
}
layouts = pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS.keys())


@of_classes
@layouts
def test_metrics_of_probabilities_equal_a_loop_over_labels(name, make):
    logits, y, class_axis, ignore_index = make()
    probs = (3 * logits).softmax(class_axis)
    got = OF_CLASSES[name](probs, y, class_axis=class_axis, ignore_index=ignore_index)
    assert_close(got, scalar(NAIVE[name](counted(probs, y, class_axis, ignore_index))))


@of_classes
@layouts
def test_metrics_of_a_prediction_use_the_mean_over_draws_and_the_layout_of_its_likelihood(name, make):
    logits, y, class_axis, ignore_index = make()
    draws, weights = torch.stack([logits, 2 * logits.flip(0), -logits]), scalar([0.2, 0.5, 0.3])
    likelihood = Categorical(class_axis=class_axis, ignore_index=ignore_index)
    prediction = outputs_at_draws(draws, likelihood, weights)
    axis = class_axis if class_axis > 0 else class_axis + logits.ndim
    probs = torch.tensordot(weights, draws.softmax(axis + 1), 1)
    expected = NAIVE[name](counted(probs, y, class_axis, ignore_index))
    assert_close(OF_CLASSES[name](prediction, y), scalar(expected))


@of_classes
def test_metrics_of_a_streamed_prediction_equal_those_of_a_kept_one(name):
    draws, y = randn(4, 20, 3), labels(3, 20)
    kept, streamed = (outputs_at_draws(draws, Categorical(), keep_samples=k) for k in (True, False))
    assert_close(OF_CLASSES[name](streamed, y), OF_CLASSES[name](kept, y))


@of_classes
@pytest.mark.parametrize("shape", [(30,), (15, 2)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_each_label_of_a_bernoulli_is_a_choice_between_two_classes(name, shape, dtype):
    outputs, y = 2 * randn(3, *shape), labels(2, *shape)
    prediction = outputs_at_draws(outputs, Bernoulli())
    p = outputs.sigmoid().mean(0)
    expected = NAIVE[name](counted(torch.stack([1 - p, p], -1), y, -1))
    assert_close(OF_CLASSES[name](prediction, y.to(dtype)), scalar(expected))


def test_brier_equals_the_sum_of_scikit_learns_scores_of_one_class_against_the_rest():
    probs, y = randn(50, 4).softmax(-1), labels(4, 50)
    expected = sum(brier_score_loss((y == k).numpy(), probs[:, k].numpy()) for k in range(4))
    assert_close(metrics.brier(probs, y), scalar(expected))


def test_brier_of_a_binary_label_is_twice_the_squared_difference():
    p, y = scalar([0.8, 0.3]), torch.tensor([1, 1])
    half = brier_score_loss(y.numpy(), p.numpy(), pos_label=1)
    assert_close(metrics.brier(torch.stack([1 - p, p], -1), y), scalar(2 * half))


@pytest.mark.parametrize("num_bins", [1, 2, 5, 10, 15, 100])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_confidences_on_the_edge_of_a_bin_belong_to_the_bin_below(num_bins, dtype):
    # In every bin above 1/2 a wrong row on the upper edge and a right one in the middle.
    bins = [b for b in range(1, num_bins + 1) if 2 * b - 1 >= num_bins]
    confidences = [c for b in bins for c in (b / num_bins, (b - 0.5) / num_bins)]
    probs = torch.tensor([[c, 1 - c] for c in confidences], dtype=F64).to(dtype)
    y = torch.tensor([1, 0] * len(bins))
    # Of one bin, they partly cancel; of two, they would not.
    expected = sum(abs(1 - b / num_bins - (b - 0.5) / num_bins) for b in bins) / len(confidences)
    assert_close(metrics.ece(probs, y, num_bins=num_bins).double(), scalar(expected), atol=1e-6, rtol=0)


def test_ece_is_zero_for_rows_that_are_sure_and_right():
    probs = torch.eye(3, dtype=F64)
    assert metrics.ece(probs, torch.arange(3)) == 0


def test_ece_of_one_bin_is_the_gap_between_accuracy_and_mean_confidence():
    probs, y = (3 * randn(60, 3)).softmax(-1), labels(3, 60)
    gap = (metrics.accuracy(probs, y) - probs.amax(-1).mean()).abs()
    assert_close(metrics.ece(probs, y, num_bins=1), gap)


@of_classes
def test_the_first_of_several_equal_probabilities_is_the_label(name):
    probs = torch.full((4, 4), 0.25, dtype=F64)
    y = torch.arange(4)
    assert_close(OF_CLASSES[name](probs, y), scalar(NAIVE[name](counted(probs, y, -1))))
    assert metrics.accuracy(probs, y) == 0.25


@of_classes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, F64])
def test_metrics_take_half_precision_and_are_exact_for_what_they_are_given(name, dtype):
    logits, y = (3 * randn(300, 5)), labels(5, 300)
    probs = logits.softmax(-1).to(dtype)
    got = OF_CLASSES[name](probs, y)
    assert got.dtype == (F64 if dtype == F64 else torch.float32)
    assert got.shape == ()
    assert_close(got.double(), scalar(NAIVE[name](counted(probs, y, -1))), atol=1e-6, rtol=0)


@of_classes
@pytest.mark.parametrize("dtype", [torch.bfloat16, F64])
def test_predictions_of_any_dtype_pass_the_check_of_probabilities(name, dtype):
    draws = (5 * randn(3, 50, 100)).to(dtype)
    got = OF_CLASSES[name](outputs_at_draws(draws, Categorical()), labels(100, 50))
    assert got.isfinite()


def test_float32_probabilities_may_be_float64_by_now():
    probs = randn(50, 10).float().softmax(-1).double()
    assert metrics.brier(probs, labels(10, 50)).dtype == F64


def test_brier_and_ece_can_be_differentiated():
    logits, y = randn(20, 3).requires_grad_(), labels(3, 20)
    (metrics.brier(logits.softmax(-1), y) + metrics.ece(logits.softmax(-1), y)).backward()
    assert logits.grad is not None
    assert logits.grad.abs().sum() > 0


def test_arguments_are_left_as_they_are():
    probs, y = randn(20, 3).softmax(-1), with_ignored(labels(3, 20), -100)
    before = probs.clone(), y.clone()
    for metric in OF_CLASSES.values():
        metric(probs, y)
    assert_close((probs, y), before, rtol=0, atol=0)


def test_nll_is_that_of_the_mixture_over_draws():
    draws, y = randn(3, 6, 4), labels(4, 6)
    weights = scalar([0.2, 0.5, 0.3])
    got = metrics.nll(outputs_at_draws(draws, Categorical(), weights), y)
    probs = draws.softmax(-1)
    expected = 0.0
    for n in range(6):
        expected -= math.log(sum(float(weights[s] * probs[s, n, y[n]]) for s in range(3))) / 6
    assert_close(got, scalar(expected))


def test_nll_of_a_regression_is_not_that_of_averaged_outputs():
    draws, y = scalar([[-2.0], [2.0]]), scalar([0.0])
    got = metrics.nll(outputs_at_draws(draws, Normal(1.0)), y)
    assert_close(got, scalar(2.0 + 0.5 * math.log(2 * math.pi)))  # both draws are two noise_std off


def test_nll_sums_the_positions_of_a_row_inside_each_draw():
    draws, y = randn(2, 3, 5, 4), with_ignored(labels(4, 3, 5), -100)
    got = metrics.nll(outputs_at_draws(draws, Categorical()), y)
    log_probs = draws.log_softmax(-1)
    expected = 0.0
    for n in range(3):
        at = [
            math.exp(sum(float(log_probs[s, n, t, y[n, t]]) for t in range(5) if y[n, t] != -100))
            for s in range(2)
        ]
        expected -= math.log(sum(at) / 2) / 3
    assert_close(got, scalar(expected))


def test_nll_of_a_streamed_prediction_takes_the_targets_it_was_made_with():
    draws, y = randn(3, 6, 4), labels(4, 6)
    streamed = outputs_at_draws(draws, Categorical(), keep_samples=False, targets=y)
    assert_close(metrics.nll(streamed, y), metrics.nll(outputs_at_draws(draws, Categorical()), y))


def test_nll_of_streamed_batches_takes_targets_equal_to_those_of_the_batches():
    draws, y = randn(3, 6, 4), labels(4, 6)
    posterior = fb.Ensemble({"f": draws})

    def streamed(keep_samples):
        batches = [(rows, y[rows]) for rows in torch.arange(6).split(4)]
        return fb.predict_batches(
            lambda p, rows: p["f"][rows],
            None,
            posterior,
            batches,
            likelihood=Categorical(),
            keep_samples=keep_samples,
        )

    expected = metrics.nll(outputs_at_draws(draws, Categorical()), y)
    for keep_samples in (True, False):
        assert_close(metrics.nll(streamed(keep_samples), y.clone()), expected)
    other = y.clone()
    other[2] = (other[2] + 1) % 4
    with pytest.raises(RuntimeError, match="keep_samples=False"):
        metrics.nll(streamed(False), other)
    with pytest.raises((RuntimeError, ValueError)):
        metrics.nll(streamed(False), y[:5])


@pytest.mark.parametrize("shape", [(30,), (10, 3)])
def test_rmse_equals_scikit_learns_over_all_outputs(shape):
    draws, y = randn(4, *shape), randn(*shape, seed=9)
    prediction = outputs_at_draws(draws, Normal(0.1))
    expected = root_mean_squared_error(y.flatten().numpy(), draws.mean(0).flatten().numpy())
    assert_close(metrics.rmse(prediction, y), scalar(expected))
    assert_close(metrics.rmse(outputs_at_draws(draws, None), y), scalar(expected))
    assert_close(metrics.rmse(draws.mean(0), y), scalar(expected))


def test_rmse_of_bfloat16_means_is_exact_for_what_it_is_given():
    mean, y = randn(5000).bfloat16(), randn(5000, seed=3)
    got = metrics.rmse(mean, y)
    assert got.dtype == torch.float32
    assert_close(got.double(), (mean.double() - y).square().mean().sqrt(), atol=1e-6, rtol=0)


def test_rmse_takes_counts_as_targets():
    assert_close(metrics.rmse(scalar([1.5, 3.0]), torch.tensor([1, 3])), scalar(math.sqrt(0.125)))


SCORES = {
    "apart": lambda: (randn(20), randn(30, seed=1) + 10),
    "overlapping": lambda: (randn(20), randn(30, seed=1) + 0.5),
    "reversed": lambda: (randn(20) + 10, randn(30, seed=1)),
    "ties": lambda: (labels(4, 25).double(), labels(5, 40, seed=2).double()),
    "all equal": lambda: (torch.zeros(3, dtype=F64), torch.zeros(5, dtype=F64)),
    "signed zeros": lambda: (scalar([0.0, -0.0]), scalar([-0.0, 0.0, 1.0])),
    "far from [0, 1]": lambda: (20 + 10 * randn(20).abs(), 25 + 10 * randn(30, seed=1).abs()),
    "nearly equal": lambda: (1 + 1e-14 * labels(9, 20).double(), 1 + 1e-14 * labels(9, 20, seed=3).double()),
    "one row each": lambda: (scalar([0.3]), scalar([0.1])),
}
scores = pytest.mark.parametrize("make", SCORES.values(), ids=SCORES.keys())


@scores
def test_auroc_equals_a_loop_over_pairs_and_scikit_learn(make):
    inside, outside = make()
    got = metrics.ood_auroc(inside, outside)
    assert_close(got, scalar(naive_auroc(inside, outside)))
    is_outside = [0] * len(inside) + [1] * len(outside)
    assert_close(got, scalar(roc_auc_score(is_outside, torch.cat([inside, outside]).numpy())))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64])
def test_auroc_of_scores_of_other_dtypes_is_at_least_float32(dtype):
    inside, outside = (5 * randn(50)).to(dtype), (5 * randn(40, seed=1) + 2).to(dtype)
    got = metrics.ood_auroc(inside, outside)
    assert_close(got, scalar(naive_auroc(inside, outside), torch.float32))


def test_auroc_takes_infinite_scores():
    assert metrics.ood_auroc(scalar([0.0, -math.inf]), scalar([math.inf, 0.0])) == 0.875


REFUSED = {
    "logits": (
        lambda: metrics.brier(randn(5, 3), labels(3, 5)),
        ValueError,
        r"`brier\(prediction, y\)` should be given probabilities.*logits\.softmax\(class_axis\)`",
    ),
    "positive numbers": (
        lambda: metrics.ece(torch.ones(5, 3), labels(3, 5)),
        ValueError,
        r"sum of 1 over the class axis, got a smallest one of 1 and a sum of 3\.",
    ),
    "classes on another axis": (
        lambda: metrics.accuracy(randn(4, 3, 4).softmax(1), labels(4, 4, 3)),
        ValueError,
        "sum of 1 over the class axis",
    ),
    "log probabilities": (
        lambda: metrics.accuracy(randn(5, 3).log_softmax(-1), labels(3, 5)),
        ValueError,
        r"softmax\(class_axis\)",
    ),
    "nan": (
        lambda: metrics.accuracy(torch.full((5, 3), math.nan), labels(3, 5)),
        ValueError,
        "finite probabilities, got NaN or infinity",
    ),
    "nan in a prediction": (
        lambda: metrics.accuracy(outputs_at_draws(torch.full((2, 5), math.nan), Bernoulli()), labels(2, 5)),
        ValueError,
        "finite probabilities, got NaN or infinity",
    ),
    "probabilities of label 1": (
        lambda: metrics.brier(torch.rand(5), labels(2, 5)),
        ValueError,
        r"\(N, C\), got shape \(5,\)\. .*torch\.stack\(\[1 - p, p\], -1\)",
    ),
    "labels of another shape": (
        lambda: metrics.accuracy(randn(5, 3).softmax(-1), labels(3, 5, 1)),
        ValueError,
        r"`y` in `accuracy\(prediction, y\)` should have shape \(5,\).*got \(5, 1\)\..*`y\.squeeze\(-1\)`",
    ),
    "one-hot labels": (
        lambda: metrics.brier(randn(5, 3).softmax(-1), torch.eye(5, 3)),
        TypeError,
        r"should be integers, got torch\.float32.*argmax",
    ),
    "labels out of range": (
        lambda: metrics.ece(randn(5, 3).softmax(-1), torch.tensor([0, 1, 2, 3, -1])),
        ValueError,
        r"from 0 to 2, or -100 to be ignored, got labels from -1 to 3",
    ),
    "all labels ignored": (
        lambda: metrics.accuracy(randn(5, 3).softmax(-1), torch.full((5,), -100)),
        ValueError,
        "at least one row with a label that counts",
    ),
    "no rows": (
        lambda: metrics.ece(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)),
        ValueError,
        "at least one row",
    ),
    "no tensor": (
        lambda: metrics.accuracy([[0.5, 0.5]], torch.tensor([0])),
        TypeError,
        "`Prediction` or a tensor of class probabilities, got list",
    ),
    "predicted labels": (
        lambda: metrics.accuracy(labels(3, 5), labels(3, 5)),
        TypeError,
        r"tensor of class probabilities, got a tensor of torch\.int64",
    ),
    "no likelihood": (
        lambda: metrics.accuracy(outputs_at_draws(randn(2, 5, 3), None), labels(3, 5)),
        ValueError,
        r"over classes, got one with likelihood None\. Write `predict\(\.\.\., likelihood=",
    ),
    "counts": (
        lambda: metrics.brier(outputs_at_draws(randn(2, 5, 3), Poisson()), labels(3, 5)),
        ValueError,
        r"over classes, got one with likelihood Poisson\(\)",
    ),
    "axis for a prediction": (
        lambda: metrics.ece(outputs_at_draws(randn(2, 5, 3), Categorical()), labels(3, 5), class_axis=1),
        ValueError,
        "from its likelihood, here Categorical.*Leave them out",
    ),
    "axis of rows": (
        lambda: metrics.ece(randn(5, 3).softmax(0), labels(5, 3), class_axis=0),
        ValueError,
        "should not be 0, which is the axis of rows",
    ),
    "num_bins zero": (
        lambda: metrics.ece(randn(5, 3).softmax(-1), labels(3, 5), num_bins=0),
        ValueError,
        r"`ece\(num_bins=\.\.\.\)` should be an int of at least 1, got 0",
    ),
    "num_bins float": (
        lambda: metrics.ece(randn(5, 3).softmax(-1), labels(3, 5), num_bins=10.0),
        ValueError,
        r"an int of at least 1, got 10\.0",
    ),
    "nll of probabilities": (
        lambda: metrics.nll(randn(5, 3).softmax(-1), labels(3, 5)),
        TypeError,
        r"`predict\(\.\.\., likelihood=\.\.\.\)` returns, got Tensor.*nll_loss",
    ),
    "nll without a likelihood": (
        lambda: metrics.nll(outputs_at_draws(randn(2, 5, 3), None), labels(3, 5)),
        ValueError,
        "needs a likelihood",
    ),
    "nll of no rows": (
        lambda: metrics.nll(outputs_at_draws(randn(2, 0), Normal(1.0)), randn(0)),
        ValueError,
        "at least one row",
    ),
    "rmse that would broadcast": (
        lambda: metrics.rmse(randn(5, 1), randn(5)),
        ValueError,
        r"`y` in `rmse\(prediction, y\)` should have shape \(5, 1\).*`y\[:, None\]`",
    ),
    "rmse of labels": (
        lambda: metrics.rmse(labels(3, 5), labels(3, 5)),
        TypeError,
        r"floating-point tensor of means, got a tensor of torch\.int64",
    ),
    "rmse of a list": (lambda: metrics.rmse([1.0], randn(1)), TypeError, "tensor of means, got list"),
    "rmse without rows": (lambda: metrics.rmse(randn(0), randn(0)), ValueError, "at least one row"),
    "rmse of unknown targets": (
        lambda: metrics.rmse(randn(2), scalar([0.0, math.nan])),
        ValueError,
        "should be finite",
    ),
    "scores by class": (
        lambda: metrics.ood_auroc(randn(5, 3), randn(5)),
        ValueError,
        r"`scores_in` in `ood_auroc\(.*should have shape \(N,\), one score a row, got \(5, 3\)",
    ),
    "no scores": (lambda: metrics.ood_auroc(randn(5), randn(0)), ValueError, "at least one row"),
    "nan scores": (
        lambda: metrics.ood_auroc(randn(2), scalar([math.nan])),
        ValueError,
        "`scores_out`.*got NaN",
    ),
    "scores as a list": (lambda: metrics.ood_auroc([0.1], randn(2)), TypeError, "real numbers, got list"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_arguments_are_refused_with_what_to_write_instead(name):
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        call()


def test_importing_the_metrics_does_not_import_torchmetrics():
    code = "import sys; from funcbayes import metrics; sys.exit('torchmetrics' in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "error", "-c", code], check=False).returncode == 0


def pairs_by_hand(weights, between):
    """Mean of ``between(s, t)`` over pairs of different draws taken by their weights, in Python's floats."""
    draws = [(s, t) for s in range(len(weights)) for t in range(len(weights)) if s != t]
    total = sum(weights[s] * weights[t] for s, t in draws)
    return sum(weights[s] * weights[t] * between(s, t) for s, t in draws) / total if draws else 0.0


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


WEIGHTS = [None, scalar([0.1, 0.2, 0.3, 0.4]), scalar([0.5, 0.0, 0.25, 0.25])]
DENSE = {
    "rows": ((4, 5, 3), -1),
    "tokens": ((4, 5, 6, 3), -1),
    "images": ((4, 5, 3, 2, 2), 1),
}
dense = pytest.mark.parametrize(("shape", "class_axis"), DENSE.values(), ids=DENSE.keys())
weighted = pytest.mark.parametrize("weights", WEIGHTS, ids=["equal", "weights", "a weight of 0"])


@weighted
@dense
def test_disagreement_and_kl_are_means_over_pairs_of_different_draws(shape, class_axis, weights):
    outputs = randn(*shape)
    prediction = outputs_at_draws(outputs, Categorical(class_axis=class_axis), weights)
    axis = class_axis + (class_axis > 0)
    probs = outputs.softmax(axis).movedim(axis, -1).reshape(4, 5, -1, 3).tolist()
    shares = [0.25] * 4 if weights is None else weights.tolist()
    positions = range(len(probs[0][0]))
    of = {"differ": lambda p, q: float(p.index(max(p)) != q.index(max(q))), "kl": kl}
    expected = {
        name: [
            sum(pairs_by_hand(shares, lambda s, t: f(probs[s][n][i], probs[t][n][i])) for i in positions)  # noqa: B023
            / len(positions)
            for n in range(5)
        ]
        for name, f in of.items()
    }
    assert_close(metrics.disagreement(prediction), scalar(expected["differ"]))
    assert_close(metrics.pairwise_kl(prediction), scalar(expected["kl"]))
    assert 0 < metrics.disagreement(prediction).sum()
    assert (metrics.pairwise_kl(prediction) >= _mean_information(prediction) - 1e-12).all()


def _mean_information(prediction):
    return prediction.mutual_information.reshape(prediction.num_rows, -1).mean(1)


@weighted
def test_labels_of_bernoulli_are_choices_between_two_classes(weights):
    outputs = randn(4, 5, 2)
    prediction = outputs_at_draws(outputs, Bernoulli(), weights)
    both = torch.stack([torch.zeros_like(outputs), outputs], -1)
    of_two_classes = outputs_at_draws(both, Categorical(), weights)
    for metric in (metrics.disagreement, metrics.pairwise_kl):
        assert_close(metric(prediction), metric(of_two_classes))


@weighted
@pytest.mark.parametrize("likelihood", [None, Normal(0.5), Categorical()], ids=["none", "normal", "classes"])
def test_diversity_is_the_variance_of_the_means_of_draws(likelihood, weights):
    outputs = randn(4, 5, 3)
    means = outputs.softmax(-1) if isinstance(likelihood, Categorical) else outputs
    shares = torch.full((4,), 0.25, dtype=F64) if weights is None else weights
    center = (shares[:, None, None] * means).sum(0)
    expected = (shares[:, None, None] * (means - center) ** 2).sum(0) / (1 - (shares**2).sum())
    for keep in (True, False):
        prediction = outputs_at_draws(outputs, likelihood, weights, keep_samples=keep)
        assert_close(metrics.diversity(prediction), expected.mean(-1))
    if weights is None:
        assert_close(metrics.diversity(prediction), means.var(0).mean(-1))


def test_diversity_has_one_number_a_row_whatever_the_outputs_are():
    assert_close(metrics.diversity(outputs_at_draws(randn(3, 5), None)), randn(3, 5).var(0))
    dense = randn(3, 5, 2, 4)
    assert_close(metrics.diversity(outputs_at_draws(dense, None)), dense.var(0).mean((1, 2)))


def test_draws_that_are_one_do_not_differ():
    for outputs in (randn(1, 5, 3), randn(1, 5, 3).expand(4, 5, 3)):
        prediction = outputs_at_draws(outputs, Categorical())
        for metric in (metrics.diversity, metrics.disagreement, metrics.pairwise_kl):
            assert_close(metric(prediction), torch.zeros(5, dtype=F64))
    alone = outputs_at_draws(randn(2, 5, 3), Categorical(), scalar([1.0, 0.0]))
    for metric in (metrics.diversity, metrics.disagreement, metrics.pairwise_kl):
        assert_close(metric(alone), torch.zeros(5, dtype=F64))


def test_draws_that_always_differ_disagree_surely():
    outputs = 5 * torch.eye(3, dtype=F64)[:, None, :].expand(3, 4, 3)
    prediction = outputs_at_draws(outputs, Categorical(), scalar([0.2, 0.3, 0.5]))
    assert_close(metrics.disagreement(prediction), torch.ones(4, dtype=F64))


def test_kl_is_infinite_where_a_draw_rules_out_what_another_does_not():
    impossible = scalar([[[0.0, -math.inf, 0.0]], [[0.0, 0.0, 0.0]]])
    assert metrics.pairwise_kl(outputs_at_draws(impossible, Categorical())).item() == math.inf
    both = scalar([[[0.0, -math.inf, 1.0]], [[0.0, -math.inf, 0.0]]])
    p, q = ([math.exp(v) for v in row] for row in both[:, 0, ::2].log_softmax(-1).tolist())
    got = metrics.pairwise_kl(outputs_at_draws(both, Categorical()))
    assert_close(got, scalar([(kl(p, q) + kl(q, p)) / 2]))


def test_measures_of_diversity_are_at_least_float32():
    prediction = outputs_at_draws(randn(3, 5, 2).bfloat16(), Categorical())
    for metric in (metrics.diversity, metrics.disagreement, metrics.pairwise_kl):
        assert metric(prediction).dtype == torch.float32


DIVERSITY_ERRORS = {
    "no prediction": (metrics.diversity, lambda: randn(3, 2), TypeError, "`predict(...)` returns, got a"),
    "a tensor": (metrics.disagreement, lambda: randn(3, 2), TypeError, "`disagreement(prediction)` should"),
    "numbers": (
        metrics.disagreement, lambda: outputs_at_draws(randn(3, 5, 2), Normal(1.0)), ValueError, "classes"
    ),
    "outputs": (
        metrics.pairwise_kl, lambda: outputs_at_draws(randn(3, 5, 2), None), ValueError, "classes"
    ),
    "streamed": (
        metrics.pairwise_kl,
        lambda: outputs_at_draws(randn(3, 5, 2), Categorical(), keep_samples=False),
        RuntimeError,
        "keep_samples=True",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("metric", "make", "kind", "message"), DIVERSITY_ERRORS.values(), ids=DIVERSITY_ERRORS.keys()
)
def test_measures_of_diversity_refuse_what_has_none(metric, make, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        metric(make())
