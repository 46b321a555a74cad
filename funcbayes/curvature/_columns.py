"""Columns: cotangents of the outputs, whose squared gradients add up to a curvature."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .._random import fold
from ..likelihoods import Categorical, Likelihood
from ._data_term import with_unit_noise

AT_ONCE = 64  # columns: more of them take memory and gain nothing


@dataclass(frozen=True)
class Columns:
    """What a kind of curvature is made of.

    Attributes:
        roots: Given outputs ``(N, *event)``, targets and the first row's number: columns
            ``(K, N, *event)``; one column may carry several positions of a row that are blocks of their own.
        likelihood: What says which axis of the outputs is one block; ``None`` if a row is one.
        count: How many columns there are at a time, given the shape of the outputs of a row.
        noise_power: See :class:`DataTerm`.
        by_row: Whether columns depend on the numbers of rows.
    """

    roots: Callable[[Tensor, Tensor, int], Tensor]
    likelihood: Likelihood | None
    count: Callable[[torch.Size], int]
    noise_power: int = 2
    by_row: bool = False

    def make(self, outputs: Tensor, y: Tensor, first_row: int, size: int) -> Iterator[Tensor]:
        """Columns ``(K, M, N, *event)`` for outputs ``(M, N, *event)``, each of one block.

        Args:
            outputs: Of some rows.
            y: Their targets.
            first_row: The number of the first.
            size: How many columns at a time.
        """
        roots = torch.stack([self.roots(f, y, first_row) for f in outputs], 1)
        apart = [roots] if self.likelihood is None else positions_apart(roots, self.likelihood, outputs[0])
        return at_once(apart, size)

    def axes(self, outputs: Tensor) -> tuple[int, ...]:
        """Axes of columns ``(K, N, *event)`` that one block of a row has."""
        if self.likelihood is None:
            return tuple(range(2, outputs.ndim + 1))
        axis = self.likelihood.output_axis(outputs)
        return () if axis is None else (axis + 1,)


def ggn_columns(likelihood: Likelihood, *, with_noise: bool = False) -> Columns:
    """Those of the generalised Gauss-Newton matrix: a square root of the Fisher in the outputs, exactly.

    Args:
        likelihood: What outputs say of targets.
        with_noise: Whether noise is kept as it is, and not set to 1.
    """
    unit = likelihood if with_noise else with_unit_noise(likelihood)

    def roots(outputs: Tensor, y: Tensor, first_row: int) -> Tensor:
        del first_row
        return unit.fisher_sqrt(outputs, y=y)

    @functools.cache  # of every block the same
    def count(event: torch.Size) -> int:
        probe = torch.zeros(1, *event)
        return min(max(len(unit.fisher_sqrt(probe)), 1) * unit.num_positions(probe), AT_ONCE)

    return Columns(roots, unit, count)


def fisher_columns(likelihood: Likelihood, mc_samples: int, seed: int) -> Columns:
    """Those of the Fisher by Monte Carlo: gradients at targets drawn from the likelihood."""
    unit = with_unit_noise(likelihood)

    def roots(outputs: Tensor, y: Tensor, first_row: int) -> Tensor:
        generator = torch.Generator(outputs.device)
        drawn = []
        for n in range(len(outputs)):  # each by its number: what is drawn does not depend on blocks of rows
            generator.manual_seed(fold(fold(seed, "fisher"), first_row + n) & (1 << 63) - 1)
            drawn.append(unit.sample(outputs[n : n + 1], generator=generator, num_samples=mc_samples))
        targets = torch.cat(drawn, 1)
        scores = [score(unit, outputs, _as_ignored(unit, target, y)) for target in targets]
        return torch.stack(scores) * mc_samples**-0.5

    return Columns(roots, None, lambda event: min(mc_samples, AT_ONCE), by_row=True)


def empirical_columns(likelihood: Likelihood) -> Columns:
    """Those of the empirical Fisher: gradients at the observed targets."""
    unit = with_unit_noise(likelihood)

    def roots(outputs: Tensor, y: Tensor, first_row: int) -> Tensor:
        del first_row
        return score(unit, outputs, y).unsqueeze(0)

    return Columns(roots, None, lambda event: 1, noise_power=4)


def score(likelihood: Likelihood, outputs: Tensor, y: Tensor) -> Tensor:
    """Gradient of ``log p(y | f)`` in the outputs."""
    with torch.enable_grad():
        f = outputs.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(likelihood.log_prob(f, y).sum(), f)
    return gradient


def _as_ignored(likelihood: Likelihood, drawn: Tensor, y: Tensor) -> Tensor:
    """Drawn targets, ignored where the observed ones are."""
    if not isinstance(likelihood, Categorical):
        return drawn
    return torch.where(y == likelihood.ignore_index, likelihood.ignore_index, drawn)


def positions_apart(roots: Tensor, likelihood: Likelihood, outputs: Tensor) -> Iterator[Tensor]:
    """Columns ``(K, M, N, *event)`` with the positions of a row in columns of their own.

    The positions of a row are separate blocks of the Fisher. A column that carried all of them would add
    products between positions when its gradient is squared.
    """
    count = likelihood.num_positions(outputs)
    if count == 1:
        yield roots
        return
    axis = likelihood.output_axis(outputs)
    assert axis is not None
    aside = roots.movedim(axis + 2, 3).flatten(4)  # (K, M, N, C, positions)
    places = roots.movedim(axis + 2, 3).shape[4:]
    for p in range(count):
        only = torch.zeros_like(aside)
        only[..., p] = aside[..., p]
        yield only.unflatten(4, places).movedim(3, axis + 2)


def at_once(columns: Iterator[Tensor] | list[Tensor], size: int) -> Iterator[Tensor]:
    """The same columns, so many at a time."""
    held: list[Tensor] = []
    for some in columns:
        for part in some.split(size):
            if held and sum(map(len, held)) + len(part) > size:
                yield torch.cat(held)
                held = []
            held.append(part)
    if sum(map(len, held)):
        yield held[0] if len(held) == 1 else torch.cat(held)
