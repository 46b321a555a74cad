"""What a prior can do."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from numbers import Real
from typing import ClassVar

import torch
from torch import Tensor

from .._tree import Params, difference, parameters_of
from ..covariances._flat import at_least_single, dtype_of
from ._numbers import Range, by_leaf, check_numbers, check_rounded

Values = Mapping[str, Tensor]  # numbers of one leaf by name of the field, each a scalar or like the leaf


class Prior(ABC):
    """A density over the parameters of a tree, independent between them.

    Its numbers are one for all parameters, or trees with a number, or a tensor like the leaf, for each leaf;
    trees may have more leaves than the parameters they are used with. ``Fixed`` leaves and integers have no
    density and are passed by. All but ``check`` works under ``torch.func`` transforms, with parameters and
    tensors of the prior mapped over alike, and is differentiable in both.

    A prior says which of its fields are such numbers, and what the density of one parameter is.

    Attributes:
        ranges: By name of the field, where its numbers should be.
    """

    ranges: ClassVar[Mapping[str, Range]] = {}

    def __post_init__(self) -> None:
        for field, allowed in self.ranges.items():
            check_numbers(getattr(self, field), allowed, self._call(field))

    def log_prob(self, params: Params) -> Tensor:
        """Find ``log p(theta)``, **summed** over all parameters.

        Args:
            params: Values, leaves of any shape.

        Returns:
            A scalar in the dtype that the leaves promote to, computed in at least single precision.

        Raises:
            ValueError: If the prior has no number for a leaf, or a tensor of another shape.
        """
        leaves = parameters_of(params)
        total = self._sum(self._log_density, leaves)
        assert total is not None
        return total.to(dtype_of(leaves))

    def expected_log_prob(self, mean: Params, variance: Params) -> Tensor | None:
        """Find ``E log p(theta)`` for a Gaussian with these marginals, **summed** over all parameters.

        Correlations of the Gaussian do not matter, because the prior is independent between parameters.

        Args:
            mean: Means, leaves ``s``.
            variance: Variances (not standard deviations), leaves ``s``, zero or positive.

        Returns:
            A scalar in at least single precision, also where the leaves have less: differences of it and an
            entropy are small beside both. ``None`` if there is no closed form.

        Raises:
            ValueError: If ``variance`` is not like ``mean``, or the prior does not have their leaves.
        """
        means, variances = parameters_of(mean), parameters_of(variance)
        differing = difference({name: v for name, v in variances.items() if name in means}, means)
        if differing:
            raise ValueError(
                "`expected_log_prob(mean, variance)` should have a variance for each parameter of `mean`; "
                f"{differing}."
            )
        return self._sum(self._expected_log_density, means, variances)

    def check(self, params: Params, call: str) -> None:
        """Refuse a prior that does not fit parameters.

        Args:
            params: The parameters, leaves of any shape.
            call: How the user called us, for the message: ``"vi.fit(prior=...)"``.

        Raises:
            ValueError: If a leaf has no number, or a tensor of another shape, or numbers are out of range in
                the dtype that the density is computed in.
        """
        leaves = parameters_of(params)
        dtype = at_least_single(dtype_of(leaves))
        for field, allowed in self.ranges.items():
            named = f"`{field}` in `{call}`"
            check_rounded(by_leaf(getattr(self, field), leaves, dtype, named), allowed, named)

    @property
    def is_the_same_everywhere(self) -> bool:
        """Whether all parameters have one density."""
        values = [getattr(self, field) for field in self.ranges]
        return all(isinstance(v, Real) or (isinstance(v, Tensor) and not v.ndim) for v in values)

    @abstractmethod
    def _log_density(self, theta: Tensor, numbers: Values) -> Tensor:
        """``log p`` of each entry of a leaf, in the dtype of ``theta``."""

    def _expected_log_density(self, mean: Tensor, variance: Tensor, numbers: Values) -> Tensor | None:
        """``E log p`` of each entry of a leaf; ``None`` if there is no closed form."""
        del mean, variance, numbers
        return None

    def _sum(self, density: Callable[..., Tensor | None], *trees: dict[str, Tensor]) -> Tensor | None:
        """Sum ``density(*leaves, numbers)`` over all leaves; ``None`` if it has no value."""
        first = trees[0]
        dtype = at_least_single(dtype_of(first))
        fields = {
            field: by_leaf(getattr(self, field), first, dtype, self._call(field)) for field in self.ranges
        }
        terms = []
        for name in first:
            numbers = {field: values[name] for field, values in fields.items()}
            term = density(*(tree[name].to(dtype) for tree in trees), numbers)
            if term is None:
                return None
            terms.append(term.sum())
        if len(terms) == 1:
            return terms[0]
        device = terms[0].device if terms else None
        return torch.stack([t.to(device) for t in terms]).sum() if terms else torch.zeros((), dtype=dtype)

    def _call(self, field: str) -> str:
        """How the user made us, for messages."""
        return f"`priors.{type(self).__name__.removesuffix('Prior')}({field}=...)`"
