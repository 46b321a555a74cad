"""The Gaussian prior of a Laplace approximation, in the forms in which users say it."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._functorch import is_concrete
from .._tree import Params, Where, difference, matcher, named_leaves, parameters_of
from ..covariances import Diagonal, Kronecker, LowRankPrecision
from ..covariances._flat import as_double, ravel
from ..curvature._curvature import Structure
from ..posteriors import Gaussian

Numbers = float | Tensor | Params  # one number, or a tree of numbers or of tensors like the parameters


@dataclass(frozen=True)
class Prior:
    """A Gaussian over the covered leaves; numbers are in double precision.

    Attributes:
        mean: By leaf, a number or like the leaf.
        precision: By leaf, a number or like the leaf, in one over squared units of the parameter; ``None``
            where the prior has correlations.
        gaussian: The prior itself where it has.
    """

    mean: dict[str, Tensor]
    precision: dict[str, Tensor] | None
    gaussian: Gaussian | None = None

    @classmethod
    def of(
        cls,
        leaves: dict[str, Tensor],
        prior_precision: Numbers,
        prior_mean: Numbers,
        prior: Gaussian | None,
        call: str,
    ) -> "Prior":
        """Check what was given for the leaves that a curvature covers."""
        if prior is not None:
            return cls._of_gaussian(leaves, prior, prior_precision, prior_mean, call)
        precision = by_leaf(prior_precision, leaves, f"{call}(prior_precision=...)")
        for name, number in precision.items():
            if not is_concrete(number):
                continue
            low, high = (float(bound) for bound in torch.aminmax(number.detach()))
            if not (low > 0 and high < math.inf):
                raise ValueError(
                    f"`{call}(prior_precision=...)` should be positive and finite, got a smallest number of "
                    f"{low:.3g} and a largest of {high:.3g} for {name!r}. A parameter that the data say "
                    "nothing of has no other precision."
                )
        return cls(by_leaf(prior_mean, leaves, f"{call}(prior_mean=...)"), precision)

    @classmethod
    def _of_gaussian(
        cls, leaves: dict[str, Tensor], prior: Any, prior_precision: Numbers, prior_mean: Numbers, call: str
    ) -> "Prior":
        if not isinstance(prior, Gaussian):
            raise TypeError(f"`{call}(prior=...)` should be a Gaussian, got {type(prior).__name__}.")
        if not all(isinstance(n, float | int) for n in (prior_precision, prior_mean)) or (
            (prior_precision, prior_mean) != (1.0, 0.0)
        ):
            raise ValueError(
                f"`{call}(prior=...)` has a mean and a precision: leave out `prior_mean` and "
                "`prior_precision`."
            )
        location = parameters_of(prior.mean)
        differing = difference(location, leaves)
        if differing:
            raise ValueError(
                f"`{call}(prior=...)` should be over the leaves that the curvature covers; {differing}. "
                "`restrict(prior, where)` leaves leaves out."
            )
        reason = prior.covariance.singular()
        if reason:
            raise ValueError(f"`{call}(prior=...)` should have a precision, but {reason}.")
        mean = {name: as_double(location[name]) for name in leaves}
        if isinstance(prior.covariance, Diagonal):
            variance = named_leaves(prior.covariance.variance)
            return cls(mean, {name: 1 / as_double(variance[name]) for name in leaves})
        return cls(mean, None, prior)

    def logdet(self, leaves: dict[str, Tensor]) -> Tensor:
        """Log-determinant of the precision."""
        if self.precision is None:
            assert self.gaussian is not None
            return self.gaussian.covariance.inverse().logdet()
        terms = [
            number.log().sum() * (leaves[name].numel() // max(number.numel(), 1))
            for name, number in self.precision.items()
        ]
        return torch.stack(terms).sum()

    def quadratic(self, leaves: dict[str, Tensor]) -> Tensor:
        """``(theta - mean)^T precision (theta - mean)``."""
        shift = {name: as_double(leaf.detach()) - self.mean[name] for name, leaf in leaves.items()}
        if self.precision is None:
            assert self.gaussian is not None
            column = ravel(shift, self.gaussian.covariance.like).unsqueeze(-1)
            return self.gaussian.covariance.inverse().quadratic(column)
        return torch.stack([(self.precision[name] * shift[name].square()).sum() for name in leaves]).sum()

    def numbers(self) -> dict[str, Tensor]:
        """One precision a leaf, where it goes with ``"kron"``."""
        assert self.precision is not None
        return {name: precision.reshape(-1)[:1].reshape(()) for name, precision in self.precision.items()}

    def check_goes_with(self, structure: Structure, call: str) -> None:
        """Refuse a prior with which a curvature of a structure has no sum of that structure."""
        if structure == "full":
            return
        if self.gaussian is not None:
            goes = Kronecker if structure == "kron" else LowRankPrecision
            other = "one precision a leaf" if structure == "kron" else "independent parameters"
            found = self.gaussian.covariance
            if not isinstance(found, goes):
                raise NotImplementedError(
                    f"`{call}(prior=...)` with a curvature of structure {structure!r} should have {other}, "
                    f"or a {goes.__name__} covariance, got a {type(found).__name__}: their sum has no "
                    "structure. Write `structure='full'`, or the structure that the prior was found with."
                )
        elif structure == "kron":
            self._check_numbers(call)

    def _check_numbers(self, call: str) -> None:
        numbers, precision = self.numbers(), self.precision or {}
        for name, number in numbers.items():
            if is_concrete(precision[name]) and not bool((precision[name] == number).all()):
                raise ValueError(
                    f"`{call}(...)` with a curvature of structure 'kron' should be given a prior precision "
                    f"of one number, or one for each leaf, got several for {name!r}. One for each "
                    "parameter goes with 'diag', 'low_rank' and 'full'."
                )


def chosen_leaves(params: Params, where: Where | None) -> dict[str, Tensor]:
    """The parameters that ``where`` chooses, by path."""
    chosen = matcher(where)
    return {name: leaf for name, leaf in parameters_of(params).items() if chosen(name, leaf)}


def by_leaf(value: Numbers, leaves: dict[str, Tensor], call: str) -> dict[str, Tensor]:
    """A number, or a tree of numbers or of tensors like the leaves, by path, in double precision."""
    if isinstance(value, bool) or value is None:
        raise TypeError(f"`{call}` should be a number or a tree of numbers, got {type(value).__name__}.")
    if isinstance(value, float | int | Tensor):
        if isinstance(value, Tensor) and value.ndim:
            raise ValueError(
                f"`{call}` should be one number, or a tree with a number or a tensor for each leaf, got one "
                f"tensor of shape {tuple(value.shape)}."
            )
        device = next((leaf.device for leaf in leaves.values()), None)
        return dict.fromkeys(leaves, as_double(torch.as_tensor(value).to(device)))
    if isinstance(value, str):
        raise TypeError(f"`{call}` should be a number or a tree of numbers, got {type(value).__name__}.")
    given = named_leaves(value)
    found = {}
    for name, leaf in leaves.items():
        if name not in given:
            raise ValueError(f"`{call}` should have a number for each leaf; {name!r} is missing.")
        number = torch.as_tensor(given[name]).to(leaf.device)
        if number.ndim and number.shape != leaf.shape:
            raise ValueError(
                f"`{call}` should have a number, or a tensor like the leaf, for each leaf; {name!r} has "
                f"shape {tuple(number.shape)}, not {tuple(leaf.shape)}."
            )
        found[name] = as_double(number)
    return found
