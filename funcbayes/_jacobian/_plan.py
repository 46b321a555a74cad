"""Where the gradients of each leaf come from, and where rows are inside a model: found out once a model."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from .._functional import Model
from .._functorch import map_first_axis, quiet_fallbacks
from .._intercept._rows import row_axis, two_rows
from .._remember import Remembered
from .._tree import Params, map_leaves, named_leaves, num_rows, parameters_of, tensors
from .._warning import levels_to_the_user
from ._gradients import RowGradients, in_one_dtype
from ._layers import row_gradients
from ._tape import LayerCall, RowsMixError
from ._taped import Signature, Taped, signature_of, tape

Rows = tuple[int, int, bool]  # axis, entries of it for one row of data, whether these lie together

_HALF = (torch.bfloat16, torch.float16)
_MUCH = 1 << 16  # numbers in the gradients of one row from which on a slow way is worth a word


@dataclass(frozen=True)
class Plan:
    """How gradients are found, row by row.

    Attributes:
        layers: Leaves of each call of a layer that are taken from it, in the order of the calls; empty for
            calls that are passed over.
        rows: Where rows are in the output of each call.
        others: Leaves whose gradients have to be found by differentiating row by row.
        calls: Kinds and leaves of the calls, to tell whether a model did something else this time.
        event: Shape of the outputs of one row.
        numel: Numbers that one row has in the outputs of the layers that are differentiated.
        windows: Numbers that one row has in the inputs of all layers taken, as their weights see them.
        formed: Numbers in the other leaves, whose gradients are formed.
    """

    layers: tuple[tuple[str, ...], ...]
    rows: tuple[Rows | None, ...]
    others: tuple[str, ...]
    calls: Signature
    event: torch.Size
    numel: int
    windows: int
    formed: int

    def numbers(self, columns: int) -> int:
        """How many numbers one row takes while gradients are found for so many columns."""
        return 2 * (columns + 1) * self.numel + self.windows + columns * self.formed


_plans: Remembered[Plan] = Remembered()


def plan_for(
    fn: Model,
    params: Params,
    names: Sequence[str],
    x: Any,
    call: str,
    way: Signature | None = None,
    *,
    tells: bool = True,
) -> Plan:
    """Find out, or remember, how gradients of leaves are found.

    Args:
        fn: Pure model.
        params: Its parameters, of one network.
        names: The chosen leaves.
        x: Inputs, at least one row.
        call: How the user called us, for messages.
        way: What layers the model calls for these inputs, if that is not what it does for others like them.
        tells: Whether a warning names leaves whose gradients would take long to find.
    """
    shapes = tuple((t.shape[1:], t.dtype) for t in tensors(x)), optree.tree_structure(x)
    leaves = tuple((name, leaf.shape, leaf.dtype) for name, leaf in parameters_of(params).items())
    key = (tuple(names), leaves, shapes, way, tells)
    try:
        with torch.inference_mode(False):
            return _plans.get(fn, key, lambda: _make(fn, params, names, x, call, tells=tells))
    except _NothingFoundError as error:  # nor will anything that follows from such outputs be finite
        return Plan((), (), tuple(names), (), error.event, 0, 0, _numel(params, names))
    except RuntimeError as error:
        refuse_other_dtype(params, x, call, error)
        raise


def refuse_other_dtype(params: Params, x: Any, call: str, error: RuntimeError) -> None:
    """Explain an error of the model if inputs are in no dtype of its parameters."""
    given, own = (
        {t.dtype for t in some if t.is_floating_point()}
        for some in (tensors(x), parameters_of(params).values())
    )
    if given and own and not given & own:
        theirs, ours = (", ".join(sorted(map(str, dtypes))) for dtypes in (given, own))
        raise TypeError(
            f"`{call}` should be given inputs in the dtype of the parameters, {ours}, got {theirs}. Write "
            f"`x.to({ours})`, or the parameters `.to({theirs})`."
        ) from error


def by_rows(value: Tensor, rows: Rows, leading: int, count: int) -> Tensor:
    """A value of a layer with its rows behind ``leading`` axes: ``(..., N, S, *own)``."""
    axis, size, together = rows
    value = value.movedim(leading + axis, leading)
    value = value.unflatten(leading, (count, size) if together else (size, count))
    return value if together else value.movedim(leading, leading + 1)


def gradients_of_layers(
    plan: Plan, taped: Taped, columns: Tensor, shapes: dict[str, torch.Size]
) -> dict[str, RowGradients]:
    """Gradients of the leaves that layers show, for columns ``(K, M, N, *event)``."""
    edges = {i: taped.calls[i].edge for i, leaves in enumerate(plan.layers) if leaves}
    if not edges or not len(columns) or not taped.outputs.requires_grad:
        return {}
    pulled = _pulled_back(taped.outputs, edges, columns)
    members, count = columns.shape[1:3]
    found: dict[str, RowGradients] = {}
    for i, gradient in pulled.items():
        call, rows = taped.calls[i], plan.rows[i]
        assert rows is not None
        axis = call.output_axis
        gradient = gradient.unsqueeze(1) if axis is None else gradient.movedim(axis + 1, 1)
        value = by_rows(call.value.expand(members, *call.value.shape[1:]), rows, 1, count)
        gradient = by_rows(gradient.expand(-1, members, *gradient.shape[2:]), rows, 2, count)
        if value.is_floating_point():  # of another dtype under autocast
            value, gradient = in_one_dtype(value, gradient)
        of_layer = row_gradients(call, value, gradient, shapes)
        found |= {name: of_layer[name] for name in plan.layers[i]}
    return found


def _pulled_back(outputs: Tensor, edges: dict[int, GradientEdge], columns: Tensor) -> dict[int, Tensor]:
    """Gradients for each column, ``(K, ...)``, at those of the edges that outputs depend on."""

    def pulled(column: Tensor) -> dict[int, Tensor]:
        found = torch.autograd.grad(
            outputs, list(edges.values()), column, retain_graph=True, allow_unused=True
        )
        return {i: g for i, g in zip(edges, found, strict=True) if g is not None}

    # Not `is_grads_batched`, whose rules are fewer: it loops over the columns of a convolution.
    with quiet_fallbacks():
        return map_first_axis(pulled, columns, len(columns))


class _NothingFoundError(Exception):
    """Outputs, of this shape in each row, are not finite, though inputs are."""

    def __init__(self, event: torch.Size) -> None:
        super().__init__()
        self.event = event


def _make(fn: Model, params: Params, names: Sequence[str], x: Any, call: str, *, tells: bool) -> Plan:
    if num_rows(x) is None:
        raise ValueError(
            f"`{call}` should be given `x` whose tensors share their first axis, one entry a row."
        )
    params = map_leaves(_widened, params)
    first, second = (map_leaves(_widened, rows) for rows in two_rows(map_leaves(_finite, x)))
    both = map_leaves(
        lambda a, b: torch.cat([a, b]) if isinstance(a, Tensor) and a.ndim else a, first, second
    )
    *alone, together = (tape(fn, params, names, rows, keep_outputs=True) for rows in (first, second, both))
    outputs = [taped.outputs.detach()[0] for taped in (*alone, together)]
    if not all(bool(f.isfinite().all()) for f in outputs):
        raise _NothingFoundError(outputs[0].shape[1:])
    tolerance = _tolerance(together)
    if not _is_by_rows(outputs, tolerance):
        raise RowsMixError(
            f"`{call}` needs a model whose outputs for a row, the first axis, depend on that row alone; here "
            "two rows together give other outputs than each alone."
        )
    signature = signature_of(together)
    is_alike = all(signature_of(taped) == signature for taped in alone)
    uses = [name for layer in together.calls for name in layer.leaves] + [*together.others]
    rows = tuple(
        _rows_of(i, layer, alone, together) if is_alike else None for i, layer in enumerate(together.calls)
    )
    layers = tuple(
        tuple(name for name in layer.leaves if uses.count(name) == 1) if where is not None else ()
        for layer, where in zip(together.calls, rows, strict=True)
    )
    shapes = {name: leaf.shape for name, leaf in together.leaves.items()}
    plan = Plan(layers, rows, (), signature, outputs[0].shape[1:], 0, 0, 0)
    wrong = _leaves_with_other_gradients(plan, together, shapes)
    layers = tuple(tuple(name for name in leaves if name not in wrong) for leaves in layers)
    seen = {name for leaves in layers for name in leaves}
    others = tuple(name for name in names if name not in seen)
    if tells:
        _tell_of_slow_leaves(fn, {name: shapes[name].numel() for name in others}, outputs[0].numel(), call)
    numel = plan.event.numel() if others else 0  # and all layers are differentiated for these
    windows = 0
    for layer, leaves in zip(together.calls, layers, strict=True):
        if layer.output is not None and (leaves or others):
            numel += layer.output.numel() // 2
        if layer.output is not None and leaves:
            own = (
                1
                if layer.weight is None or "convolution" not in layer.kind
                else layer.weight_shape[2:].numel()
            )
            windows += layer.value.numel() // 2 * own
    return Plan(layers, rows, others, signature, plan.event, numel, windows, _numel(params, others))


def _numel(params: Params, names: Sequence[str]) -> int:
    leaves = named_leaves(params)
    return sum(leaves[name].numel() for name in names)


def _widened(leaf: Any) -> Any:
    """In at least single precision, for comparisons."""
    is_half = isinstance(leaf, Tensor) and leaf.dtype in _HALF
    return leaf.float() if is_half else leaf


def _finite(leaf: Any) -> Any:
    """Some number where there is none: that is for others to refuse."""
    is_number = isinstance(leaf, Tensor) and leaf.is_floating_point()
    return leaf.nan_to_num(nan=0.3, posinf=1, neginf=-1) if is_number else leaf


def _tolerance(taped: Taped) -> float:
    """How much numbers that should agree may differ, relative to their norm: half precision is coarse."""
    outputs = [layer.output for layer in taped.calls if layer.output is not None]
    return 0.03 if any(output.dtype in _HALF for output in outputs) else 1e-3


def _is_by_rows(outputs: list[Tensor], tolerance: float) -> bool:
    first, second, both = outputs
    if both.ndim == 0 or first.shape[0] != 1 or both.shape[0] != 2:
        return False
    return float((torch.cat([first, second]) - both).norm()) <= tolerance * float(both.norm())


def _rows_of(i: int, layer: LayerCall, alone: Sequence[Taped], together: Taped) -> Rows | None:
    """Where rows are in the output of a layer, if they are where the layer takes its positions from."""
    first, second, both = (taped.calls[i].output for taped in (*alone, together))
    if first is None or second is None or both is None:
        return None
    try:
        found = row_axis(first[0], second[0], both[0])
    except ValueError:
        return None
    if found is None:
        return None
    ndim, axis = both.ndim - 1, found[0]
    if layer.kind in ("convolution", "transposed convolution", "channels"):
        is_fine = axis == 0 and (layer.kind == "channels" or ndim == layer.ndim + 2)
    elif layer.kind == "last axes":
        is_fine = axis < ndim - len(layer.settings["normalized_shape"])
    else:  # a linear map by a vector has no axis of outputs
        is_fine = axis < ndim - 1 and (layer.kind != "linear" or len(layer.weight_shape) == 2)
    return found if is_fine else None


def _leaves_with_other_gradients(plan: Plan, taped: Taped, shapes: dict[str, torch.Size]) -> set[str]:
    """Leaves whose gradients, for a random cotangent of each row, are not what layers say.

    They are used in some other way, too, or rows are not where they seemed to be.
    """
    names = [name for leaves in plan.layers for name in leaves]
    outputs = taped.outputs  # (1, 2, *event)
    if not names or not outputs.requires_grad:
        return set()
    generator = torch.Generator().manual_seed(0)
    column = torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs)
    columns = torch.zeros(2, *outputs.shape, dtype=outputs.dtype, device=outputs.device)
    for n in range(2):
        columns[n, :, n] = column[:, n]
    of_rows = [
        torch.autograd.grad(
            outputs,
            [taped.leaves[name] for name in names],
            of_row,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        for of_row in columns
    ]
    norms = [float(gradient.norm()) for gradients in of_rows for gradient in gradients]
    noise = 30 * torch.finfo(outputs.dtype).eps * max(float(column.norm()), *norms)
    found, tolerance = gradients_of_layers(plan, taped, columns, shapes), _tolerance(taped)
    wrong = set()
    for i, name in enumerate(names):
        right = torch.stack([gradients[i].to_dense().flatten() for gradients in of_rows])
        expected = right.new_zeros(2, *right.shape)
        expected[0, 0], expected[1, 1] = right
        got = found[name].matrices()[0].flatten(2) if name in found else torch.zeros_like(expected)
        is_right = got.shape == expected.shape and float((got.to(right) - expected).norm()) <= (
            tolerance * float(right.norm()) + noise
        )
        if not is_right:
            wrong.add(name)
    return wrong


def _tell_of_slow_leaves(fn: Any, sizes: dict[str, int], num_outputs: int, call: str) -> None:
    total = sum(sizes.values()) * num_outputs
    if total < _MUCH:
        return
    names = sorted(sizes, key=lambda name: -sizes[name])
    shown = ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
    warnings.warn(
        f"`{call}` finds the gradients of {shown} in {fn!r} row by row, {total:,} numbers each: these leaves "
        "are not just the weight or bias of one linear, convolution, embedding or normalisation layer. "
        "`where` leaves them out.",
        UserWarning,
        stacklevel=levels_to_the_user(),
    )
