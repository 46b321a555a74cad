"""Classes, from logits on one axis of the outputs."""

from typing import ClassVar

import torch
from torch import Tensor

from .._tree import pytree_dataclass, static
from ._checks import NO_ORDER, check_num_samples, check_outputs, check_targets, unavailable
from ._layout import entropy_along, of_dtype, sample_shape, sum_rows, wide
from ._likelihood import Likelihood


@pytree_dataclass
class Categorical(Likelihood):
    """One of ``C`` classes for each row, or for each position of a row (pixels, tokens).

    ``outputs`` are logits ``(N, C)``, ``(N, C, H, W)`` with ``class_axis=1``, ``(N, T, C)``; ``y``
    holds integers from 0 to ``C - 1`` in the same shape without the class axis.

    Attributes:
        class_axis: Axis of ``outputs`` that holds the classes; not the axis of rows.
        ignore_index: Label of positions that do not count: their log probability, Hessian and
            Fisher are zero.
    """

    class_axis: int = static(default=-1)
    ignore_index: int = static(default=-100)

    is_discrete: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse classes on the axis of rows."""
        if self.class_axis == 0:
            raise ValueError("`Categorical(class_axis=...)` should not be 0, which is the axis of rows.")

    def check(self, outputs: Tensor, y: Tensor | None = None, *, call: str = "check(outputs, y)") -> None:
        """Refuse outputs without a class axis, and labels that are no class indices."""
        check_outputs(outputs, call)
        axis = self._axis(outputs)
        if y is None:
            return
        labels = self._labels(outputs, y, call)
        counted = labels[labels != self.ignore_index]
        num_classes = outputs.shape[axis]
        if counted.numel() and not (0 <= int(counted.min()) and int(counted.max()) < num_classes):
            raise ValueError(
                f"Labels `y` in `{call}` should be from 0 to {num_classes - 1}, or {self.ignore_index} to be "
                f"ignored, got labels from {int(counted.min())} to {int(counted.max())}."
            )

    def output_axis(self, outputs: Tensor) -> int:
        """Say which axis holds the classes, counted from the front."""
        return self._axis(outputs)

    def log_prob(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return ``log p(y | f)``, ``(N,)``: summed over positions, ignored labels adding 0."""
        axis = self._axis(outputs)
        labels = self._labels(outputs, y, "Categorical.log_prob(outputs, y)")
        ignored = labels == self.ignore_index
        index = labels.masked_fill(ignored, 0).unsqueeze(axis)
        picked = wide(outputs).log_softmax(axis).gather(axis, index).squeeze(axis)
        return of_dtype(sum_rows(picked.masked_fill(ignored, 0)), outputs.dtype)

    def num_terms(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Count the labels that are not ignored."""
        return (self._labels(outputs, y, "Categorical.num_terms(outputs, y)") != self.ignore_index).sum()

    def mean(self, outputs: Tensor) -> Tensor:
        """Return class probabilities in the layout of ``outputs``."""
        return outputs.softmax(self._axis(outputs))

    def variance(self, outputs: Tensor) -> Tensor:
        """Return ``p (1 - p)``, the variance of each class indicator."""
        log_probs = self.log_class_probs(wide(outputs))
        return (log_probs.exp() * -torch.expm1(log_probs)).to(outputs.dtype)

    def entropy(self, outputs: Tensor) -> Tensor:
        """Return entropies without the class axis: ``(N,)`` for 2-D logits, ``(N, H, W)`` for images."""
        return self.entropy_of_log_probs(self.log_class_probs(wide(outputs))).to(outputs.dtype)

    def log_class_probs(self, outputs: Tensor) -> Tensor:
        """Return ``log_softmax`` over the class axis, in the layout of ``outputs``."""
        return outputs.log_softmax(self._axis(outputs))

    def mean_of_log_probs(self, log_probs: Tensor) -> Tensor:
        """Return class probabilities in the layout of ``log_probs``."""
        return log_probs.exp()

    def entropy_of_log_probs(self, log_probs: Tensor) -> Tensor:
        """Return entropies, without the class axis."""
        return entropy_along(log_probs, self._axis(log_probs))

    def cdf(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Raise ``NotImplementedError``: classes have no order."""
        raise unavailable(self, "cdf", NO_ORDER)

    def sample(
        self, outputs: Tensor, *, generator: torch.Generator, num_samples: int | None = None
    ) -> Tensor:
        """Draw labels, int64, by the Gumbel-max trick."""
        check_num_samples(num_samples, "Categorical.sample")
        axis = self._axis(outputs) - outputs.ndim
        logits = wide(outputs)
        uniform = torch.rand(
            sample_shape(outputs.shape, num_samples),
            generator=generator,
            dtype=logits.dtype,
            device=logits.device,
        )
        return (logits - torch.log(-torch.log(uniform))).argmax(axis)

    def fisher(self, outputs: Tensor, *, y: Tensor | None = None) -> Tensor:
        """Return ``diag(p) - p p^T``, ``(N, *positions, C, C)``; zero where ``y`` is ignored."""
        probs = wide(outputs).softmax(self._axis(outputs)).movedim(self._axis(outputs), -1)
        same = torch.eye(probs.shape[-1], dtype=torch.bool, device=probs.device)
        # Rows sum to zero, so p_i (1 - p_i) = sum_{j != i} p_i p_j, which does not cancel at p_i ~ 1.
        products = (probs.unsqueeze(-1) * probs.unsqueeze(-2)).masked_fill(same, 0)
        blocks = (torch.diag_embed(products.sum(-1)) - products).to(outputs.dtype)
        if y is None:
            return blocks
        ignored = self._labels(outputs, y, "Categorical.fisher(outputs, y=y)") == self.ignore_index
        return blocks.masked_fill(ignored[..., None, None], 0)

    def fisher_sqrt(self, outputs: Tensor, *, y: Tensor | None = None) -> Tensor:
        """Return the ``K = C - 1`` columns of the Cholesky factor of ``diag(p) - p p^T``.

        The factor is known in closed form (Tanabe & Sagae 1992, "An exact Cholesky decomposition
        and the generalized inverse of the variance-covariance matrix of the multinomial
        distribution"), https://doi.org/10.1111/j.2517-6161.1992.tb01875.x.
        """
        # Choose a class by walking along them: stop at class j, if not stopped before, else go on.
        # With the tail masses q_j = sum_{i > j} p_i, one gets to j with probability q_{j-1}, stops
        # with p_j / q_{j-1}, and goes on to the distribution t_j = p_{i > j} / q_j. The covariance
        # of y is the sum over steps of the expected covariance of E[y | steps so far], and a step is
        # a coin between e_j and t_j:
        #     diag(p) - p p^T = sum_j a_j^2 (e_j - t_j) (e_j - t_j)^T,  a_j^2 = p_j q_j / q_{j-1}.
        # The last class has no step: C - 1 columns, lower triangular. In logs, all ratios are at
        # most 1, whatever underflows; the clamp keeps -inf - (-inf) away where logits are -inf.
        axis = self._axis(outputs)
        log_probs = wide(outputs).log_softmax(axis).movedim(axis, -1)
        log_probs = log_probs.clamp_min(torch.finfo(log_probs.dtype).min / 8)
        log_tails = log_probs.flip(-1).logcumsumexp(-1).flip(-1)  # q_{j-1} at index j
        before, after = log_tails[..., :-1], log_tails[..., 1:]
        log_scale = 0.5 * (log_probs[..., :-1] + after - before)  # log a_j

        num_classes = log_probs.shape[-1]
        stops = torch.eye(num_classes, dtype=torch.bool, device=outputs.device)[:, :-1]
        later = torch.ones_like(stops).tril(-1)
        log_rest = log_probs.unsqueeze(-1) - after.unsqueeze(-2)  # log t_j, [..., i, j]
        rest = log_rest.masked_fill(~later, -torch.inf).exp()
        root = (stops.to(rest.dtype) - rest) * log_scale.exp().unsqueeze(-2)

        columns = root.movedim(-1, 0).movedim(-1, axis + 1).to(outputs.dtype)
        if y is None:
            return columns
        ignored = self._labels(outputs, y, "Categorical.fisher_sqrt(outputs, y=y)") == self.ignore_index
        return columns.masked_fill(ignored.unsqueeze(axis), 0)

    def hessian(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return ``diag(p) - p p^T``: the Fisher, whatever the label, and zero where it is ignored."""
        self._labels(outputs, y, "Categorical.hessian(outputs, y)")
        return self.fisher(outputs, y=y)

    def distribution(self, outputs: Tensor, *, batch_ndim: int = 1) -> torch.distributions.Distribution:
        """Return a ``Categorical`` with one event for all positions of a row."""
        # Further axes of the batch stand before the event, where the class axis is counted from.
        axis = self._axis(outputs.flatten(0, batch_ndim - 1)) + batch_ndim - 1
        logits = outputs.movedim(axis, -1)
        labels = torch.distributions.Categorical(logits=logits, validate_args=False)
        return torch.distributions.Independent(labels, logits.ndim - 1 - batch_ndim, validate_args=False)

    def _axis(self, outputs: Tensor) -> int:
        """The class axis, counted from the front."""
        axis = self.class_axis if self.class_axis > 0 else outputs.ndim + self.class_axis
        if not 0 < axis < outputs.ndim:
            raise ValueError(
                f"`outputs` should have an axis of rows and the classes on axis {self.class_axis} "
                f"(`Categorical(class_axis=...)`), got shape {tuple(outputs.shape)}."
            )
        return axis

    def _labels(self, outputs: Tensor, y: Tensor, call: str) -> Tensor:
        """The labels as int64, after checks of dtype and shape."""
        axis = self._axis(outputs)
        if isinstance(y, Tensor) and (y.is_floating_point() or y.is_complex()):
            raise TypeError(
                f"Labels `y` in `{call}` should be integers, got {y.dtype}. Write `y.long()` for class "
                f"indices, or `y.argmax({self.class_axis})` for one-hot rows."
            )
        expected = torch.Size((*outputs.shape[:axis], *outputs.shape[axis + 1 :]))
        check_targets(y, expected, outputs, call)
        return of_dtype(y, torch.int64)
