"""Potential energies of all chains, and their gradients, by vectorised passes."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._checks import check_num_data
from .._compiled import compiled, refuse_random_numbers
from .._engine import signature
from .._functorch import unintercepted
from .._global_random import forked, watched
from .._mapping import map_draws
from .._tree import Params, concatenate, index, merge
from ..priors import Normal
from ..training._batch import Batch, RaggedBatch
from ._normal_terms import NormalTerms
from ._potential import Potential
from ._start import Start


@dataclass(frozen=True, eq=False)
class Passes:
    """Evaluates the potential of every chain at leaves ``(M, *s)``, in the dtypes of the model.

    Attributes:
        potential: Of one chain.
        start: What moves and what is held.
        call: Name of the public function, for messages.
        chunk_size: Chains of one pass, whose gradients are found before the next; ``None`` for one pass
            backward through all.
        compile: Whether that is done by compiled programs, which are kept for as long as this is.
    """

    potential: Potential
    start: Start
    call: str
    chunk_size: int | None
    compile: bool

    @functools.cached_property
    def _prior(self) -> NormalTerms | None:
        prior = self.potential.prior
        return NormalTerms.of(prior, index(self.start.covered, 0)) if isinstance(prior, Normal) else None

    def __call__(self, leaves: Sequence[Tensor], batch: Batch | RaggedBatch) -> tuple[Tensor, list[Tensor]]:
        """Return potentials ``(M,)`` and gradients like the leaves."""
        num = self.start.num_chains
        if isinstance(batch, RaggedBatch):
            size = 1
        else:
            check_num_data(self.potential.num_data, batch.rows, self.call)
            size = self.chunk_size or num
        if size >= num:
            return self._part(leaves, batch, 0, num)
        values, grads = zip(
            *(self._part(leaves, batch, a, min(a + size, num)) for a in range(0, num, size)), strict=True
        )
        return torch.cat(values), [torch.cat(of_leaf) for of_leaf in zip(*grads, strict=True)]

    def check_likelihood(self, batch: Batch | RaggedBatch) -> None:
        """Refuse outputs and targets that the likelihood cannot mean, where values can be looked at."""
        x, y = batch.member(0)
        held = index(self.start.held, 0) if self.start.is_stacked else self.start.held
        params = merge(held, index(self.start.covered, 0))
        with torch.no_grad(), forked(0):
            outputs, draws_globally = watched(lambda: self.potential.fn(params, x))
        if self.compile and draws_globally:
            refuse_random_numbers(self.call)
        self.potential.likelihood.check(outputs, y, call=f"{self.call}(data=...)")

    def _part(
        self, leaves: Sequence[Tensor], batch: Batch | RaggedBatch, first: int, stop: int
    ) -> tuple[Tensor, list[Tensor]]:
        """What chains ``first .. stop - 1`` give."""
        if isinstance(batch, RaggedBatch):
            batch = batch.batches[first]
            check_num_data(self.potential.num_data, batch.rows, self.call)
        elif (first, stop) != (0, self.start.num_chains):
            batch = batch.part(slice(first, stop))
        held = self.start.held
        if self.start.is_stacked:
            held = index(held, slice(first, stop))
        spec, dims = batch.spec, batch.dims
        given = [leaf[first:stop].detach() for leaf in leaves], held, batch.leaves

        def find(given: Any) -> tuple[Tensor, list[Tensor]]:
            leaves, held, rows = given
            return self._found(leaves, held, Batch(rows, spec, dims))

        return compiled(self, (spec, tuple(dims)), find, given) if self.compile else find(given)

    def _found(self, leaves: list[Tensor], held: Params, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """What chains at leaves ``(m, *s)`` give, by operations alone."""
        structure, likes = self.start.structure, self.start.leaves
        varying = [i for i, dim in enumerate(batch.dims) if dim is not None]
        used: dict[int, list[Tensor]] = {}

        def entries(part: slice) -> Any:
            own = [
                leaf[part].detach().to(like.dtype).requires_grad_()
                for leaf, like in zip(leaves, likes, strict=True)
            ]
            used[part.start] = own  # in the place of a trial's
            return (
                own,
                index(held, part) if self.start.is_stacked else {},
                [batch.leaves[i][part] for i in varying],
            )

        def one(entry: Any) -> Tensor:
            own, own_held, own_rows = entry
            seen = dict(zip(varying, own_rows, strict=True))
            x, y = batch.spec.unflatten([seen.get(i, leaf) for i, leaf in enumerate(batch.leaves)])
            moving = structure.unflatten(own)
            params = merge(own_held if self.start.is_stacked else held, moving)
            outputs = self.potential.fn(params, x)
            with unintercepted():  # densities have no use for the rules that models are mapped by
                nll = self.potential.nll(outputs, y)
                return nll if self._prior is not None else nll - self.potential.log_prior(moving)

        with torch.enable_grad():
            values = map_draws(
                *(one, entries, len(leaves[0])),
                owner=self.potential.fn,
                num_rows=batch.rows,
                key=("sgmcmc", signature(batch.leaves), tuple(batch.dims), signature(leaves)),
                call=self.call,
                chunk_size=self.chunk_size,
            )
            own = [leaf for part in sorted(used) for leaf in used[part]]
            # One backward pass for the sum, not one a chain: the gradient of the sum in the leaves of a chain
            # is that of its own potential.
            grads = torch.autograd.grad(values.sum(), own, allow_unused=True, materialize_grads=True)
        num, values = len(leaves), values.detach()
        found = [concatenate(grads[i::num]) for i in range(num)]
        if self._prior is None:
            return values, found
        with torch.no_grad():
            return self._prior.added_to(values, found, leaves)
