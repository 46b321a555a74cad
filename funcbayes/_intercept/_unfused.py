"""Operations by parts that have derivatives of every kind, as fused kernels do not."""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._attention import attention_weights, open_attention
from ._by_parts import BY_PARTS, done_by_parts
from ._call import Interception

Args = tuple[Any, ...]

# Those of torch are the whole process's; a mode around another one comes here again in the same thread.
_switches = threading.RLock()


class Unfused(Interception):
    """Attention, recurrent layers, weight normalisation, bags and PReLU without fused kernels.

    And embeddings whose padding has no derivative in forward mode either, as it has none in backward mode:
    otherwise ``J v`` and ``J^T u`` would be of different matrices.
    """

    def __init__(self) -> None:
        super().__init__(
            {
                F.multi_head_attention_forward: open_attention,
                F.scaled_dot_product_attention: _attention,
                F.embedding: _without_padding,
                **{
                    func: functools.partial(done_by_parts, BY_PARTS[func])
                    for func in (torch._weight_norm, F.embedding_bag)
                },
                **dict.fromkeys((F.prelu, torch.Tensor.prelu), _prelu),
                **dict.fromkeys((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu), _recurrent),
            }
        )


def _attention(mode: Interception, func: Callable[..., Any], args: Args, kwargs: dict[str, Any]) -> Tensor:
    weights, value = attention_weights(*args, **kwargs)
    return weights @ value


def _without_padding(
    mode: Interception, func: Callable[..., Any], args: Args, kwargs: dict[str, Any]
) -> Tensor:
    looked = func(*args, **kwargs)
    given = dict(zip(("input", "weight", "padding_idx"), args, strict=False)) | kwargs
    padding = given.get("padding_idx")
    if padding is None:
        return looked
    is_padding = given["input"] == padding % given["weight"].shape[0]
    return torch.where(is_padding.unsqueeze(-1), looked.detach(), looked)


def _prelu(mode: Interception, func: Callable[..., Any], args: Args, kwargs: dict[str, Any]) -> Tensor:
    # Its rule for `vmap` does not take rows that are mapped over twice.
    given = dict(zip(("input", "weight"), args, strict=False)) | kwargs
    value, slope = given["input"], given["weight"].to(given["input"].dtype)
    slope = slope.reshape(-1, *(1 for _ in value.shape[2:])) if slope.numel() > 1 else slope.reshape(())
    return torch.where(value > 0, value, slope * value)


def _recurrent(mode: Interception, func: Callable[..., Any], args: Args, kwargs: dict[str, Any]) -> Any:
    with _native_kernels():
        return func(*args, **kwargs)


@contextmanager
def _native_kernels() -> Iterator[None]:
    """Keep to torch's own kernels; one thread at a time, or one would put back another's setting."""
    with _switches:
        backends: tuple[Any, ...] = (torch.backends.mkldnn, torch.backends.cudnn)
        before = [backend.enabled for backend in backends]
        try:
            for backend in backends:
                backend.enabled = False
            yield
        finally:
            for backend, was in zip(backends, before, strict=True):
                backend.enabled = was
