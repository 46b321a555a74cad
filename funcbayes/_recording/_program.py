"""Programs of torch's operations: steps, and the Python text that does them."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

VARIABLE = re.compile(r"\bt\d+\b")


@dataclass(frozen=True)
class Step:
    """One operation.

    Attributes:
        names: Of its results.
        target: These, as what is assigned to.
        call: The call, as text.
        uses: Names of the results of others, and of inputs, that it is given.
        is_view: Whether its result is a view of what it is given.
        writes: Whether it writes into what it is given, or is there for something else than its results.
        copies: The name of the tensor that its result is a copy of, the same in memory, if so.
    """

    names: list[str]
    target: str
    call: str
    uses: frozenset[str]
    is_view: bool
    writes: bool
    copies: str | None

    def renamed(self, names: dict[str, str]) -> "Step":
        """The same with other names of what it uses."""
        if self.uses.isdisjoint(names):
            return self
        call = VARIABLE.sub(lambda found: names.get(found.group(), found.group()), self.call)
        return replace(self, call=call, uses=frozenset(names.get(name, name) for name in self.uses))


@dataclass(frozen=True)
class Program:
    """What does operations again.

    Attributes:
        num_fixed: How many of the inputs, the first of them, stay the same in many calls.
        constants: Tensors of which results are kept, and how often they had been written into.
        views: ``views(*fixed)`` gives views of those.
        run: ``run(views, *inputs)`` gives the results.
    """

    num_fixed: int
    constants: tuple[tuple[Tensor, int], ...]
    views: Callable[..., list[Tensor]]
    run: Callable[..., list[Tensor]]


def functions_of(
    views: Sequence[Step],
    steps: Sequence[Step],
    inputs: Sequence[str],
    num_fixed: int,
    results: Sequence[str],
    constants: dict[str, Any],
) -> tuple[Callable[..., list[Tensor]], Callable[..., list[Tensor]]]:
    """The two functions of a :class:`Program`.

    Args:
        views: Steps that the first function takes.
        steps: Those of the second one.
        inputs: Names of all inputs.
        num_fixed: How many of them the first function has.
        results: Names of what the second one gives.
        constants: What other names stand for.
    """
    shown = [name for step in views for name in step.names]
    steps = _without_dead_steps(steps, {*results})
    text = [
        f"def views({', '.join(inputs[:num_fixed])}):",
        *(f"    {step.target} = {step.call}" for step in views),
        f"    return [{', '.join(shown)}]",
        f"def run(views, {', '.join(inputs)}):",
        *([f"    {', '.join(shown)}, = views"] if shown else []),
        *(f"    {line}" for line in _lines(steps, {*inputs, *shown, *constants, *results})),
        f"    return [{', '.join(results)}]",
    ]
    scope = dict(constants)
    exec("\n".join(text), scope)  # noqa: S102  # of what is written here alone
    return scope.pop("views"), scope.pop("run")  # so that nothing refers to itself


def _without_dead_steps(steps: Sequence[Step], wanted: set[str]) -> list[Step]:
    """Those that write, or whose results are wanted."""
    kept = []
    for step in reversed(steps):
        if step.writes or not wanted.isdisjoint(step.names):
            wanted |= step.uses
            kept.append(step)
    return kept[::-1]


def _lines(steps: list[Step], kept: set[str]) -> list[str]:
    """Steps as text; what is no longer used is freed."""
    last = {name: i for i, step in enumerate(steps) for name in (*step.names, *step.uses)}
    lines = []
    for i, step in enumerate(steps):
        dead = sorted(n for n in {*step.names, *step.uses} - kept - {"_"} if last[n] == i)
        lines.append(f"{step.target} = {step.call}" + (f"; del {', '.join(dead)}" if dead else ""))
    return lines
