"""How a functional model should run its module, and which functions are replaced while it runs.

Both are ambient: they reach a module through any function of the user's that wraps it, and
hold for one thread and one call only.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

from torch.overrides import TorchFunctionMode

Handler = Callable[["Interception", Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


@dataclass
class Call:
    """What a functional module should know of the evaluation it takes part in.

    Attributes:
        kind: ``"eval"`` as at prediction; ``"stochastic"`` the same with dropout visible;
            ``"training"`` as ``module.train()``.
        locate: Whether the names of the modules being run are wanted; following them takes time.
        path: Names of the modules being run, outermost first; ``None`` if not followed.
        buffers: In training, what each functional module was given and the buffers it changed.
        statistics: In training, the running statistics that were handed to kernels of normalisation,
            which write into them without counting it as a new version.
        batch_statistics: In training, whether running statistics become those of the batch alone, whatever
            a layer's momentum.
    """

    kind: Literal["eval", "stochastic", "training"] = "eval"
    locate: bool = False
    path: list[str] | None = None
    buffers: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)
    statistics: list[Any] = field(default_factory=list)
    batch_statistics: bool = False


_current: ContextVar[Call | None] = ContextVar("funcbayes_call", default=None)


def current_call() -> Call:
    """The ambient call; a plain evaluation if nothing was said."""
    return _current.get() or Call()


@contextmanager
def calling(call: Call) -> Iterator[Call]:
    """Make ``call`` the ambient one."""
    token = _current.set(call)
    try:
        yield call
    finally:
        _current.reset(token)


class Interception(TorchFunctionMode):
    """Hands calls of some torch functions to handlers ``(mode, func, args, kwargs) -> result``.

    Handlers run with the mode off, so they may call the functions they replace.
    """

    def __init__(self, handlers: Mapping[Any, Handler]) -> None:
        super().__init__()
        self.handlers = dict(handlers)

    def __torch_function__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        """Call the handler of ``func`` if there is one."""
        handler = self.handlers.get(func)
        if handler is None:
            return func(*args, **(kwargs or {}))
        return handler(self, func, args, kwargs or {})
