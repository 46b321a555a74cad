"""One draw of a posterior as a function of the inputs."""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._checks import check_model
from ._functional import Model
from ._intercept import DropoutMasks
from ._predict import predict
from ._random import Seed, resolve_seed
from ._tree import Params
from .posteriors import Ensemble, Posterior


def sample_function(
    fn: Model, params: Params, posterior: Posterior, *, seed: Seed | None = None, index: int = 0
) -> "SampledFunction":
    """Draw one function ``x -> outputs`` from the distribution over functions that a posterior gives.

    For Thompson sampling (Thompson 1933): every call uses the same draw, so values at different inputs
    belong together.

    Args:
        fn: Pure model.
        params: Parameters that the posterior does not cover; ``None`` if it covers them all.
        posterior: Any posterior. Dropout has to share its masks among rows.
        seed: Draws are a function of it; ``None`` takes one number from torch's global state.
        index: Number of the draw, that of the draw in ``predict`` with the same seed.

    Returns:
        A function of ``x`` that can be pickled if ``fn`` can.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If ``index`` is negative, or a draw is no function of ``x`` because its dropout masks
            differ from row to row.

    Example:
        >>> import torch, funcbayes as fb
        >>> gaussian = fb.Gaussian({"w": torch.zeros(1)}, fb.covariances.Diagonal({"w": torch.ones(1)}))
        >>> f = fb.sample_function(lambda params, x: x @ params["w"], None, gaussian, seed=0)
        >>> x = torch.linspace(-1, 1, 101)[:, None]
        >>> best = x[f(x).argmax()]  # where this draw is largest
        >>> torch.equal(f(x)[:1], f(x[:1]))
        True
    """
    check_model(fn, "sample_function")
    if not isinstance(posterior, Posterior):
        raise TypeError(
            "`sample_function(fn, params, posterior)` should be given a posterior, got "
            f"{type(posterior).__name__}."
        )
    if isinstance(index, bool) or not hasattr(index, "__index__"):
        raise TypeError(f"`sample_function(index=...)` should be an int, got {type(index).__name__}.")
    index = operator.index(index)
    if index < 0:
        raise ValueError(f"`sample_function(index=...)` should be at least 0, got {index}.")
    draw = posterior.draws(torch.tensor([index]), resolve_seed(seed))
    masks = [effect for effect in draw.effects if isinstance(effect, DropoutMasks)]
    if not all(mask.shared_mask for mask in masks):
        raise ValueError(
            "`sample_function(fn, params, posterior)` should be given a posterior whose draws are functions "
            "of x; the masks of this dropout differ from row to row. Write `Dropout(shared_mask=True)`."
        )
    return SampledFunction(fn, params, Ensemble(draw.leaves, effects=draw.effects))


@dataclass(frozen=True, eq=False)
class SampledFunction:
    """A function of ``x``, made by :func:`sample_function`.

    Attributes:
        fn: Pure model.
        params: What the draw does not cover.
        draw: The draw, as an ensemble of one.
    """

    fn: Model
    params: Params
    draw: Ensemble

    def __call__(self, x: Any) -> Tensor:
        """Outputs at ``x``, ``(N, ...)``."""
        return predict(self.fn, self.params, self.draw, x).samples[0]
