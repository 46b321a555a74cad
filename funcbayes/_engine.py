"""Evaluating a model at many draws: how many at a time, and by which mechanism.

One vectorised pass over all draws is fastest for few rows. With many rows its intermediates fall out of
cache and it can lose to a plain loop, so draws are taken in chunks that keep the largest
intermediate within a fixed budget, and the loop, in one thread or in several, is one of the mechanisms.
Which one is best for a model and shape is learned from the time that the chunks of real predictions take.
"""

import copy
import dataclasses
import functools
import statistics
import time
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import optree
import torch
from torch import Tensor

from ._allocator import give_back_memory, keep_large_blocks
from ._compiled import compiled
from ._functional import FunctionalModule, Model
from ._functorch import (
    is_autocast_on,
    is_inside_transform,
    is_plain,
    is_readable,
    map_first_axis,
    outside_transforms,
)
from ._global_random import forked, watched
from ._intercept import (
    Batching,
    DropoutMasks,
    Folded,
    LayoutWatch,
    Observed,
    Prepared,
    current_call,
    prepared,
    prepared_together,
    with_dropout,
)
from ._layout import agree, channels_last, has_other_layout
from ._linearize import Linearization, with_linearization
from ._mapping import in_parts
from ._masks import Place
from ._random import Seed, fold, resolve_seed
from ._recording import Bound, Recorded, kind_of
from ._remember import Remembered
from ._row_wise import has_global_hooks
from ._threads import may_divide, side_by_side
from ._tree import Params, device_of, index, is_repeated, merge, num_rows, tensors, unbind
from ._warning import first_line, levels_to_the_user
from .posteriors import Draw, to

# Bytes of the largest intermediate with a draw axis, over the draws of one chunk.
_BUDGET = {"cpu": 16 << 20, "other": 256 << 20}
_DRAWS_BUDGET = {"cpu": 256 << 20, "other": 2 << 30}  # bytes of the parameters drawn for one chunk
# More draws at a time than these are taken only if their parameters are so many bytes at most: memory should
# not grow with the number of draws.
_MANY_DRAWS = 32
_SMALL_DRAWS = {"cpu": 8 << 20, "other": 256 << 20}
# On a CPU two draws at a time are tried only if both take so many bytes at most. A loop needs half of that,
# is as fast by then, and a CPU raises no error, where memory ends, after which there could be fewer.
_MOST_OF_TWO_DRAWS = 1 << 30
# Draws of a loop that are timed together; fewer where their intermediates are large, for these take longer.
_LOOPED = 8
_IN_THREADS = 256 << 20  # bytes of the largest intermediate and the inputs, over all threads
_MOST_KINDS = 8  # of inputs that are known at a time of the same draws, or of one model
_RECORDED = 0.05  # a chunk that takes fewer seconds is recorded
_LOOP_UNLESS = 0.96  # the loop is taken unless something else takes less than this part of its time
# A mechanism is timed twice in a row, for the first time it finds caches and threads as another left them.
# It is timed twice more where it is within this factor of the best, for something may have disturbed it.
_HOPELESS, _TRIALS = 2.0, 4
# Caches and threads matter little to a chunk of so many seconds: one timing is enough if it is so far off.
_LONG, _FAR = 0.5, 1.5
# Where the loop and the best of the others are within this factor, both are timed on, so often in all.
_CLOSE, _FINAL = 1.25, 10

_T = TypeVar("_T")
_LOOPS = "loop", "loop_channels_last", "threads"
Kind = Literal["loop", "loop_channels_last", "threads", "folded", "vmap", "rows_first", "channels_last"]


@dataclass(frozen=True)
class Mechanism:
    """How a chunk of draws is evaluated.

    Attributes:
        kind: ``"loop"`` over the draws, ``"loop_channels_last"`` with images in that layout, or a loop in
            each of several ``"threads"``; or vectorised: the draws ``"folded"`` into the rows, ``"vmap"``
            with no batching rules but those that it cannot do without, or with all of them and images
            ``"rows_first"`` (NCHW) or ``"channels_last"``.
        chunk: Draws at a time.
    """

    kind: Kind
    chunk: int


