"""Statistics over draws that can be fed in chunks."""

import torch
from torch import Tensor
from torch.func import vmap

from .likelihoods import Likelihood


class Accumulator:
    """A statistic over draws that can be fed in chunks. Tensors ``(s, N, ...)``, weights ``(s,)``."""

    def update(self, values: Tensor, weights: Tensor) -> None:
        raise NotImplementedError

    def result(self) -> Tensor:
        raise NotImplementedError


class Moments(Accumulator):
    """Weighted mean, and the unbiased variance ``sum_s w_s (v_s - mean)^2 / (1 - sum_s w_s^2)``."""

    def __init__(self) -> None:
        self.mean: Tensor | None = None
        self.squares = self.total = self.spread = torch.zeros(())

    def update(self, values: Tensor, weights: Tensor) -> None:
        total = weights.sum()
        tiny = torch.finfo(weights.dtype).tiny  # a chunk may weigh nothing
        mean = torch.tensordot((weights / total.clamp_min(tiny)).to(values), values, 1)
        squares = torch.tensordot(weights.to(values), (values - mean) ** 2, 1)
        # 1 - sum w^2 = sum w (1 - w), which does not cancel when one weight is almost 1.
        spread = (weights * (1 - weights)).sum()
        if self.mean is None:
            self.mean, self.squares, self.total, self.spread = mean, squares, total, spread
        else:
            # The parallel form of Welford's update (Chan, Golub & LeVeque 1979), which does not cancel.
            shift, before = mean - self.mean, self.total
            self.total, self.spread = before + total, self.spread + spread
            share = (total / self.total.clamp_min(tiny)).to(values)
            self.mean = self.mean + shift * share
            self.squares = self.squares + squares + shift**2 * (before.to(values) * share)

    def result(self) -> Tensor:
        """Mean and variance, stacked."""
        assert self.mean is not None
        several = self.spread > 0  # not one atom, nor all weight on one
        # The spread can be as small as a weight: in float32 only its ratio to the squares is safe.
        variance = self.squares / self.spread.where(several, 1.0).to(self.squares)
        return torch.stack([self.mean, torch.where(several.to(variance.device), variance, 0.0)])


class Mean(Accumulator):
    """Weighted mean."""

    def __init__(self) -> None:
        self.sum: Tensor | float = 0.0
        self.total: Tensor | float = 0.0

    def update(self, values: Tensor, weights: Tensor) -> None:
        weights = weights.to(values)
        self.sum = self.sum + torch.tensordot(weights, values, 1)
        self.total = self.total + weights.sum()

    def result(self) -> Tensor:
        return self.sum / self.total  # type: ignore[return-value]  # tensors once updated


class LogMeanExp(Accumulator):
    """``log sum_s w_s exp(v_s)``: averages of probabilities that would underflow themselves."""

    def __init__(self) -> None:
        self.log_sum: Tensor | None = None
        self.total: Tensor | float = 0.0

    def update(self, values: Tensor, weights: Tensor) -> None:
        weights = weights.to(values)
        log_weights = weights.log().reshape(-1, *(1 for _ in values.shape[1:]))
        log_sum = torch.logsumexp(values + log_weights, 0)
        self.log_sum = log_sum if self.log_sum is None else torch.logaddexp(self.log_sum, log_sum)
        self.total = self.total + weights.sum()

    def result(self) -> Tensor:
        assert self.log_sum is not None
        assert isinstance(self.total, Tensor)
        return self.log_sum - self.total.log()


def wide(values: Tensor) -> Tensor:
    """Half precision in float32, in which sums and logarithms are taken."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


class Summary:
    """Statistics that predictions are made of, each fed with the outputs of chunks of draws."""

    def __init__(self, likelihood: Likelihood | None, targets: Tensor | None) -> None:
        self.likelihood, self.targets = likelihood, targets

    def names(self) -> list[str]:
        """Statistics that exist for this likelihood."""
        if self.likelihood is None:
            return ["moments"]
        names = ["moments", "aleatoric_variance"]
        if self.likelihood.is_discrete:
            names.append("log_class_probs")
        if self.likelihood.has_entropy:
            names.append("expected_entropy")
        if self.targets is not None:
            names.append("log_prob")
        return names

    def accumulator(self, name: str) -> Accumulator:
        """An empty accumulator of the statistic."""
        if name == "moments":
            return Moments()
        return LogMeanExp() if name in ("log_class_probs", "log_prob") else Mean()

    def values(self, name: str, outputs: Tensor) -> Tensor:
        """What the statistic averages, for each draw: ``(s, N, ...)``."""
        outputs, likelihood = wide(outputs), self.likelihood
        if likelihood is None:
            return outputs
        if name == "log_prob":
            assert self.targets is not None
            return vmap(likelihood.log_prob, in_dims=(0, None))(outputs, self.targets)
        of_one_draw = {
            "moments": likelihood.mean,
            "aleatoric_variance": likelihood.variance,
            "log_class_probs": likelihood.log_class_probs,
            "expected_entropy": likelihood.entropy,
        }[name]
        return vmap(of_one_draw)(outputs)


class Streamed:
    """Accumulates all statistics of a prediction chunk by chunk, in memory that does not grow."""

    def __init__(self, summary: Summary) -> None:
        self.summary = summary
        self.accumulators = {name: summary.accumulator(name) for name in summary.names()}

    def update(self, outputs: Tensor, weights: Tensor) -> None:
        """Take in the outputs ``(s, N, ...)`` of some draws."""
        for name, accumulator in self.accumulators.items():
            values = self.summary.values(name, outputs)
            accumulator.update(values, weights)

    def results(self) -> dict[str, Tensor]:
        """All statistics."""
        return {name: accumulator.result() for name, accumulator in self.accumulators.items()}
