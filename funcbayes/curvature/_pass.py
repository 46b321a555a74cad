"""Going through the data once, for a sum over their rows."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._checks import check_model, positive_int
from .._functional import Model
from .._jacobian import blocks
from .._jacobian._gradients import BLOCK_BYTES
from .._jacobian._plan import plan_for
from .._tree import (
    Params,
    Where,
    device_of,
    index,
    is_parameter,
    map_leaves,
    map_named,
    matcher,
    named_leaves,
    select,
)
from ..likelihoods import Likelihood
from ..likelihoods._checks import check_is_likelihood
from ..training._batch import ready
from ..training._data import Data, Source, open_data
from ..training._loader import Loader
from ..training._several import count_members
from ._columns import Columns
from ._data_term import DataTerm, data_term
from ._same_rows import SameRows
from ._sums import Sums


@dataclass(frozen=True)
class Problem:
    """A model on data, and the leaves whose curvature is wanted; checked when it is made.

    Attributes:
        call: How the user called us, for messages.
        num_members: ``M`` networks, whose leaves have a leading axis; ``None`` for one.
        names: The leaves that are covered, in the order of paths.
        same_rows: What compares passes over the data; ``None`` if there is one.
    """

    fn: Model
    params: Params
    source: Source
    likelihood: Likelihood
    call: str
    names: tuple[str, ...]
    num_members: int | None = None
    max_bytes: int | None = None
    progress: bool = False
    same_rows: SameRows | None = None

    @classmethod
    def of(
        cls,
        fn: Model,
        params: Params,
        data: Data,
        likelihood: Likelihood,
        where: Where | None,
        *,
        call: str,
        batch_size: int | None = None,
        stacked: bool = False,
        max_bytes: int | None = None,
        progress: bool = False,
    ) -> "Problem":
        """Check arguments."""
        check_model(fn, call)
        check_is_likelihood(likelihood, f"{call}(likelihood=...)")
        num_members = count_members(params, f"{call}(fn, params, ..., stacked=True)") if stacked else None
        if max_bytes is not None:
            max_bytes = positive_int(max_bytes, f"{call}(max_bytes=...)")
        with torch.inference_mode(False):
            params = map_leaves(lambda leaf: ready(leaf, None), params)
        chosen = matcher(where)
        names = tuple(name for name, leaf in named_leaves(params).items() if chosen(name, leaf))
        for name in names:
            leaf = named_leaves(params)[name]
            if isinstance(leaf, Tensor) and not is_parameter(leaf) and where is not None:
                raise TypeError(
                    f"`{call}(where=...)` should choose parameters of floating point; {name!r} is "
                    f"{leaf.dtype}."
                )
        names = tuple(name for name in names if is_parameter(named_leaves(params)[name]))
        if not names:
            shown = ", ".join(map(repr, list(named_leaves(params))[:4]))
            raise ValueError(
                f"`{call}(where={where!r})` should choose at least one parameter, got none of {shown}, ..."
            )
        source = open_data(data, batch_size=batch_size, num_streams=1, call=call)
        return cls(fn, params, source, likelihood, call, names, num_members, max_bytes, progress)

    @property
    def members(self) -> int:
        """How many networks there are."""
        return self.num_members or 1

    @property
    def leaves(self) -> dict[str, Tensor]:
        """The covered leaves by path, as they are given."""
        leaves = named_leaves(self.params)
        return {name: leaves[name] for name in self.names}

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Their shapes, of one network."""
        stacked = self.num_members is not None
        return {name: leaf.shape[1:] if stacked else leaf.shape for name, leaf in self.leaves.items()}

    @functools.cached_property
    def looked(self) -> tuple[str, ...]:
        """Tables of embeddings among the leaves."""
        for _, x, _ in self.batches():
            single = self.params if self.num_members is None else index(self.params, 0)
            plan = plan_for(self.fn, single, self.names, x, self.call)
            seen = zip(plan.calls, plan.layers, strict=False)
            return tuple(
                weight for (kind, weight, _), leaves in seen if kind == "embedding" and weight in leaves
            )
        return ()

    @functools.cached_property
    def num_outputs(self) -> int:
        """``C``, of one position of a row."""
        _, x, _ = next(self.batches())
        single = self.params if self.num_members is None else index(self.params, 0)
        outputs = torch.empty(1, *plan_for(self.fn, single, (), x, self.call).event)
        axis = self.likelihood.output_axis(outputs)
        return 1 if axis is None else outputs.shape[axis]

    def quoted(self, number: int) -> str:
        """The call, for what is said of a batch."""
        return f"{self.call}(data=...)" + (f", batch {number}" if number else "")

    def for_passes(self, *, in_order: bool) -> "Problem":
        """The same, to be gone through several times; see :class:`SameRows`."""
        if not isinstance(self.source, Loader):  # rows in tensors are the same always
            return self
        return dataclasses.replace(self, same_rows=SameRows(self.call, in_order=in_order))

    def batches(self) -> Iterator[tuple[int, Any, Tensor]]:
        """Number, inputs and targets of every batch; at least one."""
        return self._batches() if self.same_rows is None else self.same_rows.watch(self._batches())

    def _batches(self) -> Iterator[tuple[int, Any, Tensor]]:
        is_empty = True
        for number, batch in enumerate(self.source.plain_batches(device_of(self.params))):
            x, y = batch.member(0)
            if len(y):
                is_empty = False
                yield number, x, y
        if is_empty:
            raise ValueError(f"`{self.call}(data=...)` should give at least one batch with rows, got none.")

    def shown_batches(self) -> Iterable[tuple[int, Any, Tensor]]:
        """The same, with a bar where one is asked for."""
        if not self.progress:
            return self.batches()
        from tqdm.auto import tqdm

        return tqdm(self.batches(), desc=self.call, unit="batch", total=self.source.num_batches(0))

    def tree(self, found: Mapping[str, Tensor]) -> Params:
        """Results by path, with members first, as a tree like the covered parameters."""
        single = self.num_members is None
        covered = select(self.params, lambda name, leaf: name in found)
        return map_named(lambda name, _: found[name][0] if single else found[name], covered)

    def scalars(self, term: DataTerm) -> DataTerm:
        """The data term of the one network, or of all."""
        return index(term, 0) if self.num_members is None else term


