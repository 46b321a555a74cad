"""Losses and gradients of all members by vectorised passes."""

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import optree
import torch
from torch import Tensor

from .._allocator import give_back_memory
from .._functorch import is_autocast_on, map_first_axis, unwrap, vmap_level
from .._intercept import Batching, Observed
from .._mapping import equal_parts, in_parts
from .._random import fold
from .._tree import Params, index, merge, named_leaves, select
from .._warning import first_line, levels_to_the_user
from ._batch import Batch, RaggedBatch
from ._networks import Networks, one_by_one
from ._objective import NO_RULES, Objective

# Of the bytes that draws may use at a time: members bring the state of an optimizer along.
_SHARE = 0.75


class Together:
    """Losses of members in one vmapped pass, and one backward pass for their sum.

    One backward pass and not ``vmap(grad)``, which is slower, and in which batching rules would not see
    the calls; the gradient of the sum in a member's leaves is that of its own loss.

    A model that ``vmap`` cannot take is evaluated one by one, with a warning.

    Args:
        chunk_size: Members at a time; ``None`` to choose at the first batch. The choice depends on shapes
            only, never on timings: rounding differs between sizes, and training magnifies it, so a timed
            choice would give another result at every run.
    """

    def __init__(self, chunk_size: int | None) -> None:
        self.chunk_size = chunk_size
        self._parts: list[slice] | None = None  # which members together, once it is known
        self._loops = chunk_size == 1
        self._plain = False  # without batching rules

    def __call__(
        self, networks: Networks, leaves: list[Tensor], batch: Batch | RaggedBatch
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        """Return losses ``(K,)`` and gradients in ``leaves``, ``(K, *s)`` each."""
        # Under vmap a buffer that is written has to have an axis of members. Those that still are
        # frozen in `fn` are given one by the first step.
        adds_buffers = networks.adds_buffers and networks.num_steps == 0
        if networks.num_members == 1 or self._loops or adds_buffers or isinstance(batch, RaggedBatch):
            return one_by_one(networks, leaves, batch)
        if self._parts is None:
            self._choose(networks, leaves, batch)
            return self(networks, leaves, batch)
        found = self._found(networks, leaves, batch)
        if found is None:  # something was learned, and the next is another way
            return self(networks, leaves, batch)
        losses, grads, varying, commons = zip(*found, strict=True)
        networks.fixed.put_stacked(optree.tree_map(_concatenated, *varying), commons[-1])
        return _concatenated(*losses), [_concatenated(*of_leaf) for of_leaf in zip(*grads, strict=True)]

    def _found(self, networks: Networks, leaves: list[Tensor], batch: Batch) -> list[Any] | None:
        """What is found of each part of the members; ``None`` if it does not go like this."""
        parts = self._parts or []
        try:
            return [_vmapped(networks, leaves, batch, part, self._plain) for part in parts]
        except torch.OutOfMemoryError:
            most = max(part.stop - part.start for part in parts) // 2
            self._parts, self._loops = in_parts(slice(0, networks.num_members), max(1, most)), most == 0
        except Exception:  # a batching rule may stand in the model's way, where plain `vmap` is right
            if self._plain:
                raise
            self._plain = True
        give_back_memory()  # now that the error keeps nothing of it
        return None

    def _choose(self, networks: Networks, leaves: list[Tensor], batch: Batch) -> None:
        """Map over a single member, to see whether that goes and how large it gets."""
        seen = Observed()
        try:
            if networks.draws_globally:
                raise RuntimeError("it draws from torch's global random state")
            # Autocast does not reach all that plain `vmap` makes of a model.
            _vmapped(networks, leaves, batch, slice(0, 1), not is_autocast_on(), seen)
        except Exception as error:  # whatever it is, a loop that works is an answer
            reason = first_line(error)
            warnings.warn(
                f"`{networks.call}` trains the members one by one, because `vmap` cannot take the model: "
                f"{reason}",
                stacklevel=levels_to_the_user(),
            )
            self._loops = True
        num, size = networks.num_members, self.chunk_size
        self._parts = (
            equal_parts(num, seen.nbytes, networks.device, _SHARE)
            if size is None
            else in_parts(slice(0, num), size)
        )


def _vmapped(
    networks: Networks,
    leaves: list[Tensor],
    batch: Batch,
    part: slice,
    plain: bool,
    seen: Observed | None = None,
) -> tuple[Tensor, Sequence[Any], Params, Params]:
    """Losses and gradients of some members, and their fixed values afterwards."""
    varying, common = networks.fixed.stacked()
    # One by one, as plain numbers, few keys are hashed faster.
    held, keys = networks.held, torch.tensor([fold(key, networks.num_steps) for key in networks.keys])
    if part != slice(0, networks.num_members):
        batch, keys, leaves = batch.part(part), keys[part], [leaf[part] for leaf in leaves]
        held, varying = index(held, part), index(varying, part)
    kind = "vmap" if plain else "channels_last" if batch.rows >= 4 else "rows_first"

    def evaluate(objective: Objective, given: Any) -> tuple[Tensor, Sequence[Any], Params, Params]:
        leaves, held, varying, common, rows, keys = given
        own = [leaf.detach().requires_grad_() for leaf in leaves]
        names = frozenset(named_leaves(common))
        one = functools.partial(_loss_of_one, networks, objective, Batching(kind, seen), batch.spec, names)
        mapped_rows = {i: leaf for i, leaf in enumerate(rows) if batch.dims[i] is not None}
        changed: list[Params] = []  # without an axis of members, which what is returned is given

        def of_one(entry: Any) -> tuple[Tensor, Params]:
            leaves, held, varying, own_rows, key = entry
            batch = [own_rows.get(i, leaf) for i, leaf in enumerate(rows)]
            loss, varying, after = one(leaves, held, varying, common, batch, key)
            changed.append(optree.tree_map(_shared, after))
            return loss, varying

        with torch.enable_grad():
            tree = own, held, varying, mapped_rows, keys
            losses, varying = map_first_axis(of_one, tree, len(own[0]))
            grads = torch.autograd.grad(losses.sum(), own, allow_unused=True)
        return losses.detach(), grads, varying, changed[0]

    own = [leaf.detach() for leaf in leaves]
    given = own, held, varying, common, batch.leaves, keys
    if seen is not None:
        return evaluate(networks.objective, given)
    return networks.run((kind, batch.spec, tuple(batch.dims)), evaluate, given)


def _loss_of_one(
    networks: Networks,
    objective: Objective,
    rules: Batching,
    spec: Any,
    names: frozenset[str],
    leaves: list[Tensor],
    held: Params,
    varying: Params,
    common: Params,
    batch: list[Any],
    key: Tensor,
) -> tuple[Tensor, Params, Params]:
    """Loss of one member, and its fixed values with and without an axis of members (those in ``names``)."""
    pair, given = spec.unflatten(batch), merge(varying, common)
    # What is looked at is all that is done; after that rules are for the model.
    outside, inside = (NO_RULES, rules) if rules.seen is None else (rules, NO_RULES)
    with outside:
        loss, fixed = networks.loss(objective, leaves, held, given, pair, key, inside)
    if not names:
        return loss, fixed, common
    return (
        loss,
        select(fixed, lambda name, _: name not in names),
        select(fixed, lambda name, _: name in names),
    )


def _shared(value: Tensor) -> Tensor:
    """A value that the members have in common, as long as it is one."""
    level = vmap_level()
    if level is not None and unwrap(value, level)[1] is not None:
        raise ValueError("what all members share cannot take values of each member")
    return value


def _concatenated(*parts: Any) -> Any:
    return parts[0] if len(parts) == 1 or parts[0] is None else torch.cat(parts)
