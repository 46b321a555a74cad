"""A model evaluated on a batch, with its layers written down; for several networks at once, too."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._functional import Model
from .._functorch import map_first_axis
from .._intercept import Batching
from .._tree import Fixed, Params, map_named, named_leaves, num_rows
from ._tape import LayerCall, RowsMixError, Tape

Signature = tuple[tuple[str, str | None, str | None], ...]  # kind and leaves of each layer


@dataclass(frozen=True)
class Taped:
    """A model evaluated on a batch.

    Attributes:
        outputs: ``(M, N, *event)``, with a graph.
        calls: The layers on the way.
        leaves: The chosen leaves that were given to the model, which require gradients.
        others: Names of those that went into something else than a layer's weight or bias.
    """

    outputs: Tensor
    calls: Sequence[LayerCall]
    leaves: Mapping[str, Tensor]
    others: set[str]


class UnmappableError(RuntimeError):
    """A model that ``vmap`` cannot map over members."""


def tape(
    fn: Model,
    params: Params,
    names: Sequence[str],
    x: Any,
    *,
    num_members: int | None = None,
    keep_outputs: bool = False,
) -> Taped:
    """Evaluate a model and write down its layers.

    Args:
        fn: Pure model.
        params: Its parameters; with ``num_members`` all leaves have a leading axis of members.
        names: The chosen leaves.
        x: Inputs, the same for all members.
        num_members: ``M``; ``None`` for a single network, which gets an axis of one.
        keep_outputs: Whether the tape keeps outputs.
    """
    chosen = set(names)
    given = map_named(lambda name, leaf: _as_given(leaf, name in chosen), params)
    leaves = {name: leaf for name, leaf in named_leaves(given).items() if name in chosen}
    calls: list[LayerCall] = []
    others: set[str] = set()

    def run(part: Params) -> Tensor:
        ids = {id(leaf): name for name, leaf in named_leaves(part).items() if name in chosen}
        with Tape(ids, keep_outputs=keep_outputs) as mode:
            outputs = fn(part, x)
        calls.extend(mode.calls)
        others.update(mode.others)
        return outputs

    with torch.inference_mode(False), torch.enable_grad():
        if num_members is None:
            outputs = run(given)
            if not isinstance(outputs, Tensor):
                raise TypeError(
                    f"`fn(params, x)` should return one tensor, got {type(outputs).__name__}. Pick one: "
                    "`lambda params, x: fn(params, x)[...]`."
                )
            return Taped(outputs.unsqueeze(0), calls, leaves, others)

        def mapped(part: Params, kind: str) -> Tensor:
            with Batching(kind):
                return run(part)

        try:
            kind = "channels_last" if (num_rows(x) or 1) >= 4 else "rows_first"
            outputs = map_first_axis(lambda part: mapped(part, kind), given, num_members)
        except RowsMixError:
            raise
        except Exception:  # a batching rule stands in the model's way
            calls.clear()
            try:
                outputs = map_first_axis(lambda part: mapped(part, "vmap"), given, num_members)
            except Exception as error:
                raise UnmappableError("`vmap` over members cannot take the model.") from error
        return Taped(outputs, calls, leaves, others)


def _as_given(leaf: Any, is_chosen: bool) -> Any:
    if isinstance(leaf, Fixed):
        return Fixed(leaf.tensor.detach())
    if not isinstance(leaf, Tensor):
        return leaf
    leaf = leaf.clone() if leaf.is_inference() else leaf.detach()
    return leaf.requires_grad_() if is_chosen else leaf


def signature_of(taped: Taped) -> Signature:
    """What layers were called, and what was used otherwise."""
    others: list[tuple[str, str | None, str | None]] = [
        ("other", name, None) for name in sorted(taped.others)
    ]
    return (*((layer.kind, layer.weight, layer.bias) for layer in taped.calls), *others)
