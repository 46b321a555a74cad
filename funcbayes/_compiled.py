"""Functions of trees of tensors as compiled programs.

A function is written down with rules and transforms already applied, as the plain operations that it ends
in; so nothing of it can break the graph, and ``torch.compile`` sees arithmetic alone. Noise stays what it is:
seeds are inputs, and generators are called by operators that are left as they are.
"""

import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from ._functorch import is_autocast_on, is_inside_transform, traced
from ._remember import Remembered
from ._tree import tensors
from ._warning import first_line

Evaluate = Callable[[Any], Any]
_programs: Remembered["_Program"] = Remembered()
# Propagating indices would hash what `torch.arange` counts in integers that do not wrap around.
_OPTIONS: dict[str, Any] = {"constant_and_index_propagation": False}


def compiled(owner: Any, key: Hashable, evaluate: Evaluate, tree: Any) -> Any:
    """Evaluate by a program that is compiled at the first call with a key.

    Args:
        owner: What programs are remembered for.
        key: What the operations depend on, beside ``tree``.
        evaluate: A function of ``tree``, to a tree; through its tensors and what else is in it only. Without
            gradients.
        tree: Tensors of other values may come in the place of these; whatever else there is is a part of the
            program, and there is another one for something else.

    Returns:
        What ``evaluate(tree)`` gives, to rounding.
    """
    leaves, structure = optree.tree_flatten(tree)
    rest = tuple(leaf if _is_plain(leaf) else id(leaf) for leaf in leaves if not isinstance(leaf, Tensor))
    shapes = tuple((t.shape, t.stride(), t.dtype, t.device) for t in tensors(tree))
    whole = (key, structure, rest, shapes, _autocast({device.type for *_, device in shapes}))
    return _programs.get(owner, whole, lambda: _Program.of(evaluate, tree))(leaves)


def _autocast(kinds: set[str]) -> Hashable:
    """What autocast makes of operations, which a program keeps, on devices of some kinds."""
    if not is_autocast_on():
        return None
    return frozenset(
        (kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind)
    )


def wants_grad(trees: Any) -> bool:
    """Whether gradients in some tensors are wanted, as far as these tell."""
    if is_inside_transform():  # where they do not tell whether a transform further out follows them
        return torch.is_grad_enabled()
    return torch.is_grad_enabled() and any(leaf.requires_grad for leaf in tensors(trees))


def refuse_gradients(trees: Any, call: str) -> None:
    """Refuse gradients in some tensors, and transforms: a program is of plain tensors.

    Args:
        trees: What is given.
        call: The public function.
    """
    if is_inside_transform() or wants_grad(trees):
        raise ValueError(
            f"`{call}(compile=True)` evaluates without gradients and outside of transforms, which are wanted "
            "here. Write `with torch.no_grad():` around the call, or leave `compile` out."
        )


def refuse_random_numbers(call: str) -> None:
    """Refuse to compile a model that draws from torch's global random state, as dropout does not."""
    raise ValueError(
        f"`{call}(compile=True)` should be given a model without random numbers of its own, which compiled "
        "code would draw otherwise. Use `nn.Dropout`, or leave `compile` out."
    )


def with_gradient(owner: Any, key: Hashable, evaluate: Callable[[Any], Tensor], tree: Any) -> Tensor:
    """A number, differentiable once in the tensors of ``tree``: :func:`compiled` together with its gradient.

    Args:
        owner: As there.
        key: As there.
        evaluate: A function of ``tree`` to a scalar, differentiable.
        tree: As there; gradients are found for tensors that require them.
    """
    leaves, structure = optree.tree_flatten(tree)
    wants = [
        i
        for i, leaf in enumerate(leaves)
        if isinstance(leaf, Tensor) and leaf.requires_grad and torch.is_grad_enabled()
    ]

    def value_and_gradient(tree: Any) -> tuple[Tensor, list[Tensor | None]]:
        own = optree.tree_leaves(tree)
        for i in wants:
            own[i] = own[i].detach().requires_grad_()
        with torch.enable_grad():
            value = evaluate(structure.unflatten(own))
            chosen = [own[i] for i in wants]
            gradient = torch.autograd.grad(value, chosen, allow_unused=True) if chosen else ()
        return value.detach(), list(gradient)

    plain = structure.unflatten([leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves])
    value, gradient = compiled(owner, (key, tuple(wants)), value_and_gradient, plain)
    return _Known.apply(value, gradient, *(leaves[i] for i in wants)) if wants else value


class _Known(torch.autograd.Function):
    """A number whose gradient was found with it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradient: list[Tensor | None], *leaves: Tensor) -> Tensor:
        del leaves
        ctx.save_for_backward(*gradient)
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # decorated, `ctx` has no name
        return None, None, *(None if g is None else grad_outputs[0] * g for g in ctx.saved_tensors)


@dataclass(frozen=True)
class _Program:
    """A program for leaves of one kind.

    Attributes:
        run: Gives tensors, given tensors.
        kept: What is not a tensor among the leaves, which is a part of the program. It is kept alive, for its
            identity is in the key of the program.
        others: What is not a tensor among the results, ``None`` where one is.
        structure: Of the results.
    """

    run: Callable[..., list[Tensor]]
    kept: list[Any]
    others: list[Any]
    structure: Any

    @classmethod
    def of(cls, evaluate: Evaluate, tree: Any) -> "_Program":
        leaves, structure = optree.tree_flatten(tree)
        found: list[Any] = []

        def of_tensors(*given: Tensor) -> list[Tensor]:
            own = iter(given)
            whole = structure.unflatten([next(own) if isinstance(t, Tensor) else t for t in leaves])
            found[:] = optree.tree_flatten(evaluate(whole), none_is_leaf=True)
            return [leaf for leaf in found[0] if isinstance(leaf, Tensor)]

        evaluate(tree)  # what is found out about a model by looking at numbers is known from here on
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tracing, to whoever reads the program
            try:
                # One tensor in two places would be one input, where others come as two later.
                graph = traced(of_tensors, [leaf.detach() for leaf in tensors(tree)])
            except Exception as error:  # of the model, which has just been evaluated without tracing
                raise RuntimeError(
                    "`compile=True` should be given a model whose operations are the same whatever its "
                    f"numbers are. Leave `compile` out. Writing them down ended with: {first_line(error)}"
                ) from error
        run = torch.compile(graph, dynamic=False, options=_OPTIONS)
        kept = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
        results, shape = found
        return cls(run, kept, [None if isinstance(t, Tensor) else (t,) for t in results], shape)

    def __call__(self, leaves: list[Any]) -> Any:
        made = iter(self.run(*(leaf for leaf in leaves if isinstance(leaf, Tensor))))
        return self.structure.unflatten([next(made) if other is None else other[0] for other in self.others])


def _is_plain(leaf: Any) -> bool:
    """Whether a leaf says all that it is by being equal."""
    return leaf is None or isinstance(leaf, bool | int | float | str | torch.dtype | torch.device)
