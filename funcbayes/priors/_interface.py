"""What a prior can do."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .._tree import Params, parameters_of
from ..covariances._flat import at_least_single, dtype_of
from ._numbers import by_leaf, check_numbers


class Prior(ABC):
    """A density over the parameters of a tree, independent between them.

    Its numbers are one for all parameters, or trees with a number, or a tensor like the leaf, for each leaf.
    ``Fixed`` leaves and integers have no density and are passed by.
    """

    def log_prob(self, params: Params) -> Tensor:
        """Find ``log p(theta)``, **summed** over all parameters.

        Args:
            params: Values, leaves of any shape.

        Returns:
            A scalar in the dtype of the leaves, found in at least single precision.

        Raises:
            ValueError: If the prior has no number for a leaf.
        """
        leaves = parameters_of(params)
        dtype = at_least_single(dtype_of(leaves))
        numbers = self._numbers(leaves, dtype)
        terms = [self._log_density(leaf.to(dtype), numbers[name]).sum() for name, leaf in leaves.items()]
        return _total(terms, dtype).to(dtype_of(leaves))

    def expected_log_prob(self, mean: Params, variance: Params) -> Tensor | None:
        """Find ``E log p(theta)`` for a Gaussian ``theta`` with these marginals, **summed** over parameters.

        Correlations do not matter, because the prior is independent between parameters.

        Args:
            mean: Means, leaves ``s``.
            variance: Variances, leaves ``s``.

        Returns:
            A scalar in at least single precision; ``None`` if there is no closed form.
        """
        del mean, variance
        return None

    def check(self, params: Params, call: str) -> None:
        """Refuse a prior that does not fit parameters.

        Args:
            params: The parameters, leaves of any shape.
            call: How the user called us, for the message: ``"vi.fit(prior=...)"``.

        Raises:
            ValueError: If a leaf has no number, or one of another shape.
        """
        self._numbers(parameters_of(params), torch.float64, call)

    @property
    def is_the_same_everywhere(self) -> bool:
        """Whether all parameters have one density."""
        return all(_is_one(getattr(self, field.name)) for field in _fields(self))

    @abstractmethod
    def _log_density(self, theta: Tensor, numbers: Mapping[str, Tensor]) -> Tensor:
        """Entry by entry."""

    def _check(self, positive: tuple[str, ...]) -> None:
        """Refuse numbers that are not finite, or not positive where they should be."""
        for field in _fields(self):
            call = f"priors.{type(self).__name__.removesuffix('Prior')}({field.name}=...)"
            check_numbers(getattr(self, field.name), call, is_positive=field.name in positive)

    def _numbers(
        self, leaves: dict[str, Tensor], dtype: torch.dtype, call: str | None = None
    ) -> dict[str, dict[str, Tensor]]:
        """The numbers of each leaf, by name of the field."""
        quoted = call or f"priors.{type(self).__name__.removesuffix('Prior')}.log_prob(params)"
        fields = {
            field.name: by_leaf(getattr(self, field.name), leaves, dtype, quoted, field.name)
            for field in _fields(self)
        }
        return {name: {field: values[name] for field, values in fields.items()} for name in leaves}

    def _expected(self, mean: Params, variance: Params) -> Tensor:
        """Sum :meth:`_expected_log_density` over all leaves."""
        leaves, spread = parameters_of(mean), parameters_of(variance)
        dtype = at_least_single(dtype_of(leaves))
        numbers = self._numbers(leaves, dtype)
        terms = [
            self._expected_log_density(leaf.to(dtype), spread[name].to(dtype), numbers[name]).sum()
            for name, leaf in leaves.items()
        ]
        return _total(terms, dtype)

    def _expected_log_density(self, mean: Tensor, variance: Tensor, numbers: Mapping[str, Tensor]) -> Tensor:
        """Entry by entry."""
        raise NotImplementedError


def _fields(prior: Any) -> tuple[Any, ...]:
    return dataclasses.fields(prior)


def _is_one(value: Any) -> bool:
    return isinstance(value, float | int) or (isinstance(value, Tensor) and not value.ndim)


def _total(terms: list[Tensor], dtype: torch.dtype) -> Tensor:
    if len(terms) == 1:
        return terms[0]
    return torch.stack(terms).sum() if terms else torch.zeros((), dtype=dtype)
