"""Batching rules for attention: the draws stand among the rows, which kernels of attention know."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._functorch import unwrap, wrap
from ._mapped import draws_first, of_each_draw, one_dtype, product


def attention(
    level: int,
    channels_last: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    given = [t for t in (query, key, value, attn_mask) if t is not None]
    draws = next((f.shape[0] for f in (draws_first(t, level) for t in given) if f is not None), None)
    if dropout_p or draws is None or min(t.ndim for t in (query, key, value)) < 3:
        return None
    count = draws

    def fold(tensor: Tensor, rows: tuple[int, ...]) -> Tensor:
        """``(S * ..., heads, length, width)``: kernels know one axis of rows and one of heads."""
        tensor = of_each_draw(tensor, count, level)
        missing = (1,) * (len(rows) + 3 - tensor.ndim)
        tensor = tensor.reshape(count, *missing, *tensor.shape[1:])
        if enable_gqa and tensor.shape[-3] > 1:  # groups of heads of the query have one key and value
            tensor = tensor.repeat_interleave(rows[-1] // tensor.shape[-3], -3)
        return tensor.expand(count, *rows, *tensor.shape[-2:]).flatten(0, len(rows) - 1)

    leading = [t.shape[:-2] for t in (query, key, value)]
    if enable_gqa:
        leading = [(*shape[:-1], query.shape[-3]) for shape in leading]
    rows = torch.broadcast_shapes(*leading)
    folded = [fold(t, rows) for t in (query, key, value)]
    if attn_mask is not None and (attn_mask.ndim > 2 or unwrap(attn_mask, level)[1] is not None):
        attn_mask = fold(attn_mask, rows)
    out = F.scaled_dot_product_attention(*folded, attn_mask=attn_mask, is_causal=is_causal, scale=scale)
    return wrap(out.reshape(count, *rows, *out.shape[-2:]), 0, level)


def multi_head(
    level: int,
    channels_last: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, None] | None:
    """Self-attention with weights of each draw, as encoders have it.

    Other calls are opened: their parts, which are many, have rules of their own.
    """
    if query is not key or key is not value or query.ndim != 3 or in_proj_weight is None:
        return None
    if add_zero_attn or need_weights or use_separate_proj_weight or (training and dropout_p):
        return None
    if any(t is not None for t in (bias_k, bias_v, static_k, static_v, key_padding_mask)):
        return None
    if is_causal != (attn_mask is not None):  # a causal call comes with the mask that says the same
        return None
    weights, out_weights = draws_first(in_proj_weight, level), draws_first(out_proj_weight, level)
    if weights is None or out_weights is None:
        return None
    if not one_dtype(query, in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias):
        return None
    length, count, width = query.shape
    draws = len(weights)
    if width != embed_dim_to_check or width % num_heads:
        return None  # torch says what is wrong

    def biases(bias: Tensor | None) -> Tensor | None:
        return None if bias is None else of_each_draw(bias, draws, level)

    values = of_each_draw(query, draws, level).transpose(1, 2)
    shape = (draws, count * length, width)
    rows = product(biases(in_proj_bias), values.reshape(shape), weights.mT, 1)
    heads = rows.view(draws * count, length, 3, num_heads, width // num_heads)
    query, key, value = (part.transpose(1, 2) for part in heads.unbind(2))
    out = F.scaled_dot_product_attention(query, key, value, is_causal=is_causal).transpose(1, 2)
    out = product(biases(out_proj_bias), out.reshape(shape), out_weights.mT, 1)
    return wrap(out.view(draws, count, length, out.shape[-1]).transpose(1, 2), 0, level), None
