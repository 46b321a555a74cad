"""Independent parameters."""

from torch import Tensor

from .._functorch import is_concrete
from .._random import Seed, fold, keys_by_name, normal
from .._tree import Params, is_parameter, map_leaves, map_named, named_leaves, pytree_dataclass
from ._interface import Covariance, total


@pytree_dataclass
class Diagonal(Covariance):
    """A diagonal covariance.

    Attributes:
        variance: Variance of each parameter, in squared units of the parameter, zero or positive; a
            tree like the mean's parameters, leaves ``s``.

    Raises:
        TypeError: If a leaf is not a tensor of floating point.
        ValueError: If a variance is negative or not finite.

    Example:
        >>> import torch, funcbayes as fb
        >>> fb.covariances.Diagonal({"w": torch.full((2, 3), 0.25)}).logdet()
        tensor(-8.3178)
    """

    variance: Params

    def __post_init__(self) -> None:
        for name, leaf in named_leaves(self.variance).items():
            if not is_parameter(leaf):
                raise TypeError(
                    f"`Diagonal(variance)` should have floating-point tensors as leaves; {name!r} is "
                    f"{getattr(leaf, 'dtype', type(leaf).__name__)}. Leave out what is not a parameter."
                )
            if is_concrete(leaf) and not bool((leaf >= 0).all() & leaf.isfinite().all()):
                raise ValueError(
                    f"`Diagonal(variance)` should be finite and not negative; {name!r} has a smallest "
                    f"entry of {leaf.detach().min():.3g}."
                )

    def deviations(self, indices: Tensor, seed: Seed) -> Params:
        """Draw ``sqrt(variance) * z``, leaves ``(S, *s)``."""
        keys = keys_by_name(fold(seed, indices), named_leaves(self.variance))

        def deviate(name: str, variance: Tensor) -> Tensor:
            noise = normal(keys[name], variance.shape, dtype=variance.dtype, device=variance.device)
            return noise * variance.sqrt()

        return map_named(deviate, self.variance)

    def diagonal(self) -> Params:
        """Variance of each parameter, leaves ``s``."""
        return self.variance

    def matvec(self, vector: Params) -> Params:
        """Multiply the covariance with a tree."""
        return map_leaves(lambda s, v: s * v, self.variance, vector)

    def solve(self, vector: Params) -> Params:
        """Multiply the precision with a tree."""
        return map_leaves(lambda s, v: v / s, self.variance, vector)

    def logdet(self) -> Tensor:
        """Log-determinant of the covariance, a scalar."""
        return total([leaf.log().sum() for leaf in named_leaves(self.variance).values()])

    def quadratic_form(self, vector: Params) -> Tensor:
        """``sum v^2 / variance``, a scalar."""
        scaled = named_leaves(map_leaves(lambda s, v: v * v / s, self.variance, vector))
        return total([leaf.sum() for leaf in scaled.values()])
