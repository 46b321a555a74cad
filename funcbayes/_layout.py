"""Images in the layout in which kernels are fastest on a CPU, and whether outputs are the same then."""

from typing import Any

import torch
from torch import Tensor

from ._functorch import is_concrete
from ._tree import tensors

_LAST_DIGITS = 64  # so many units in the last place of the largest output are taken for rounding


def has_other_layout(x: Tensor) -> bool:
    """Whether these are images on the CPU that are not in the layout in which kernels are fastest."""
    is_image = x.ndim == 4 and x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
    return is_image and is_concrete(x) and not x.is_contiguous(memory_format=torch.channels_last)


def channels_last(leaf: Any) -> Any:
    """Images in that layout; whatever else it is as it is."""
    is_other = isinstance(leaf, Tensor) and has_other_layout(leaf)
    return leaf.contiguous(memory_format=torch.channels_last) if is_other else leaf


def agree(outputs: Tensor, expected: Tensor, x: Any) -> bool:
    """Whether outputs are the same but for rounding: to half of the digits of the largest of a column.

    The digits are those of the outputs or of the inputs, whichever have fewer. Of the largest of all outputs
    a few of the last ones may differ, too: a column may be what is left of a difference.
    """
    if outputs.shape != expected.shape or outputs.dtype != expected.dtype:
        return False
    if not outputs.is_floating_point() or not outputs.numel():
        return torch.equal(outputs, expected)
    rows = expected.nan_to_num(0, 0, 0).abs().reshape(-1, expected.shape[-1] if expected.ndim > 1 else 1)
    dtypes = {t.dtype for t in (outputs, *tensors(x)) if t.is_floating_point()}
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    tolerance = (eps**0.5 * rows.amax(0)).clamp_min(_LAST_DIGITS * eps * rows.max())
    is_near = (outputs - expected).abs() <= tolerance
    is_same = (outputs == expected) | (outputs.isnan() & expected.isnan())
    return bool((is_near | is_same).all())
