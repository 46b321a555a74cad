"""The interface of a likelihood."""

import abc
from typing import ClassVar

import torch
from torch import Tensor


class Likelihood(abc.ABC):
    """Interface of ``p(y | f)``; subclasses are final, frozen and pytrees.

    ``outputs`` are the raw outputs of one draw, ``(N, *event)``; ``y`` are the targets of the same
    rows. The dtype and device of results follow ``outputs``; numbers in bfloat16 and float16 are
    combined in float32. Shapes are checked by every method that takes ``y``, since a shape that
    merely broadcasts would give a wrong number; values are checked by :meth:`check` only.

    Attributes:
        is_discrete: Whether ``y`` is one of finitely many classes. Those likelihoods have
            :meth:`log_class_probs`, and so the entropy of a mixture over draws in closed form.
        has_integer_support: Whether ``y`` is a count, so that quantiles are whole numbers.
        has_entropy: Whether :meth:`entropy` has a closed form.
    """

    is_discrete: ClassVar[bool]
    has_integer_support: ClassVar[bool] = False
    has_entropy: ClassVar[bool] = True

    @abc.abstractmethod
    def check(self, outputs: Tensor, y: Tensor | None = None, *, call: str = "check(outputs, y)") -> None:
        """Refuse outputs and targets that this likelihood cannot mean.

        Meant for public functions before work starts; it looks at values, so it does not work
        inside ``vmap``.

        Args:
            outputs: Raw outputs ``(N, *event)``.
            y: Targets, if there are any.
            call: How the user called us, for the messages.

        Raises:
            TypeError: If ``outputs`` or ``y`` are not tensors of a suitable dtype.
            ValueError: If their shapes do not match, or a target is not a possible one.
        """

    def output_axis(self, outputs: Tensor) -> int | None:
        """Say which axis holds the ``C`` outputs of a position; the others are rows and positions.

        ``None`` for outputs ``(N,)``, which are one output a row.
        """
        return outputs.ndim - 1 if outputs.ndim > 1 else None

    def num_positions(self, outputs: Tensor) -> int:
        """How many blocks of the Fisher a row of the outputs has."""
        axis = self.output_axis(outputs)
        size = outputs.shape[1:].numel()
        return max(size, 1) if axis is None else max(size // max(outputs.shape[axis], 1), 1)

    @abc.abstractmethod
    def log_prob(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return ``log p(y | f)``, ``(N,)``: summed over the positions and outputs of a row.

        Raises:
            ValueError: If the shape of ``y`` is not the one expected; nothing is broadcast.
        """

    def log_likelihood(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return ``log p(y | f)`` of all rows, a scalar: the sum of :meth:`log_prob`, not the mean."""
        return self.log_prob(outputs, y).sum()

    @abc.abstractmethod
    def num_terms(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Count the scalar terms that :meth:`log_likelihood` sums, an int64 scalar.

        It is the number of observed scalars: ``N * C`` for a regression, labels that are not
        ignored for ``Categorical``.
        """

    @abc.abstractmethod
    def mean(self, outputs: Tensor) -> Tensor:
        """Return ``E[y | f]``; class probabilities in the layout of ``outputs`` for ``Categorical``."""

    @abc.abstractmethod
    def variance(self, outputs: Tensor) -> Tensor:
        """Return ``Var[y | f]`` in the shape of :meth:`mean`; for classes, of each class indicator."""

    @abc.abstractmethod
    def entropy(self, outputs: Tensor) -> Tensor:
        """Return the entropy of ``p(y | f)`` in nats for each row and position, in the shape of ``y``.

        Raises:
            NotImplementedError: If it has no closed form (``Poisson``).
        """

    @abc.abstractmethod
    def log_class_probs(self, outputs: Tensor) -> Tensor:
        """Return the log probability of every class.

        With :meth:`mean_of_log_probs` and :meth:`entropy_of_log_probs` it serves mixtures over
        draws, in log space because averaged probabilities underflow: average with
        ``logsumexp(log_probs + log_weights, 0)`` over the draw axis, then ask for the moments of
        the average.

        Returns:
            For ``Categorical`` the layout of ``outputs``; for ``Bernoulli`` a new last axis
            ``[log p(0), log p(1)]``.

        Raises:
            NotImplementedError: If there are no classes, see ``is_discrete``.
        """

    @abc.abstractmethod
    def mean_of_log_probs(self, log_probs: Tensor) -> Tensor:
        """Return what :meth:`mean` would be for ``log_probs`` as laid out by :meth:`log_class_probs`.

        Raises:
            NotImplementedError: If there are no classes, see ``is_discrete``.
        """

    @abc.abstractmethod
    def entropy_of_log_probs(self, log_probs: Tensor) -> Tensor:
        """Return what :meth:`entropy` would be for ``log_probs`` as laid out by :meth:`log_class_probs`.

        Raises:
            NotImplementedError: If there are no classes, see ``is_discrete``.
        """

    @abc.abstractmethod
    def cdf(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return ``P(Y <= y | f)`` elementwise, in the shape of ``y``.

        Raises:
            NotImplementedError: If ``y`` is a class.
            ValueError: If the shape of ``y`` is not the one expected.
        """

    @abc.abstractmethod
    def sample(
        self, outputs: Tensor, *, generator: torch.Generator, num_samples: int | None = None
    ) -> Tensor:
        """Draw targets from ``p(y | f)``.

        Args:
            outputs: Raw outputs ``(N, *event)``.
            generator: Source of randomness, on the device of ``outputs``; the global state is
                not touched. Inside ``vmap`` pass ``randomness="different"``.
            num_samples: Number of draws; ``None`` means one, without an axis for it.

        Returns:
            Targets in the shape of ``y``, after an axis of length ``num_samples`` if it is given:
            int64 for ``Categorical``, else in the dtype of ``outputs``.
        """

    @abc.abstractmethod
    def fisher(self, outputs: Tensor, *, y: Tensor | None = None) -> Tensor:
        """Return the expected Hessian of ``-log p(y | f)`` in ``f``, ``(N, *positions, C, C)``.

        Args:
            outputs: Raw outputs ``(N, *event)``.
            y: Only says which positions are ignored and count zero (``Categorical``); the values
                of labels do not enter.
        """

    @abc.abstractmethod
    def fisher_sqrt(self, outputs: Tensor, *, y: Tensor | None = None) -> Tensor:
        """Return columns ``c_k`` with ``fisher = sum_k c_k c_k^T`` in each row and position.

        A column has the layout of ``outputs``, so it is a cotangent for them, and ``K`` is the
        number of columns of one block. It therefore carries the columns of all rows and all
        positions at once, while those are separate blocks: with Jacobians ``J_np``, the curvature
        in the parameters is ``sum_knp (J_np^T c_knp) (J_np^T c_knp)^T``. Pulling a whole column
        back through the network first and squaring then would add products between positions.

        Args:
            outputs: Raw outputs ``(N, *event)``.
            y: Only says which positions are ignored, as in :meth:`fisher`.

        Returns:
            Columns ``(K, *outputs.shape)``.
        """

    @abc.abstractmethod
    def hessian(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return the Hessian of ``-log p(y | f)`` in ``f``, ``(N, *positions, C, C)``.

        Raises:
            ValueError: If the shape of ``y`` is not the one expected.
        """

    @abc.abstractmethod
    def distribution(self, outputs: Tensor, *, batch_ndim: int = 1) -> torch.distributions.Distribution:
        """Return ``p(y | f)`` for ``torch.distributions``: batch shape ``(N,)``, the rest is the event.

        Its ``log_prob(y)`` is :meth:`log_prob`, except that it knows nothing of ignored labels.

        Args:
            outputs: Raw outputs ``(N, *event)``.
            batch_ndim: Number of leading axes that are the batch, if there is more than that of rows.
        """
