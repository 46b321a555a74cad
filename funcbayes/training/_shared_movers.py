"""One optimizer for all members where it is certain to do what one a member would."""

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


def shared_movers(leaves: Sequence[Tensor], options: Options) -> Movers:
    """One optimizer for all members if that is certain to be the same, else one a member."""
    alone = Mover.of([leaf[0].clone() for leaf in leaves], options)
    if type(alone.optimizer) in _ELEMENTWISE and not isinstance(alone.scheduler, ReduceLROnPlateau):
        together = Movers(leaves, options, stacked=True)
        # A factory may look at shapes (no weight decay for vectors, say), which stacking changes.
        if _same_groups(alone, together.movers[0]):
            return together
    return Movers.separate(leaves, options)


def _same_groups(a: Mover, b: Mover) -> bool:
    """Whether two optimizers treat the same leaves in the same way."""
    if type(a.optimizer) is not type(b.optimizer):
        return False
    described = [_groups(a), _groups(b)]
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
