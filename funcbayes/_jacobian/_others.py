"""Gradients of leaves that no layer shows, by differentiating each row by itself."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import optree
import torch
from torch import Tensor
from torch.func import vjp, vmap

from .._functional import Model
from .._functorch import load_forward_rules, quiet_fallbacks
from .._intercept import Unfused
from .._remember import Remembered
from .._tree import Params, index, map_named, named_leaves
from .._warning import first_line, levels_to_the_user
from ._gradients import BLOCK_BYTES, RowGradients
from ._layers import formed

_warned: Remembered[list[bool]] = Remembered()


def gradients_of_others(
    fn: Model, params: Params, names: Sequence[str], x: Any, columns: Tensor, num_members: int | None
) -> dict[str, RowGradients]:
    """Gradients of some leaves for columns ``(K, M, N, *event)``.

    Args:
        fn: Pure model.
        params: Its parameters; with ``num_members`` all leaves have a leading axis.
        names: The leaves.
        x: Inputs, ``N`` rows.
        columns: Cotangents of the outputs.
        num_members: ``M``; ``None`` for a single network.
    """
    if not names or not len(columns):
        return {}
    networks = [params] if num_members is None else [index(params, k) for k in range(num_members)]
    of_members = [_of_network(fn, network, names, x, columns[:, k]) for k, network in enumerate(networks)]
    return {
        name: formed(_stacked([found[name] for found in of_members]), of_members[0][name].shape[2:])
        for name in names
    }


def _of_network(
    fn: Model, params: Params, names: Sequence[str], x: Any, columns: Tensor
) -> dict[str, Tensor]:
    """Gradients ``(K, N, *s)`` by name, for columns ``(K, N, *event)``."""
    chosen = {name: leaf.detach() for name, leaf in named_leaves(params).items() if name in names}
    leaves, spec = optree.tree_flatten(x)
    has_rows = [isinstance(leaf, Tensor) and leaf.ndim > 0 for leaf in leaves]

    def outputs(chosen: dict[str, Tensor], row: Sequence[Any]) -> Tensor:
        given = map_named(lambda name, leaf: chosen.get(name, leaf), params)
        own = [leaf.unsqueeze(0) if is_row else leaf for leaf, is_row in zip(row, has_rows, strict=True)]
        whole: Any = spec.unflatten(own)
        with Unfused():
            return fn(given, whole)[0]

    def of_row(row: Sequence[Any], column: Tensor) -> dict[str, Tensor]:
        pulled: Any = vjp(lambda c: outputs(c, row), chosen)
        return vmap(lambda c: pulled[1](c)[0])(column)

    dims = ([0 if is_row else None for is_row in has_rows], 1)
    count = columns.shape[1]
    each = sum(leaf.numel() for leaf in chosen.values()) * len(columns) * columns.element_size()
    size = max(BLOCK_BYTES // max(each, 1), 1)
    found: list[dict[str, Tensor]] = []
    with torch.no_grad():
        load_forward_rules()
        for part in _parts(count, size):
            rows = [leaf[part] if is_row else leaf for leaf, is_row in zip(leaves, has_rows, strict=True)]
            try:
                with quiet_fallbacks():
                    found.append(vmap(of_row, in_dims=dims)(rows, columns[:, part]))
            except Exception as error:  # whatever the model raises under a transform
                return _one_by_one(outputs, chosen, leaves, has_rows, columns, error, fn)
    # Not `out_dims=1`, which fails for gradients that do not depend on the row, as of a leaf without use.
    whole = found[0] if len(found) == 1 else {name: torch.cat([p[name] for p in found]) for name in names}
    return {name: whole[name].movedim(0, 1) for name in names}


def _one_by_one(
    outputs: Callable[..., Tensor],
    chosen: dict[str, Tensor],
    leaves: Sequence[Any],
    has_rows: Sequence[bool],
    columns: Tensor,
    error: Exception,
    fn: Any,
) -> dict[str, Tensor]:
    """The same in a loop over rows and columns, for models that ``vmap`` cannot take."""
    reason = first_line(error)
    found: dict[str, list[Tensor]] = {name: [] for name in chosen}
    for n in range(columns.shape[1]):
        row = [leaf[n] if is_row else leaf for leaf, is_row in zip(leaves, has_rows, strict=True)]
        with torch.enable_grad():
            given = {name: leaf.detach().requires_grad_() for name, leaf in chosen.items()}
            output = outputs(given, row)  # if this raises, the error is the model's own
        pulled = [
            torch.autograd.grad(
                output,
                list(given.values()),
                column[n],
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            if output.requires_grad  # which it does not where no leaf has a use
            else [torch.zeros_like(leaf) for leaf in given.values()]
            for column in columns
        ]
        for name, gradients in zip(given, zip(*pulled, strict=True), strict=True):
            found[name].append(torch.stack(gradients))
    seen = _warned.get(fn, "warned", list)
    seen.append(True)
    if len(seen) > 1:
        return {name: torch.stack(gradients, 1) for name, gradients in found.items()}
    warnings.warn(
        f"`vmap` cannot take {fn!r}, so gradients of its rows are found one by one, {columns.shape[1]} rows "
        f"of {len(columns)} columns: {reason}",
        UserWarning,
        stacklevel=levels_to_the_user(),
    )
    return {name: torch.stack(gradients, 1) for name, gradients in found.items()}


def _stacked(gradients: list[Tensor]) -> Tensor:
    """Those of members ``(K, N, *s)`` as ``(K, M, N, *s)``; one is not copied, since it may be large."""
    return gradients[0].unsqueeze(1) if len(gradients) == 1 else torch.stack(gradients, 1)


def _parts(count: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, count, size))
