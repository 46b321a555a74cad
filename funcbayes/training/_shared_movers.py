"""One optimizer for all members where it is certain to do what one a member would."""

import contextlib
import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ._movers import Mover, Movers
from ._options import Options

# These treat every entry of a tensor by itself, so stacked tensors move as they would alone. Exact
# types: a subclass may do anything.
_ELEMENTWISE: tuple[type[Optimizer], ...] = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.ASGD,
)


# Bytes of all leaves up to which one operation for all of them at once beats one a leaf.
_SMALL = 4 << 20
# Bytes of the leaves of one member from which on an optimizer should be done with them while a CPU has them,
# and what it keeps of them, in its cache.
_LARGE = 1 << 20


def shared_movers(leaves: Sequence[Tensor], options: Options) -> Movers:
    """One optimizer for all members if that is certain to be the same, and pays, else one a member."""
    nbytes = sum(leaf.nbytes for leaf in leaves)
    if nbytes > _LARGE * len(leaves[0]) and leaves[0].device.type == "cpu":
        return Movers.separate(leaves, options)
    alone = Mover.of([leaf[0].clone() for leaf in leaves], options)
    watches = isinstance(alone.scheduler, ReduceLROnPlateau) or _has_hooks(alone.optimizer)
    if type(alone.optimizer) in _ELEMENTWISE and not watches:
        # A factory may look at shapes (no weight decay for vectors, say), which stacking changes.
        if nbytes <= _SMALL and _are_alike(leaves) and _treats_alike(alone):
            # A factory that does as it likes with each leaf may not know what to do with one.
            with contextlib.suppress(Exception):
                in_one = FlatMovers(leaves, options)
                if _same_groups(alone, in_one.movers[0], in_one=True):
                    return in_one
        together = Movers(leaves, options, stacked=True)
        if _same_groups(alone, together.movers[0]):
            return together
    return Movers.separate(leaves, options)


class FlatMovers(Movers):
    """One optimizer of one tensor, in which all leaves of all members lie end to end.

    Its operations are few, where networks of many small leaves are bound by their number. An optimizer
    passes over a leaf that has no gradient: where there is one, they are taken apart.
    """

    def __init__(self, leaves: Sequence[Tensor], options: Options) -> None:
        """Make it for copies of ``leaves``, ``(K, *s)`` each."""
        flat = torch.cat([leaf.detach().reshape(-1) for leaf in leaves])
        super().__init__([flat], options, stacked=True)
        self._options = options
        parts = self._leaves[0].split([leaf.numel() for leaf in leaves])
        self._leaves = [part.view(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
        self._is_flat = True

    def _move(self, grads: Sequence[Tensor | None]) -> None:
        known = [grad.reshape(-1) for grad in grads if grad is not None]
        if self._is_flat and len(known) < len(grads):
            self._take_apart()
        super()._move([torch.cat(known)] if self._is_flat else grads)

    def _take_apart(self) -> None:
        """Go on with a leaf of the optimizer for each leaf, in the state in which they are."""
        leaves, before = self.leaves(), self.movers[0]
        after = Mover.of(leaves, self._options)
        whole, sizes = before.leaves[0], [leaf.numel() for leaf in leaves]
        for name, value in before.optimizer.state.get(whole, {}).items():
            is_of_entries = isinstance(value, Tensor) and value.shape == whole.shape
            parts = value.split(sizes) if is_of_entries else [copy.deepcopy(value) for _ in leaves]
            for own, part in zip(after.leaves, parts, strict=True):
                after.optimizer.state[own][name] = part.reshape(own.shape) if is_of_entries else part
        settings = {k: v for k, v in before.optimizer.param_groups[0].items() if k != "params"}
        after.optimizer.param_groups[0].update(settings)
        if before.scheduler is not None and after.scheduler is not None:
            after.scheduler.load_state_dict(before.scheduler.state_dict())
        self.movers, self._places, self._is_flat = [after], [leaves], False


def _has_hooks(optimizer: Optimizer) -> bool:
    """Whether anything of the user's looks at the leaves at every step."""
    return bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)


def _treats_alike(mover: Mover) -> bool:
    """Whether an optimizer has one group, of all leaves as they come."""
    return [group["params"] for group in _groups(mover)] == [[*range(len(mover.leaves))]]


def _are_alike(leaves: Sequence[Tensor]) -> bool:
    return len({(leaf.dtype, leaf.device) for leaf in leaves}) == 1


def _same_groups(a: Mover, b: Mover, *, in_one: bool = False) -> bool:
    """Whether two optimizers treat the same leaves alike; that of ``b`` may have all leaves in one."""
    if type(a.optimizer) is not type(b.optimizer):
        return False
    described = [_groups(a), _groups(b)]
    if in_one:
        every = [*range(len(a.leaves))]
        described[1] = [{**group, "params": every} for group in described[1]]
    return len(described[0]) == len(described[1]) and all(
        one.keys() == two.keys() and all(_equal(one[k], two[k]) for k in one)
        for one, two in zip(*described, strict=True)
    )


def _groups(mover: Mover) -> list[dict[str, Any]]:
    places = {id(leaf): i for i, leaf in enumerate(mover.leaves)}
    return [
        {**group, "params": [places[id(p)] for p in group["params"]]}
        for group in mover.optimizer.param_groups
    ]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    return a == b
