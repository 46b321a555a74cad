"""How to descend."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .._checks import check_callback, positive_int
from .._tree import Params

MakeOptimizer = Callable[[list[Tensor]], Optimizer]
MakeScheduler = Callable[[Optimizer], LRScheduler]
Callback = Callable[[int, Any, Params], bool | None]
Interval = Literal["epoch", "step"]


class Inspect(Protocol):
    """What looks at networks as they are trained, and raises an error that stops it."""

    def __call__(self, networks: Any, leaves: list[Tensor], batch: Any, losses: Tensor) -> None:
        """See the losses ``(K,)`` of a step before it is taken."""
        ...

    def after_epoch(self, networks: Any, leaves: list[Tensor]) -> None:
        """See what the last step of an epoch made of the leaves."""
        ...


@dataclass(frozen=True)
class Options:
    """What every fit is told about descending; checked when it is made.

    ``call`` is the name of the public function and ``member`` the number of a network that is trained
    alone but belongs to an ensemble, for messages. ``callback`` is given losses ``(K,)`` and members.
    ``inspect`` may refuse to go on before a step or after an epoch. ``shown`` says what the bar shows for
    losses ``(K,)``. ``compile`` asks for losses and gradients by compiled programs.
    """

    call: str
    optimizer: MakeOptimizer
    num_epochs: int
    scheduler: MakeScheduler | None = None
    scheduler_interval: Interval = "epoch"
    max_grad_norm: float | None = None
    progress: bool = False
    callback: Callback | None = None
    member: int | None = None
    patience: int | None = None
    has_validation: bool = False
    inspect: Inspect | None = None
    compile: bool = False
    shown: Callable[[Tensor], dict[str, str]] = lambda losses: {"loss": f"{losses.mean().item():.4g}"}

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        positive_int(self.num_epochs, f"{self.call}(num_epochs=...)")
        if self.patience is not None:
            positive_int(self.patience, f"{self.call}(patience=...)")
            if not self.has_validation:
                raise ValueError(
                    f"`{self.call}(patience={self.patience})` needs rows to wait for: write "
                    "`validation=(x, y)`, or a loader of them."
                )
        if self.scheduler_interval not in ("epoch", "step"):
            raise ValueError(
                f"`{self.call}(scheduler_interval=...)` should be 'epoch' or 'step', "
                f"got {self.scheduler_interval!r}."
            )
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(
                f"`{self.call}(max_grad_norm=...)` should be positive or None, got {self.max_grad_norm}."
            )
        check_callback(self.callback, self.call)
        for name, make in (("optimizer", self.optimizer), ("scheduler", self.scheduler)):
            if make is not None and not callable(make):
                raise TypeError(
                    f"`{self.call}({name}=...)` should be a function that makes one, got "
                    f"{type(make).__name__}. Write `functools.partial(torch.optim.Adam, lr=1e-3)`, say."
                )
