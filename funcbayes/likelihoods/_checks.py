"""Checks that likelihoods share. Shapes and dtypes only, so they work inside transforms."""

from typing import Any

import torch
from torch import Tensor

from .._checks import positive_int
from ._likelihood import Likelihood


def check_outputs(outputs: Any, call: str) -> None:
    """Refuse outputs that are not a floating-point tensor with an axis of rows."""
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"`outputs` in `{call}` should be a tensor, got {type(outputs).__name__}. If the network "
            "returns something else, let `fn(params, x)` pick the tensor out of it."
        )
    if not outputs.is_floating_point():
        raise TypeError(f"`outputs` in `{call}` should be of floating point, got {outputs.dtype}.")
    if outputs.ndim == 0:
        raise ValueError(f"`outputs` in `{call}` should have an axis of rows, (N, ...), got a scalar.")


def check_targets(y: Any, expected: torch.Size, outputs: Tensor, call: str) -> None:
    """Refuse targets whose shape is not exactly ``expected``, even if they would broadcast."""
    if not isinstance(y, Tensor):
        raise TypeError(f"`y` in `{call}` should be a tensor, got {type(y).__name__}.")
    if y.shape == expected:
        return
    message = (
        f"`y` in `{call}` should have shape {tuple(expected)} for outputs of shape "
        f"{tuple(outputs.shape)}, got {tuple(y.shape)}."
    )
    same = expected == outputs.shape
    if (*y.shape, 1) == expected:
        longer = "`y[:, None]`" if y.ndim == 1 else "`y.unsqueeze(-1)`"
        message += f" Write {longer}" + (" or `outputs.squeeze(-1)`." if same else ".")
    elif y.shape == (*expected, 1):
        message += " Write `y.squeeze(-1)`" + (" or `outputs.unsqueeze(-1)`." if same else ".")
    raise ValueError(message)


def check_finite(y: Tensor, call: str) -> None:
    """Refuse NaN and infinity; looks at values."""
    if y.is_floating_point() and not bool(y.isfinite().all()):
        raise ValueError(
            f"`y` in `{call}` should be finite, got NaN or infinity. Leave rows without a target out."
        )


def check_num_samples(num_samples: int | None, call: str) -> None:
    """Refuse fewer than one draw."""
    if num_samples is not None:
        positive_int(num_samples, f"{call}(num_samples=...)")


def check_is_likelihood(likelihood: object, call: str) -> None:
    """Refuse what is no likelihood: a loss, or the class of one."""
    if not isinstance(likelihood, Likelihood):
        raise TypeError(
            f"`{call}` should be one of `funcbayes.likelihoods`, such as `likelihoods.Categorical()`, "
            f"got {likelihood!r}."
        )


def unavailable(likelihood: object, method: str, reason: str) -> NotImplementedError:
    """Make the error for a method that this likelihood cannot have."""
    return NotImplementedError(f"`{type(likelihood).__name__}.{method}` is not implemented: {reason}")


NO_CLASSES = "its targets are no classes. See `is_discrete`."
NO_ORDER = "its targets are classes, which have no distribution function. Use `mean` for their probabilities."
