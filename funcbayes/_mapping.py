"""A differentiable function of many draws: in as few vectorised passes as stay in the caches, or in a loop.

It is for training, where gradients flow through all draws, as those of an ELBO do, or of many chains. The
choice depends on shapes only, never on timings: rounding differs between sizes, and training magnifies it, so
that a timed choice would give another result at every run. For prediction, where rounding is harmless, see
:mod:`funcbayes._engine`.
"""

import itertools
import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import optree
import torch

from ._allocator import give_back_memory, keep_large_blocks
from ._functorch import is_autocast_on, is_inside_transform, map_first_axis
from ._intercept import Batching, Observed
from ._remember import Remembered
from ._tree import concatenate, device_of, index, stack
from ._warning import first_line, levels_to_the_user

# Bytes of the largest intermediate, over the draws of one pass. Beyond it buffers fall out of the cache, and
# fewer draws at a time are faster; two still pay where one buffer is larger.
_BUDGET = {"cpu": 16 << 20, "other": 512 << 20}


@dataclass
class _Plan:
    """How draws of one model at one shape are mapped.

    Attributes:
        device: Where draws are.
        largest: Bytes of the largest intermediate of one draw; ``None`` if ``vmap`` cannot take the model.
        needs_rules: See :class:`funcbayes._intercept.Observed`.
        is_plain: Whether batching rules stand in the model's way.
        most: Draws at a time that memory was enough for, after it was not.
    """

    device: torch.device
    largest: int | None
    needs_rules: bool = True
    is_plain: bool = False
    most: int | None = None


_plans: Remembered[_Plan] = Remembered()


def map_draws(
    one: Callable[[Any], Any],
    draws: Callable[[slice], Any],
    count: int,
    *,
    owner: Any,
    num_rows: int,
    key: Hashable,
    call: str,
    chunk_size: int | None = None,
    has_rules: bool = True,
) -> Any:
    """Evaluate a function of one draw for many, differentiably.

    Args:
        one: Gives a tensor, or a tree of tensors, for one draw.
        draws: Gives the draws of a part of ``0 .. S - 1``, a tree whose leaves have a leading axis.
        count: ``S``.
        owner: What plans are remembered for: the model.
        num_rows: Rows of data that a draw sees, by which images are laid out.
        key: What shapes depend on, beside the model: see :func:`funcbayes._engine.signature`.
        call: How the user called us, for the warning that a loop is used.
        chunk_size: Draws of one pass; ``None`` to choose by the size of intermediates.
        has_rules: Whether weights differ between draws, for which there are batching rules. Those of
            attention and recurrent layers are for other models, too.

    Returns:
        Results with a leading axis ``S``.
    """
    if count == 1 or chunk_size == 1:
        return _in_a_loop(one, draws, count)
    kind = "vmap" if not has_rules else "channels_last" if num_rows >= 4 else "rows_first"
    if is_inside_transform():  # sizes are those of others, too
        return _mapped(one, draws(slice(0, count)), count, kind)
    # Autocast does not reach all that plain `vmap` makes of a model.
    probing = kind if is_autocast_on() else "vmap"
    plan = _plans.get(
        owner, (key, num_rows, probing), lambda: _made_plan(one, draws(slice(0, 1)), owner, call, probing)
    )
    if plan.largest is None:
        return _in_a_loop(one, draws, count)
    if not has_rules and not plan.needs_rules:
        kind = "none"
    if chunk_size is None:
        parts = equal_parts(count, plan.largest, plan.device)
    else:
        parts = in_parts(slice(0, count), chunk_size)
    if plan.device.type == "cpu":
        keep_large_blocks()
    return concatenate([found for part in parts for found in _of_part(one, draws, part, kind, plan)])


def _of_part(
    one: Callable[[Any], Any], draws: Callable[[slice], Any], part: slice, kind: str, plan: _Plan
) -> list[Any]:
    """Results of some draws: at once, or one after another in as many parts as memory is enough for."""
    size = part.stop - part.start
    most = plan.most or size
    if size <= most:
        try:
            return [_mapped_by_plan(one, draws(part), size, kind, plan)]
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            most = size // 2
        give_back_memory()  # now that the error keeps nothing of it
    found = [result for some in in_parts(part, most) for result in _of_part(one, draws, some, kind, plan)]
    plan.most = min(most, plan.most or most)  # it was enough for so many, and may not be for graphs of more
    return found


def _mapped_by_plan(one: Callable[[Any], Any], draws: Any, count: int, kind: str, plan: _Plan) -> Any:
    if not plan.is_plain:
        try:
            return _mapped(one, draws, count, kind)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # noqa: S110  # of a batching rule, perhaps; the model's own comes again
            pass
    result = _mapped(one, draws, count, "vmap")
    plan.is_plain = True
    return result


def in_parts(whole: slice, size: int) -> list[slice]:
    """Parts of a size; the last may be smaller."""
    return [slice(a, min(a + size, whole.stop)) for a in range(whole.start, whole.stop, size)]


def equal_parts(count: int, largest: int, device: torch.device, share: float = 1.0) -> list[slice]:
    """As few parts as keep to a share of the budget, with an intermediate of ``largest`` bytes a draw."""
    budget = int(share * _BUDGET["cpu" if device.type == "cpu" else "other"])
    num = -(-count // max(2, budget // max(1, largest)))
    bounds = [count * i // num for i in range(num + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(bounds)]


def _mapped(
    one: Callable[[Any], Any], draws: Any, count: int, kind: str, seen: Observed | None = None
) -> Any:
    if kind == "none":
        return map_first_axis(one, draws, count)
    rules = Batching(kind, seen)

    def ruled(draw: Any) -> Any:
        with rules:
            return one(draw)

    return map_first_axis(ruled, draws, count)


def _in_a_loop(one: Callable[[Any], Any], draws: Callable[[slice], Any], count: int) -> Any:
    found = [one(index(draws(slice(i, i + 1)), 0)) for i in range(count)]
    if count == 1:
        return optree.tree_map(lambda leaf: leaf.unsqueeze(0), found[0])
    return stack(found)


def _made_plan(one: Callable[[Any], Any], first: Any, owner: Any, call: str, kind: str) -> _Plan:
    """Map over a single draw, to see whether that goes and how large it gets."""
    seen, device = Observed(), device_of(first) or torch.device("cpu")
    with torch.no_grad():
        try:
            _mapped(one, first, 1, kind, seen)
        except Exception as error:  # whatever it is, a loop that works is an answer
            one(index(first, 0))  # which raises what is the model's own
            reason = first_line(error)
            warnings.warn(
                f"`{call}` evaluates draws one by one, because `vmap` cannot take {owner!r}: {reason}",
                UserWarning,
                stacklevel=levels_to_the_user(),
            )
            return _Plan(device, None)
    return _Plan(device, seen.nbytes, seen.needs_rules)