@dataclass
class _Tuner:
    """What is known of one model at one shape. Races between threads lose timings, nothing else."""

    candidates: list[Mechanism] = field(default_factory=list)
    seconds: dict[Mechanism, tuple[float, ...]] = field(default_factory=dict)
    settled: Mechanism | None = None
    failed: set[Kind] = field(default_factory=set)
    is_mappable: bool = False  # whether ``vmap`` can take the model
    most: int | None = None  # draws at a time that memory was enough for, after it was not
    row_axes: list[Any] | None = None  # of the effects, where masks are shared
    # Of masks: where draws are folded into the rows, and where one draw has its own, alone or mapped over.
    places: list[Place] = field(default_factory=list)
    places_of_one: list[Place] = field(default_factory=list)
    draws_globally: bool | None = None  # from torch's random state; unknown at first
    needs_rules: bool = True  # plain ``vmap``, too; as far as was seen
    is_layout_free: bool = False  # whether the model was seen not to depend on the layout of its inputs
    queue: torch.device | None = None  # the accelerator on which work is queued, if there is one
    recorded: Recorded = field(default_factory=lambda: Recorded(FunctionalModule))

    def next_to_time(self) -> Mechanism | None:
        """A mechanism whose timing is wanted; ``None`` once all has been learned."""
        if self.settled is None:
            wanted = [c for c in self.candidates if self._wants_timing(c)] if len(self.candidates) > 1 else []
            finalists = [] if wanted else self._finalists()
            wanted = wanted or [c for c in finalists if len(self.seconds[c]) < _FINAL]
            if wanted:  # in turns, for the speed of a machine changes from time to time
                return min(wanted, key=lambda c: len(self.seconds.get(c, ())) // 2)
            self.settled = min(finalists, key=self._usual_seconds) if finalists else self.fastest()
        return None

    def fastest(self) -> Mechanism:
        """The best of what was timed."""
        return self.settled or min(self.candidates, key=self._best_seconds)

    def record(self, mechanism: Mechanism, seconds_per_draw: float) -> None:
        """Add a timing."""
        self.seconds[mechanism] = (*self.seconds.get(mechanism, ()), seconds_per_draw)

    def is_short(self, mechanism: Mechanism, num_draws: int) -> bool:
        """Whether so many draws are known to take little time, of which Python's share may be large."""
        seconds = self.seconds.get(mechanism)
        return seconds is not None and min(seconds) * num_draws < _RECORDED

    def begin(self, candidates: list[Mechanism]) -> None:
        """Choose among these from now on."""
        self.candidates = candidates
        if self.most is not None:  # found by another thread meanwhile
            self.limit(self.most)

    def limit(self, most: int) -> None:
        """Let no mechanism take more draws at a time: memory was not enough for them."""
        self.most = most = min(most, self.most or most)  # in another thread it may have been less
        self.candidates = list(dict.fromkeys(_at_most(most, c) for c in self.candidates))
        self.settled = None if self.settled is None else _at_most(most, self.settled)

    def wait(self) -> None:
        """Let an accelerator finish what is queued there: only then a clock tells how long it takes."""
        if self.queue is not None:
            torch.accelerator.synchronize(self.queue)

    def _best_seconds(self, candidate: Mechanism) -> float:
        return _favoured(candidate, min(self.seconds.get(candidate, (float("inf"),))))

    def _usual_seconds(self, candidate: Mechanism) -> float:
        second_of_each_two = self.seconds[candidate][1::2]
        return _favoured(candidate, statistics.median(second_of_each_two))

    def _finalists(self) -> list[Mechanism]:
        """The loop and the best of the others, where the least timings do not tell them apart."""
        timed = [c for c in self.candidates if c in self.seconds and self._is_possible(c)]
        loops, others = ([c for c in timed if (c.kind == "loop") == is_loop] for is_loop in (True, False))
        if not (loops and others):
            return []
        pair = [*loops, min(others, key=self._best_seconds)]
        least, most = sorted(map(self._best_seconds, pair))
        return pair if most < _CLOSE * least else []

    def _is_possible(self, candidate: Mechanism) -> bool:
        return candidate.kind not in self.failed

    def _wants_timing(self, candidate: Mechanism) -> bool:
        if not self._is_possible(candidate):
            return False
        taken = self.seconds.get(candidate, ())
        if not taken:
            return True
        known = (min(self.seconds[c]) for c in self.candidates if c in self.seconds)
        best = min(known, default=min(taken))  # unknown, since another thread had less memory
        if len(taken) % 2:
            is_long = taken[0] * candidate.chunk > _LONG
            return not (is_long and min(taken) > _FAR * best)
        return len(taken) < _TRIALS and min(taken) < _HOPELESS * best


def _favoured(candidate: Mechanism, seconds: float) -> float:
    """Of timings that are about equal the least is a lucky one, and the loop should not lose to luck."""
    return seconds * (_LOOP_UNLESS if candidate.kind == "loop" else 1)


def _at_most(most: int, mechanism: Mechanism) -> Mechanism:
    return Mechanism(mechanism.kind, min(most, mechanism.chunk))


_tuners: Remembered[_Tuner] = Remembered()
_warned: Remembered[list[bool]] = Remembered()
_bound: Remembered[dict[Hashable, tuple[weakref.ref[Any], Bound]]] = Remembered(1)
_masked: Remembered[dict[Hashable, tuple[Recorded, Hashable]]] = Remembered(1)


def repeated(fn: Model, params: Params, draws: Draw, x: Tensor, owner: Any, first_row: int) -> Tensor | None:
    """Outputs of all draws, if an earlier call differs in numbers only.

    Args:
        fn: Pure model.
        params: Values of the leaves that draws do not cover; may be ``None``.
        draws: All of them.
        x: Inputs, one tensor; others are for :func:`evaluate`.
        owner: Whose draws they are: see :func:`evaluate`.
        first_row: Number of the first row of ``x`` in a larger data set.

    Returns:
        ``(S, N, ...)``, or ``None``, where :func:`evaluate` is to be called. No mode of torch's may be on
        but gradients, none of which are wanted in what is not given here.
    """
    if vars(x):
        return None
    try:
        if draws.effects:
            return _repeated_with_masks(fn, params, draws, x, first_row)
        model, bound = _bound.get(owner, None, dict).get(kind_of(x), (None, None))
        if params is not None or bound is None or model is None or model() is not fn:
            return None
        return bound.outputs(draws.leaves, x)
    except torch.OutOfMemoryError:  # fewer draws at a time will do
        return None


def _repeated_with_masks(fn: Model, params: Params, draws: Draw, x: Tensor, first_row: int) -> Tensor | None:
    if not all(map(_is_of_each_row, draws.effects)):
        return None
    recorded, way = _masked.get(fn, None, dict).get(_kind_with_masks(draws, x), (None, None))
    if recorded is None:
        return None
    effects = tuple([masks.at_rows(first_row, None) for masks in draws.effects])
    return recorded.again(way, (draws.leaves, params), (effects, x))


def _keep(known: dict[Hashable, _T], kind: Hashable, value: _T) -> None:
    """Remember a value for inputs of a kind, of which there are few at a time."""
    if len(known) >= _MOST_KINDS:
        known.clear()
    known[kind] = value


def _kind_with_masks(draws: Draw, x: Tensor) -> Hashable:
    kinds = tuple([(masks.rate, masks.where, len(masks.key)) for masks in draws.effects])
    return kind_of(x), kinds, torch.get_num_threads()


def evaluate(
    fn: Model,
    params: Params,
    x: Any,
    make_draws: Callable[[slice], Draw],
    numbers: Tensor,
    chunk_size: int | None,
    *,
    key: Hashable,
    noise: Seed | None = 0,
    first_row: int = 0,
    dtype: torch.dtype | None = None,
    compile: bool = False,
    model: Model | None = None,
    owner: Any = None,
) -> Iterator[tuple[slice, Tensor]]:
    """Evaluate draws of one structure.

    Args:
        fn: Pure model.
        params: Values of the leaves that draws do not cover; may be ``None``.
        x: Inputs, any pytree.
        make_draws: Gives the draws at a slice of the positions ``0 .. S - 1``.
        numbers: Numbers of the draws, int64 ``(S,)``, at these positions.
        chunk_size: Draws at a time; ``None`` to choose.
        key: What the structure of the draws depends on; equal keys share what was learned.
        noise: Seed of what the model draws from torch's random state, if it does so; ``None`` takes one
            number from there, then.
        first_row: Number of the first row of ``x`` in a larger data set.
        dtype: In which linearised draws are evaluated; everything else has it already.
        compile: Whether chunks, all of one size, are evaluated by one compiled program.
        model: The user's, for messages, if ``fn`` is something that was made of it.
        owner: An object that has these very draws, and none else, for :func:`repeated`.

    Yields:
        Positions and their outputs ``(s, N, ...)``, chunk by chunk, in order.
    """
    run = _Run(fn, params, x, make_draws, numbers, key, noise, first_row, dtype, model)
    if compile:
        yield from run.compiled(chunk_size)
    elif chunk_size is not None:
        yield from run.fixed(chunk_size)
    elif len(numbers) == 1:
        yield from run.fixed(1)
    else:
        yield from run.chosen()
        run.bind(owner)


class _Run:
    """One evaluation: what stays the same over its chunks."""

    def __init__(
        self,
        fn: Model,
        params: Params,
        x: Any,
        make_draws: Callable[[slice], Draw],
        numbers: Tensor,
        key: Hashable,
        noise: Seed | None,
        first_row: int,
        dtype: torch.dtype | None,
        model: Model | None = None,
    ) -> None:
        self.fn, self.params, self.x = fn, params, x
        self.model = fn if model is None else model
        self.make_draws, self.numbers, self.first_row = make_draws, numbers, first_row
        self.dtype = dtype
        self.num_draws = num_draws = len(numbers)
        self.seed = noise
        around = torch.get_num_threads(), may_divide(), is_autocast_on(), torch.is_grad_enabled()
        self.has_other_layout = any(map(has_other_layout, tensors(x)))
        shapes = signature(x), None if isinstance(fn, FunctionalModule) else signature(params)
        self.cell = (key, num_draws, shapes, self.has_other_layout, *around, is_inside_transform())
        self.default: Kind = "channels_last" if (num_rows(x) or 1) >= 4 else "rows_first"
        # Autocast does not reach all that `vmap` makes of a model, but what the rules make of it.
        self.bare: Kind = self.default if is_autocast_on() else "vmap"
        self.tuner = self._tuner()
        self.failed = self.tuner.failed  # kinds that are left out
        self.was_watched = False
        self.may_record = False
        self.at_once: Mechanism | None = None  # what all draws were evaluated by, without timing others
        self.masks: Draw | None = None  # the last draws, if they are masks alone and were done by a recording

    def fixed(self, chunk_size: int) -> Iterator[tuple[slice, Tensor]]:
        """Chunks of a given size, whose results do not depend on what was learned before."""
        self.failed = set()  # in this call; in others it may have been another branch of the model
        chunk_size = min(chunk_size, self.num_draws)
        if chunk_size > 1 and not self._vmap_can_take_it():
            chunk_size = 1
        mechanism = Mechanism(self.default if chunk_size > 1 else "loop", chunk_size)
        for part in in_parts(slice(0, self.num_draws), chunk_size):
            yield part, self._attempt(part, mechanism)

    def compiled(self, chunk_size: int | None) -> Iterator[tuple[slice, Tensor]]:
        """Chunks of one size by one program; a shorter one at the end is filled up with its last draw."""
        if not self._vmap_can_take_it():
            yield from self.fixed(1)
            return
        size = min(self.tuner.candidates[0].chunk if chunk_size is None else chunk_size, self.num_draws)
        start = 0
        while start < self.num_draws:
            size = min(size, self.tuner.most or size)
            part = slice(start, min(start + size, self.num_draws))
            outputs = self._if_memory_is_enough(size, functools.partial(self._by_program, part, size))
            if outputs is not None:
                yield part, outputs
                start = part.stop

    def _by_program(self, part: slice, size: int) -> Tensor:
        def evaluate(tree: Any) -> Tensor:
            draws, params, x = tree
            own = self._from_first_row(params, x)
            try:
                return own._outputs(draws, Mechanism(self.default, size), 0)
            except torch.OutOfMemoryError:
                raise
            except Exception:  # of a batching rule, perhaps; the model's own comes again
                return own._outputs(draws, Mechanism("vmap", size), 0)

        draws, count = self.make_draws(part), part.stop - part.start
        if count < size:
            draws = index(draws, torch.arange(size).clamp_max(count - 1))
        draws = Draw(draws.leaves, self._at_rows(draws.effects))
        return compiled(self.fn, ("predict", self.cell), evaluate, (draws, self.params, self.x))[:count]

    def _at_rows(self, effects: tuple[Any, ...]) -> tuple[Any, ...]:
        """Effects with numbers of rows hashed into their keys: they are no part of a program."""
        return tuple(e.at_rows(self.first_row, None) if _is_of_each_row(e) else e for e in effects)

    def _from_first_row(self, params: Params, x: Any) -> "_Run":
        """The same for other values, and effects that were given their rows."""
        run = copy.copy(self)
        run.params, run.x, run.first_row = params, x, 0
        return run

    def chosen(self) -> Iterator[tuple[slice, Tensor]]:
        """Chunks by the best mechanism known; while that is being learned, by those to be timed."""
        tuner = self.tuner
        if not tuner.candidates:
            tuner.begin(self._candidates())
        may_look = not torch.is_grad_enabled() and not _is_captured()
        self.may_record = may_look and tuner.recorded.is_possible(self.fn)
        start = 0
        while start < self.num_draws and not _is_captured() and (mechanism := tuner.next_to_time()):
            part = slice(start, min(start + mechanism.chunk, self.num_draws))
            num_tried = tuner.recorded.num_tried
            tuner.wait()
            began = time.perf_counter()
            outputs = self._attempt(part, mechanism)
            tuner.wait()
            size = part.stop - part.start
            # A short tail would be judged unfairly, as would a mechanism that another stood in for, or that
            # was recorded meanwhile.
            is_itself = mechanism.kind not in tuner.failed and (tuner.most is None or size <= tuner.most)
            if size == mechanism.chunk and is_itself and tuner.recorded.num_tried == num_tried:
                tuner.record(mechanism, (time.perf_counter() - began) / size)
            yield part, outputs
            start = part.stop
        mechanism = tuner.fastest()
        self.at_once = mechanism if start == 0 and mechanism.chunk >= self.num_draws else None
        for part in in_parts(slice(start, self.num_draws), mechanism.chunk):
            yield part, self._attempt(part, mechanism)

    def bind(self, owner: Any) -> None:
        """Let the next call like this be quick, if draws were evaluated at once by what is settled.

        Args:
            owner: See :func:`evaluate`.
        """
        mechanism = self.at_once
        if not self.may_record or mechanism is None or type(self.x) is not Tensor:
            return
        if mechanism.kind in self.failed:
            return
        way = mechanism.kind, self.num_draws
        if owner is not None and self.params is None:
            self._bind_draws(owner, way)
        elif self.masks is not None:
            known = _masked.get(self.fn, None, dict)
            _keep(known, _kind_with_masks(self.masks, self.x), (self.tuner.recorded, way))

    def _bind_draws(self, owner: Any, way: Hashable) -> None:
        known = _bound.get(owner, None, dict)
        model, _ = known.get(kind_of(self.x), (None, None))
        if model is not None and model() is self.fn:
            return  # other tensors than were bound, perhaps at every call
        leaves = self.make_draws(slice(0, self.num_draws)).leaves
        bound = self.tuner.recorded.bound(way, (leaves, self.params), ((), self.x), leaves)
        if bound is not None:
            _keep(known, kind_of(self.x), (weakref.ref(self.fn), bound))

    def _attempt(self, part: slice, mechanism: Mechanism) -> Tensor:
        """Evaluate by the mechanism, or in halves where memory is not enough for as many draws."""
        size, most = part.stop - part.start, self.tuner.most
        if most is None or size <= most:
            by_mechanism = functools.partial(self._by_this_or_another, part, mechanism)
            outputs = self._if_memory_is_enough(size, by_mechanism)
            if outputs is not None:
                return outputs
        halves = in_parts(part, self.tuner.most or 1)
        return torch.cat([self._attempt(half, mechanism) for half in halves])

    def _if_memory_is_enough(self, size: int, evaluate: Callable[[], Tensor]) -> Tensor | None:
        """Outputs, or ``None`` where an accelerator had no memory for so many draws: then fewer come next."""
        try:
            return evaluate()
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            self.tuner.limit(size // 2)
        give_back_memory()  # now that the error keeps nothing of it
        return None

    def _by_this_or_another(self, part: slice, mechanism: Mechanism) -> Tensor:
        """Evaluate by the mechanism, or by another where that stands in the model's way."""
        *others, last = self._ways(mechanism.kind)  # a loop
        failed: dict[Kind, str] = {}  # and why; errors themselves would keep what was computed in memory
        for kind in others:
            try:
                outputs = self._outputs(self.make_draws(part), Mechanism(kind, mechanism.chunk), part.start)
                break
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever the model raises; if it is its own, the last raises it, too
                self.tuner.needs_rules |= kind not in (*_LOOPS, "folded")
                failed[kind] = first_line(error)
        else:
            kind = last
            outputs = self._outputs(self.make_draws(part), Mechanism(kind, mechanism.chunk), part.start)
            if not failed.keys() <= set(_LOOPS):  # now that the model has got beyond where it ended before
                self._warn_of_loop(next(reversed(failed.values())))
        self.failed |= failed.keys() - {kind}
        return outputs

    def _ways(self, kind: Kind) -> list[Kind]:
        """Kinds to try in turn; the loop is the last."""
        if kind in _LOOPS:
            return [kind, "loop"] if kind != "loop" and kind not in self.failed else ["loop"]
        known: tuple[Kind, ...] = (kind, "vmap", self.default)
        ways: list[Kind] = [k for k in dict.fromkeys(known) if k not in self.failed]
        if kind == "vmap" and not self.tuner.needs_rules:
            return [kind, *(ways or [kind]), "loop"]  # again with rules, for another branch of the model
        return [*ways, "loop"]

    def _tuner(self) -> _Tuner:
        return _tuners.get(self.fn, self.cell, _Tuner)

    def _candidates(self) -> list[Mechanism]:
        draw = self.make_draws(slice(0, 1))
        found = device_of(self.params, draw, self.x)
        device = "cpu" if found is None or found.type == "cpu" else "other"
        here = torch.accelerator.current_accelerator()
        if found is not None and here is not None and found.type == here.type:
            self.tuner.queue = found
        if device == "cpu":
            keep_large_blocks()
        nbytes = max(1, sum(t.nbytes for t in tensors(draw)))
        held = min(_DRAWS_BUDGET[device] // nbytes, max(_MANY_DRAWS, _SMALL_DRAWS[device] // nbytes))
        largest = self._largest_intermediate(draw)
        several = _LOOPED if largest is None else min(_LOOPED, max(2, _BUDGET[device] // max(1, largest)))
        loop = Mechanism("loop", max(1, min(self.num_draws, held, several)))
        self.tuner.is_mappable = largest is not None
        if largest is None:
            return [loop]
        layouts = [Mechanism("loop_channels_last", loop.chunk)] if self._may_change_layout() else []
        if device == "cpu" and 2 * max(nbytes, largest) > _MOST_OF_TWO_DRAWS:
            return [loop, *layouts]
        top = max(2, min(self.num_draws, held, _BUDGET[device] // max(1, largest)))
        first: Kind = "folded" if self._may_fold(draw) else self.default
        # Memory is fast on an accelerator, and kernels are many at a time: fewer draws gain nothing there.
        smaller = {max(2, top // 2), max(2, top // 4)} - {top}
        chunks = sorted(smaller, reverse=True) if device == "cpu" else []
        if _of_kind(Linearization, draw):  # the rules do not reach into `jvp`
            return [Mechanism("vmap", top), loop, *(Mechanism("vmap", chunk) for chunk in chunks)]
        other: Kind = "rows_first" if self.default == "channels_last" else "channels_last"
        return [
            Mechanism(first, top),
            loop,
            *layouts,
            *(self._in_threads(draw, largest, several, held) if device == "cpu" else []),
            *(Mechanism(first, chunk) for chunk in chunks),
            *(Mechanism(kind, top) for kind in dict.fromkeys((self.default, self.bare)) if kind != first),
            *([Mechanism(other, top)] if _has_images(self.x) else []),
        ]

    def _may_fold(self, draw: Draw) -> bool:
        """Whether draws are masks alone, of a model that takes those of several as further rows."""
        masks, x = _of_kind(DropoutMasks, draw), self.x
        return (
            isinstance(self.fn, FunctionalModule)
            and self.fn.is_row_wise
            and (isinstance(x, Tensor) and x.ndim > 1)
            and 0 < len(masks) == len(draw.effects)
            and not any(mask.shared_mask for mask in masks)
            and not tensors(draw.leaves)
        )

    def _may_change_layout(self) -> bool:
        """Whether there are images that a loop could have in the layout in which kernels are fastest."""
        is_plain = not (is_inside_transform() or is_autocast_on())
        return is_plain and self.has_other_layout and self.default == "channels_last"

    def _in_threads(self, draw: Draw, largest: int, several: int, held: int) -> list[Mechanism]:
        """The loop in threads, where each has a module of its own; other functions may share one."""
        if not isinstance(self.fn, FunctionalModule) or draw.effects or not may_divide():
            return []
        count = torch.get_num_threads()
        chunk = min(self.num_draws, held, count * max(1, several // count))
        each = largest + sum(t.nbytes for t in tensors(self.x))  # of which a module may have its own
        is_small = min(count, chunk) * each <= _IN_THREADS
        return [Mechanism("threads", chunk)] if chunk > 1 and is_small else []

    def _largest_intermediate(self, draw: Draw) -> int | None:
        """Bytes of the largest intermediate that has a draw axis, for one draw; ``None`` without vmap."""
        seen = Observed()
        try:
            with torch.no_grad():
                self._outputs(draw, Mechanism(self.bare, 1), 0, seen)
        except Exception as error:  # whatever the model raises
            with torch.no_grad():
                self._outputs(draw, Mechanism("loop", 1), 0)  # raises what the model raises without it, too
            self._warn_of_loop(first_line(error))
            return None
        self.tuner.needs_rules = seen.needs_rules
        return seen.nbytes

    def _vmap_can_take_it(self) -> bool:
        tuner = self.tuner
        if not tuner.candidates:
            tuner.begin(self._candidates())
        return tuner.is_mappable

    def _warn_of_loop(self, reason: str) -> None:
        """Say once why a loop is used."""
        if self._was_warned():
            return
        if self.tuner.draws_globally:
            reason = "it draws random numbers of its own, which are now a function of the draw"
        warnings.warn(
            f"`vmap` cannot take {self.model!r}, so its draws are evaluated in a loop: {reason}",
            UserWarning,
            stacklevel=levels_to_the_user(),
        )

    def _was_warned(self) -> bool:
        seen = _warned.get(self.model, "warned", list)
        seen.append(True)
        return len(seen) > 1

    def _outputs(self, draws: Draw, mechanism: Mechanism, start: int, seen: Observed | None = None) -> Tensor:
        if self.tuner.row_axes is None:
            masks = _of_kind(DropoutMasks, draws)
            whole = to(merge(self.params, index(draws.leaves, 0)), dtype=self.dtype) if masks else None
            self.tuner.row_axes = [mask.find_rows(self.fn, whole, self.x) for mask in masks]
        if mechanism.kind in ("loop", "threads"):
            return _stacked(self._one_by_one(draws, mechanism, start))
        if mechanism.kind == "loop_channels_last":
            return self._loop_in_channels_last(draws, mechanism, start)
        if self.may_record and all(map(_is_of_each_row, draws.effects)):
            return self._recorded(draws, mechanism)
        return self._together(draws, mechanism.kind, seen)

    def _together(self, draws: Draw, kind: Kind, seen: Observed | None = None) -> Tensor:
        if kind == "folded":
            return self._folded(_of_kind(DropoutMasks, draws))
        return self._mapped(draws, kind, seen)

    def _mapped(self, draws: Draw, kind: Kind, seen: Observed | None = None) -> Tensor:
        is_plain = kind == "vmap" and not self.tuner.needs_rules and seen is None
        rules = nullcontext() if is_plain else Batching(kind, seen)
        mapped, shared = _apart(draws)
        source = None if seen is not None else self._prepared_together(draws)

        def one(draw: Draw) -> Tensor:
            with rules:
                return self._one(Draw(draw.leaves, draw.effects + shared), source)

        return map_first_axis(one, mapped, tensors(mapped)[0].shape[0])

    def _recorded(self, draws: Draw, mechanism: Mechanism) -> Tensor:
        """By what was recorded of an earlier chunk; else all together, and recorded if that is worth it."""
        kind, count, effects = mechanism.kind, tensors(draws)[0].shape[0], self._at_rows(draws.effects)

        def evaluate(fixed: tuple[Params, Params], given: tuple[tuple[Any, ...], Any]) -> Tensor:
            (leaves, params), (effects, x) = fixed, given
            return self._from_first_row(params, x)._together(Draw(leaves, effects), kind)

        may_record = self.tuner.is_short(mechanism, count)
        values = (draws.leaves, self.params), (effects, self.x)
        found = self.tuner.recorded.evaluate((kind, count), self.fn, evaluate, *values, may_record=may_record)
        self.masks = draws if found is not None and not tensors(draws.leaves) else None
        return self._together(draws, kind) if found is None else found

    def _loop_in_channels_last(self, draws: Draw, mechanism: Mechanism, start: int) -> Tensor:
        run = self._in_channels_last
        if run.was_watched:
            return _stacked(run._one_by_one(draws, mechanism, start)).contiguous()
        # The first draw of a call shows what a model does with its inputs: draws take no ways of their own.
        first, others = (index(draws, part) for part in (slice(0, 1), slice(1, None)))
        with LayoutWatch() as watch:
            outputs = run._one_by_one(first, mechanism, start)
        if watch.reason is not None:
            raise RuntimeError(watch.reason)
        if not self.tuner.is_layout_free:
            (expected,) = self._one_by_one(first, mechanism, start)
            if not agree(outputs[0], expected, self.x):
                raise RuntimeError("Outputs depend on the layout of the inputs.")
            self.tuner.is_layout_free = True
        run.was_watched = True
        if len(tensors(others)[0]):
            outputs = [*outputs, *run._one_by_one(others, mechanism, start + 1)]
        return _stacked(outputs).contiguous()

    @functools.cached_property
    def _in_channels_last(self) -> "_Run":
        """The same with images in that layout."""
        run = copy.copy(self)
        run.x = optree.tree_map(channels_last, self.x)
        return run

    def _folded(self, masks: list[DropoutMasks]) -> Tensor:
        if has_global_hooks():
            raise RuntimeError("Hooks of all modules may mix rows.")
        at_rows = [mask.at_rows(self.first_row, None) for mask in masks]
        is_alone = len(masks) == 1 and is_plain(masks[0].key)
        folded = Folded(len(masks[0].key), self.tuner.places if is_alone else [])
        outputs = with_dropout(self.fn, at_rows, folded)(self.params, self.x)
        _check_outputs(outputs)
        return outputs.unflatten(0, (folded.num_draws, -1))

    def _one_by_one(self, draws: Draw, mechanism: Mechanism, start: int) -> list[Tensor]:
        fn = self.fn
        is_pure = self.tuner.draws_globally is False and not draws.effects
        if not is_pure or not isinstance(fn, FunctionalModule):
            numbers = self.numbers[start:].tolist()
            each = zip(unbind(draws), numbers, self._prepared(draws), strict=False)
            return [self._alone(draw, number, source) for draw, number, source in each]

        def evaluate(own: Sequence[Params]) -> list[Tensor]:
            return fn.in_turn([merge(self.params, leaves) for leaves in own], self.x)

        in_threads = mechanism.kind == "threads" and may_divide() and current_call().kind == "eval"
        own = unbind(draws.leaves)
        outputs = side_by_side(evaluate, own) if in_threads else evaluate(own)
        _check_outputs(outputs[0])
        return outputs

    def _prepared(self, draws: Draw) -> Sequence[Prepared | None]:
        """The masks of each draw, as far as it is known where they will be wanted."""
        keys = self._keys_of_masks(draws)
        if keys is None:
            return [None] * tensors(draws)[0].shape[0]
        return prepared(keys, self.tuner.places_of_one)

    def _prepared_together(self, draws: Draw) -> Prepared | None:
        """The masks of all draws, for a function that is mapped over these."""
        keys = self._keys_of_masks(draws)
        return None if keys is None else prepared_together(keys, self.tuner.places_of_one)

    def _keys_of_masks(self, draws: Draw) -> Tensor | None:
        """Keys ``(s,)`` of masks that can be made beforehand."""
        masks = _of_kind(DropoutMasks, draws)
        if len(masks) != 1 or masks[0].shared_mask or not is_plain(masks[0].key):
            return None
        return masks[0].at_rows(self.first_row, None).key

    def _alone(self, draw: Draw, number: int, source: Prepared | None) -> Tensor:
        """One draw outside ``vmap``; what the model draws for itself is a function of the draw, too."""
        if self.tuner.draws_globally is None:
            with forked(0):
                outputs, self.tuner.draws_globally = watched(lambda: self._one(draw, source))
            if not self.tuner.draws_globally:
                return outputs
        if not self.tuner.draws_globally:
            return self._one(draw, source)
        with forked(fold(fold(self._noise, "global"), number)):
            return self._one(draw, source)

    @functools.cached_property
    def _noise(self) -> int:
        """Seed of what the model draws from torch's random state."""
        with outside_transforms():
            seed = resolve_seed(self.seed)
        return int(seed) if isinstance(seed, int) or is_readable(seed) else 0

    def _one(self, draw: Draw, source: Prepared | None = None) -> Tensor:
        fn = self.fn
        if masks := _of_kind(DropoutMasks, draw):
            located = zip(masks, self.tuner.row_axes or (), strict=True)
            fn = with_dropout(fn, [mask.at_rows(self.first_row, axes) for mask, axes in located], source)
        if around := _of_kind(Linearization, draw):  # of the model with its masks
            fn = with_linearization(fn, around, self.dtype)
        outputs = fn(merge(self.params, draw.leaves), self.x)
        _check_outputs(outputs)
        return outputs


def _check_outputs(outputs: Any) -> None:
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"`predict(fn, ...)` should be given a model that returns one tensor, got "
            f"{type(outputs).__name__}. Pick one: `lambda params, x: fn(params, x)[...]`, or with "
            "`make_functional(module, call=...)`."
        )


def _is_captured() -> bool:
    """Whether kernels are being captured for later, as a graph, when nobody may wait for them."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _apart(draws: Draw) -> tuple[Draw, tuple[Linearization, ...]]:
    """Draws without the centers that all of them have, and these: the model is evaluated there once."""
    centers = [e for e in _of_kind(Linearization, draws) if all(map(is_repeated, tensors(e)))]
    mapped = tuple(effect for effect in draws.effects if effect not in centers)
    return Draw(draws.leaves, mapped), tuple(index(center, 0) for center in centers)


def _is_of_each_row(effect: Any) -> bool:
    """Whether these are masks of which each row has its own."""
    return isinstance(effect, DropoutMasks) and not effect.shared_mask


def _of_kind(kind: type[_T], draw: Draw) -> list[_T]:
    return [effect for effect in draw.effects if isinstance(effect, kind)]


def _stacked(outputs: list[Tensor]) -> Tensor:
    return outputs[0][None] if len(outputs) == 1 else torch.stack(outputs)


def _has_images(x: Any) -> bool:
    return any(t.ndim >= 4 for t in tensors(x))


def signature(tree: Any) -> tuple[Hashable, ...]:
    """Structure, shapes, dtypes and devices of a tree.

    A function among the fields of a node counts as any other: it would keep what it refers to alive.
    """
    if isinstance(tree, Tensor):
        return tree.shape, tree.dtype, tree.device
    if dataclasses.is_dataclass(tree):
        return type(tree), *(
            _of_field(field, getattr(tree, field.name)) for field in dataclasses.fields(tree)
        )
    leaves, structure = optree.tree_flatten(tree)
    return structure, tuple((t.shape, t.dtype, t.device) for t in leaves if isinstance(t, Tensor))


def _of_field(field: dataclasses.Field[Any], value: Any) -> Hashable:
    if not field.metadata.get("static", False):
        return signature(value)
    return "function" if callable(value) else value
