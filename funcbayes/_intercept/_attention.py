"""Attention, opened: its parts called one by one, where a fused kernel would hide them."""

import functools
import inspect
import math
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._call import Interception


def _projected(
    by_torch: Callable[..., Sequence[Tensor]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
) -> Sequence[Tensor]:
    """Queries, keys and values by one packed weight.

    Those of self-attention are unbound from one product. Torch selects them one by one; in a backward pass
    each selection makes a buffer of zeros as large as all three, and a sum.
    """
    if not (query is key is value):
        return by_torch(query, key, value, weight, bias)
    packed = F.linear(query, weight, bias)
    return packed.unflatten(-1, (3, query.shape[-1])).movedim(-2, 0).contiguous().unbind()


_PROJECTION = ("_in_projection_packed",)  # torch's own name for it, which another version may not have

# Attention is one Python function built of others. A mode is off while it serves a call, so the
# linear maps and the dropout inside would not be seen; with the mode on, the function's first
# line would hand the call back to the mode for ever. This is the same code with that line
# made to say that nobody wants the call.
_attention_body = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {
        **vars(F),
        "has_torch_function": lambda args: False,
        **{name: functools.partial(_projected, vars(F)[name]) for name in _PROJECTION if name in vars(F)},
    },
    argdefs=F.multi_head_attention_forward.__defaults__,
)


def open_attention(
    mode: Interception, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call attention by its parts."""
    with mode:
        return _attention_body(*args, **kwargs)


def drops_weights(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call of multi-head attention drops some of its weights."""
    given = dict(zip(_ATTENTION_ARGUMENTS, args, strict=False)) | kwargs
    return bool(given["dropout_p"] and given.get("training", True))


_ATTENTION_ARGUMENTS = (*inspect.signature(F.multi_head_attention_forward).parameters,)


def attention_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """Weights of scaled dot-product attention as torch documents it, before dropout, and the values."""
    del dropout_p
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (t.repeat_interleave(groups, -3) for t in (key, value))
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(attn_mask.logical_not(), -math.inf)
        else:
            scores = scores + attn_mask
    empty = scores.isneginf().all(-1, keepdim=True)  # may attend to nothing, and gets nothing
    return torch.softmax(scores.masked_fill(empty, 0), -1).masked_fill(empty, 0), value