def go_through(problem: Problem, columns: Columns, sums: Sequence[Sums]) -> DataTerm:
    """Add up what structures keep of the gradients of all rows.

    Returns:
        The log likelihood, fields ``(M,)``.
    """
    total: DataTerm | None = None
    row = 0
    for each in sums:
        each.nbytes = min(BLOCK_BYTES, problem.max_bytes or BLOCK_BYTES)
    for number, x, y in problem.shown_batches():
        for block in blocks(
            problem.fn,
            problem.params,
            problem.names,
            x,
            num_columns=columns.count,
            call=problem.call,
            num_members=problem.num_members,
            max_bytes=problem.max_bytes,
        ):
            outputs, own = block.outputs, y[block.rows]
            problem.likelihood.check(outputs[0], own, call=problem.quoted(number))
            term = data_term(problem.likelihood, outputs, own, columns.noise_power)
            refuse_infinite(outputs, term, number, problem.call)
            total = term if total is None else total + term
            for i, some in enumerate(columns.make(outputs, own, row, block.num_columns)):
                gradients = block.gradients(some)
                for each in sums:
                    each.add(gradients, is_first=i == 0)
            row += len(own)
        if not all(each.is_finite() for each in sums):
            raise RuntimeError(
                f"The curvature in `{problem.call}` is not finite in batch {number}, though its loss is. "
                "float64, or smaller outputs, may help."
            )
    assert total is not None
    return total


def refuse_infinite(outputs: Tensor, term: DataTerm, number: int, call: str) -> None:
    """Raise if outputs or the log likelihood of a batch are not finite."""
    value = term.at()
    if bool(value.isfinite().all()) and bool(outputs.isfinite().all()):
        return
    finite = outputs.reshape(len(value), -1).isfinite().all(1)
    member = int((finite & value.isfinite()).logical_not().nonzero()[0])
    of_member = f" of member {member}" if len(value) > 1 else ""
    raise RuntimeError(
        f"The log likelihood{of_member} of batch {number} in `{call}` is {float(value[member]):g}, with "
        f"outputs {'that are finite' if bool(finite[member]) else 'that are not all finite'}. Look for "
        "inputs, targets or parameters that are not finite, or too large."
    )
