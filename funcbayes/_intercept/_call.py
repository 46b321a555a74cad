"""How a functional model should run its module, and which functions are replaced while it runs.

Both are ambient: they reach a module through any function of the user's that wraps it, and
hold for one thread and one call only.
"""

import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

import torch.nn.functional as F
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
    """

    kind: Literal["eval", "stochastic", "training"] = "eval"
    locate: bool = False
    path: list[str] | None = None
    buffers: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)
    statistics: list[Any] = field(default_factory=list)


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


# Attention is one Python function built of others. A mode is off while it serves a call, so the
# linear maps and the dropout inside would not be seen; with the mode on, the function's first
# line would hand the call back to the mode for ever. This is the same code with that line
# made to say that nobody wants the call.
_attention_body = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": lambda args: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)


def open_attention(
    mode: Interception, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    with mode:
        return _attention_body(*args, **kwargs)
