"""Training of networks: one loop, for a single network and for many at once.

The objective of a network is its mean negative log joint density, over the ``N`` rows of the data,

    loss(theta) = mean over the batch's rows of -log p(y | f_theta(x)) + prior_precision / (2 N) |theta|^2,

that is, ``-log p(D, theta) / N`` up to a constant, with a prior ``N(0, 1 / prior_precision)`` on each
parameter: its minimum is the MAP estimate that ``laplace`` expects for the same ``prior_precision``.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import optree
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ._data import Batch, Data, RaggedBatch, Source, global_generators, open_data
from ._functional import Model, training_call
from ._random import Seed, fold, forked, resolve_seed
from ._tree import (
    Fixed,
    Params,
    Where,
    index,
    is_parameter,
    map_leaves,
    matcher,
    merge,
    named_leaves,
    select,
    stack,
)
from .likelihoods import Likelihood

MakeOptimizer = Callable[[list[Tensor]], Optimizer]
MakeScheduler = Callable[[Optimizer], LRScheduler]
Callback = Callable[[int, Any, Params], bool | None]
Interval = Literal["epoch", "step"]


def fit(
    fn: Model,
    params: Params,
    data: Data,
    likelihood: Likelihood,
    *,
    optimizer: MakeOptimizer,
    num_epochs: int,
    batch_size: int | None = None,
    prior_precision: float = 0.0,
    num_data: int | None = None,
    where: Where | None = None,
    seed: int | None = None,
    scheduler: MakeScheduler | None = None,
    scheduler_interval: Interval = "epoch",
    max_grad_norm: float | None = None,
    progress: bool = False,
    callback: Callback | None = None,
) -> Params:
    """Train one network to its maximum a posteriori (or, without a prior, maximum likelihood) estimate.

    The loss is the **mean** over the batch's rows of ``-log p(y|f)`` plus
    ``prior_precision / (2 N) * sum(theta ** 2)``: the negative log joint divided by the ``N`` rows, so
    learning rates do not depend on the size of the data. Dropout is active, with masks that are a
    function of the seed; BatchNorm uses the statistics of the batch.

    Args:
        fn: Pure model, ``fn(params, x) -> outputs``.
        params: Where training starts, not changed. Leaves that are not of floating point, and ``Fixed``
            ones, are passed by.
        data: An ``(x, y)`` tuple of tensors (``x`` any pytree of tensors, one row an entry of their
            first axis), or a re-iterable of such batches, a ``DataLoader`` say. While such a loader
            works it sees torch's global random state, and generators of its own, seeded from ``seed``;
            they are put back afterwards. Worker processes that persist keep random states of their own:
            rows that they augment at random are no function of the seed. Batches are moved to the
            device of ``params``.
        likelihood: ``p(y|f)``.
        optimizer: ``leaves -> torch.optim.Optimizer``, ``functools.partial(torch.optim.Adam, lr=1e-3)``
            say. ``leaves`` is the list of the trained tensors, ordered by path.
        num_epochs: Passes through the data.
        batch_size: Rows a batch for data in tensors, shuffled every epoch; the last batch may be
            smaller. ``None``: one batch of all rows, in order.
        prior_precision: Precision (1 / variance) of a Gaussian prior of mean zero on every parameter.
        num_data: The number ``N`` of rows, if it is not that of the data (as with random
            augmentation that repeats rows). A loader that does not know its length is counted once.
        where: Which leaves to train; ``None`` for all. The others are held.
        seed: Of the shuffling and of the dropout masks; ``None`` draws one.
        scheduler: ``optimizer -> torch.optim.lr_scheduler.LRScheduler``; ``ReduceLROnPlateau`` sees the loss.
        scheduler_interval: Whether the scheduler steps every epoch or every step.
        max_grad_norm: Longer gradients are shortened to this norm.
        progress: Whether to show a bar over the epochs.
        callback: ``(epoch, loss, params)`` after every epoch, with the mean loss of the epoch as a float and
            a copy of the parameters; training ends when it returns ``True``.

    Returns:
        Trained parameters: new, detached tensors in the structure of ``params``. Buffers that
        training changed (BatchNorm's statistics) are added by name as ``Fixed``.

    Raises:
        TypeError: If an argument is of the wrong kind: a module for ``fn``, an iterator for ``data``.
        ValueError: If an argument is out of range, data are empty, or rows of x and y do not match.
        RuntimeError: If the loss or a parameter is no longer finite; checked after every epoch.

    Example:
        >>> import functools, torch, funcbayes as fb
        >>> x = torch.linspace(-1, 1, 20)[:, None]
        >>> fn, params = fb.make_functional(torch.nn.Linear(1, 1))
        >>> sgd = functools.partial(torch.optim.SGD, lr=0.5)
        >>> normal = fb.likelihoods.Normal(1.0)
        >>> trained = fb.training.fit(fn, params, (x, 3 * x), normal, optimizer=sgd, num_epochs=100)
        >>> print(round(trained["weight"].item(), 3))
        3.0
    """
    options = Options(
        call="training.fit",
        optimizer=optimizer,
        num_epochs=num_epochs,
        scheduler=scheduler,
        scheduler_interval=scheduler_interval,
        max_grad_norm=max_grad_norm,
        progress=progress,
        callback=callback and _for_one(callback),
    )
    check_model(fn, options.call)
    members = map_leaves(_with_member_axis, params)
    source = open_data(data, batch_size=batch_size, num_streams=1, call=options.call)
    seed = int(resolve_seed(seed))
    objective = MapObjective.over(fn, likelihood, source, seed, prior_precision, num_data, options.call)
    return index(minimize(objective, members, source, [seed], [seed], options, where=where), 0)


def _with_member_axis(leaf: Any) -> Any:
    return leaf.unsqueeze(0) if isinstance(leaf, Tensor) else leaf


def _for_one(callback: Callback) -> Callback:
    return lambda epoch, losses, members: callback(epoch, losses.item(), index(members, 0))


def check_model(fn: Any, call: str) -> None:
    """Refuse what is not a pure function."""
    if isinstance(fn, nn.Module):
        raise TypeError(
            f"`{call}(fn, ...)` should be given a function of (params, x), got an nn.Module. "
            "Wrap it with `fn, params = make_functional(module)`."
        )
    if not callable(fn):
        raise TypeError(
            f"`{call}(fn, ...)` should be given a function of (params, x), got {type(fn).__name__}."
        )


@dataclass(frozen=True)
class Options:
    """How to descend; checked when it is made.

    ``call`` is the name of the public function, for messages. ``callback`` is given losses ``(K,)`` and
    members.
    """

    call: str
    optimizer: MakeOptimizer
    num_epochs: int
    scheduler: MakeScheduler | None = None
    scheduler_interval: Interval = "epoch"
    max_grad_norm: float | None = None
    progress: bool = False
    callback: Callback | None = None

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        if self.num_epochs < 1:
            raise ValueError(f"`{self.call}(num_epochs=...)` should be at least 1, got {self.num_epochs}.")
        if self.scheduler_interval not in ("epoch", "step"):
            raise ValueError(
                f"`{self.call}(scheduler_interval=...)` should be 'epoch' or 'step', "
                f"got {self.scheduler_interval!r}."
            )
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(
                f"`{self.call}(max_grad_norm=...)` should be positive or None, got {self.max_grad_norm}."
            )
        for name, make in (("optimizer", self.optimizer), ("scheduler", self.scheduler)):
            if make is not None and not callable(make):
                raise TypeError(
                    f"`{self.call}({name}=...)` should be a function that makes one, got "
                    f"{type(make).__name__}. Write `functools.partial(torch.optim.Adam, lr=1e-3)`, say."
                )


# (params, x, y, seed, check) -> (loss, the buffers that changed). `check` asks to look at values.
Objective = Callable[[Params, Any, Tensor, Seed, bool], tuple[Tensor, Params]]


@dataclass(frozen=True)
class MapObjective:
    """Mean negative log joint of one network: see the top of this file.

    ``decay`` is ``prior_precision / N``.
    """

    fn: Model
    likelihood: Likelihood
    decay: float
    call: str

    @classmethod
    def over(
        cls,
        fn: Model,
        likelihood: Likelihood,
        source: Source,
        seed: int,
        prior_precision: float,
        num_data: int | None,
        call: str,
    ) -> "MapObjective":
        """Make the objective for the data of ``source``; rows are counted only if a prior asks for it."""
        if not (0 <= prior_precision < math.inf):
            raise ValueError(
                f"`{call}(prior_precision=...)` should be at least 0 and finite, got {prior_precision}."
            )
        if num_data is not None and num_data < 1:
            raise ValueError(f"`{call}(num_data=...)` should be at least 1, got {num_data}.")
        if not prior_precision:
            return cls(fn, likelihood, 0.0, call)
        num_rows = source.num_data(seed) if num_data is None else num_data
        return cls(fn, likelihood, float(prior_precision) / max(num_rows, 1), call)

    def __call__(
        self, params: Params, x: Any, y: Tensor, seed: Seed, check: bool = False
    ) -> tuple[Tensor, Params]:
        """Return the loss and the buffers that changed."""
        outputs, changed = training_call(self.fn, params, x, seed)
        if check:
            self.likelihood.check(outputs, y, call=f"{self.call}(data=...)")
        loss = -self.likelihood.log_prob(outputs, y).mean()
        if self.decay:
            squares = [leaf.square().sum() for leaf in _leaves(params) if is_parameter(leaf)]
            loss = loss + 0.5 * self.decay * torch.stack(squares).sum().to(loss.dtype)
        return loss, changed


def _is_fixed(node: Any) -> bool:
    return isinstance(node, Fixed)


def _leaves(tree: Any) -> list[Any]:
    return optree.tree_leaves(tree, is_leaf=_is_fixed)


def _savable(leaf: Any) -> Any:
    """Detach a leaf; what was made under inference mode is copied, so that autograd can save it."""
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.clone() if leaf.is_inference() else leaf.detach()


class Networks:
    """The ``K`` networks being trained, but for their trained leaves, which optimizers own.

    Trees of ``members`` have a leading axis ``K`` on every leaf. In ``seeds`` each network has its own,
    for the noise of its training. The fixed values of a network change as it is evaluated. Tensors
    of the user's are read only: optimizers copy the leaves they move.
    """

    def __init__(
        self, objective: Objective, members: Params, seeds: Sequence[int], where: Where | None, call: str
    ) -> None:
        members = map_leaves(_savable, members)
        chosen = matcher(where)
        trained = {
            name for name, leaf in named_leaves(members).items() if is_parameter(leaf) and chosen(name, leaf)
        }
        if not trained:
            raise ValueError(
                f"`{call}(params, ...)` should have a leaf of floating point to train"
                + (", got none." if where is None else f", got none that `where={where!r}` chooses.")
            )
        self.num_members = len(seeds)
        self.objective = objective
        self.call = call
        self.members = members
        self.leaves, self.spec = optree.tree_flatten(select(members, lambda name, _: name in trained))
        self.held = select(members, lambda name, leaf: name not in trained and not _is_fixed(leaf))
        fixed = select(members, lambda _, leaf: _is_fixed(leaf))
        self.fixed = FixedValues([index(fixed, k) for k in range(self.num_members)])
        self.keys = [fold(seed, "dropout") for seed in seeds]
        self.num_steps = 0
        # Found by `probe`: noise from torch's global state, buffers that training adds.
        self.draws_globally = False
        self.adds_buffers = False
        self._held = [index(self.held, k) for k in range(self.num_members)]

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.leaves[0].device

    def loss(
        self, leaves: Sequence[Tensor], held: Params, fixed: Params, pair: tuple[Any, Tensor], key: Seed
    ) -> tuple[Tensor, Params]:
        """Loss of one network and its fixed values afterwards: a pure function."""
        params = merge(merge(held, self.spec.unflatten(leaves)), fixed)
        loss, changed = self.objective(params, *pair, key, False)
        return loss, merge(fixed, changed) if changed else fixed

    def gradient(
        self, k: int, leaves: Sequence[Tensor], batch: Batch | RaggedBatch, step: int
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Loss of network ``k`` alone, and its gradient in ``leaves``, ``None`` where it has none."""
        own = [leaf.detach().requires_grad_() for leaf in leaves]
        key = fold(self.keys[k], step)
        with torch.enable_grad(), self._noise(key):
            loss, fixed = self.loss(own, self._held[k], self.fixed.of(k), batch.member(k), key)
            grads = torch.autograd.grad(loss, own, allow_unused=True)
        self.fixed.put(k, fixed)
        return loss.detach(), list(grads)

    def _noise(self, key: int) -> AbstractContextManager[None]:
        """Noise other than dropout's comes from torch's global state: then that is seeded for the step."""
        return forked(fold(key, "global")) if self.draws_globally else nullcontext()

    def probe(self, batch: Batch | RaggedBatch) -> None:
        """Evaluate the first network once, without effect, to see what training it will need.

        Bad outputs and targets are refused here, where values can be looked at.
        """
        params = merge(index(self.members, 0), self.fixed.of(0))
        with torch.no_grad(), forked(self.keys[0]):
            before = [g.get_state() for g in global_generators()]
            _, changed = self.objective(params, *batch.member(0), self.keys[0], True)
            after = [g.get_state() for g in global_generators()]
        self.adds_buffers = bool(changed) and not set(named_leaves(changed)) <= set(
            named_leaves(self.fixed.of(0))
        )
        self.draws_globally = any(not torch.equal(a, b) for a, b in zip(after, before, strict=False))

    def assemble(self, leaves: Sequence[Tensor]) -> Params:
        """Members with these trained leaves ``(K, *s)`` and the present fixed values, all new tensors."""
        trained = self.spec.unflatten([leaf.detach().clone() for leaf in leaves])
        fixed = map_leaves(torch.clone, self.fixed.all())
        held = map_leaves(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, self.held)
        return merge(merge(merge(self.members, held), trained), fixed)


class FixedValues:
    """What training passes by but evaluating may change, of each network.

    Kept a network each, or stacked for a vmapped pass, whichever was asked for last. In the stacked
    form integers that are equal in all networks stay one tensor, ``common``: BatchNorm reads its
    count of batches as a number, which vmap allows for a tensor it does not map over only.
    """

    def __init__(self, trees: list[Params]) -> None:
        self._trees: list[Params] | None = trees
        self._stacked: tuple[Params, Params] = ({}, {})
        self._num = len(trees)

    def of(self, k: int) -> Params:
        """The values of network ``k``."""
        return self._by_member()[k]

    def put(self, k: int, tree: Params) -> None:
        """Replace the values of network ``k``."""
        self._by_member()[k] = tree

    def stacked(self) -> tuple[Params, Params]:
        """``(varying, common)``: with an axis of networks, and without."""
        if self._trees is not None:
            everything = stack(self._trees)
            equal = {name for name, leaf in named_leaves(everything).items() if _is_common(leaf.tensor)}
            common = index(select(everything, lambda name, _: name in equal), 0)
            self._stacked = select(everything, lambda name, _: name not in equal), common
            self._trees = None
        return self._stacked

    def put_stacked(self, varying: Params, common: Params) -> None:
        """Replace the values of all networks."""
        self._stacked, self._trees = (varying, common), None

    def all(self) -> Params:
        """The values of all networks, every leaf with an axis of networks."""
        return stack(self._by_member())

    def _by_member(self) -> list[Params]:
        if self._trees is None:
            varying, common = self._stacked
            self._trees = [merge(index(varying, k), common) for k in range(self._num)]
        return self._trees


def _is_common(values: Tensor) -> bool:
    return not values.is_floating_point() and bool((values == values[0]).all())


# How losses (K,) and gradients, (K, *s) each, are found for all networks at leaves (K, *s).
Gradients = Callable[
    [Networks, list[Tensor], Batch | RaggedBatch, int], tuple[Tensor, Sequence[Tensor | None]]
]


def one_by_one(
    networks: Networks, leaves: list[Tensor], batch: Batch | RaggedBatch, step: int
) -> tuple[Tensor, Sequence[Tensor | None]]:
    """Evaluate the networks in a loop."""
    found = [
        networks.gradient(k, [leaf[k] for leaf in leaves], batch, step) for k in range(networks.num_members)
    ]
    losses, grads = zip(*found, strict=True)
    return joined(losses), [_joined_gradients(of_leaf) for of_leaf in zip(*grads, strict=True)]


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Stack; one tensor is not copied."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))


def _joined_gradients(grads: Sequence[Tensor | None]) -> Tensor | None:
    known = next((g for g in grads if g is not None), None)
    if known is None:
        return None
    return joined([torch.zeros_like(known) if g is None else g for g in grads])


@dataclass
class Mover:
    """An optimizer, its scheduler, and the leaves they move: of one network, or stacked of all."""

    leaves: list[Tensor]
    optimizer: Optimizer
    scheduler: LRScheduler | None

    @classmethod
    def of(cls, leaves: Sequence[Tensor], options: Options) -> "Mover":
        """Make the optimizer and scheduler of ``options`` for copies of ``leaves``."""
        own = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        optimizer = _made_optimizer(own, options)
        scheduler = options.scheduler and options.scheduler(optimizer)
        if scheduler is not None and not isinstance(scheduler, LRScheduler):
            raise TypeError(
                f"`{options.call}(scheduler=...)` should make a torch.optim.lr_scheduler.LRScheduler, got "
                f"{type(scheduler).__name__}."
            )
        return cls(own, optimizer, scheduler)

    def move(self, grads: Sequence[Tensor | None]) -> None:
        """Take one step."""
        for leaf, grad in zip(self.leaves, grads, strict=True):
            leaf.grad = grad
        self.optimizer.step()

    def schedule(self, losses: Tensor, k: int) -> None:
        """Step the scheduler; one that watches the loss is told that of network ``k``."""
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(losses[k].item())
        elif self.scheduler is not None:
            self.scheduler.step()


def _made_optimizer(leaves: list[Tensor], options: Options) -> Optimizer:
    optimizer = options.optimizer(list(leaves))
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"`{options.call}(optimizer=...)` should make a torch.optim.Optimizer from a list of leaves, got "
            f"{type(optimizer).__name__}. Write `functools.partial(torch.optim.Adam, lr=1e-3)`, say."
        )
    ours = {id(leaf) for leaf in leaves}
    if any(id(p) not in ours for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            f"`{options.call}(optimizer=...)` should make an optimizer of the leaves it is given, got one of "
            "other tensors. Write `lambda leaves: torch.optim.Adam(leaves)`, say."
        )
    return optimizer


class Movers:
    """The optimizers of all networks: one for the stacked leaves, or one a network."""

    def __init__(self, movers: list[Mover], stacked: bool, max_grad_norm: float | None) -> None:
        self.movers = movers
        self.is_stacked = stacked
        self.max_grad_norm = max_grad_norm
        self.needs_closure = _needs_closure(movers[0].optimizer)

    @classmethod
    def separate(cls, leaves: Sequence[Tensor], options: Options) -> "Movers":
        """Make one optimizer a network, from leaves ``(K, *s)``."""
        movers = [Mover.of([leaf[k] for leaf in leaves], options) for k in range(len(leaves[0]))]
        return cls(movers, False, options.max_grad_norm)

    def leaves(self) -> list[Tensor]:
        """The present values, ``(K, *s)`` each."""
        if self.is_stacked:
            return [leaf.detach() for leaf in self.movers[0].leaves]
        return [joined(parts).detach() for parts in zip(*(m.leaves for m in self.movers), strict=True)]

    def step(self, gradients: Gradients, networks: Networks, batch: Batch | RaggedBatch, step: int) -> Tensor:
        """Move all networks by one step; their losses ``(K,)`` before it."""
        if self.needs_closure:
            moved = [self._move_alone(k, networks, batch, step) for k in range(networks.num_members)]
            return joined(moved)
        losses, grads = gradients(networks, self.leaves(), batch, step)
        if self.max_grad_norm is not None:
            grads = _clipped(grads, self.max_grad_norm)
        if self.is_stacked:
            self.movers[0].move(grads)
        else:
            for k, mover in enumerate(self.movers):
                mover.move([None if g is None else g[k] for g in grads])
        return losses

    def _move_alone(self, k: int, networks: Networks, batch: Batch | RaggedBatch, step: int) -> Tensor:
        """One step of an optimizer that evaluates the loss itself, as often as it likes."""
        mover, losses = self.movers[k], []

        def closure() -> Tensor:
            loss, grads = networks.gradient(k, mover.leaves, batch, step)
            if self.max_grad_norm is not None:
                stacked = [None if g is None else g.unsqueeze(0) for g in grads]
                grads = [None if g is None else g[0] for g in _clipped(stacked, self.max_grad_norm)]
            for leaf, grad in zip(mover.leaves, grads, strict=True):
                leaf.grad = grad
            losses.append(loss)
            return loss

        mover.optimizer.step(closure)  # type: ignore[arg-type]  # torch's stub asks for a float
        return losses[0]

    def schedule(self, losses: Tensor) -> None:
        """Step the schedulers, for losses ``(K,)``."""
        for k, mover in enumerate(self.movers):
            mover.schedule(losses, k)


def _needs_closure(optimizer: Optimizer) -> bool:
    parameter = inspect.signature(type(optimizer).step).parameters.get("closure")
    return parameter is not None and parameter.default is inspect.Parameter.empty


def _clipped(grads: Sequence[Tensor | None], max_norm: float) -> list[Tensor | None]:
    """Scale each network's gradient to a norm of at most ``max_norm``, as ``clip_grad_norm_`` does."""
    squares = [g.reshape(len(g), -1).square().sum(1) for g in grads if g is not None]
    norm = torch.stack(squares).sum(0).sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return [None if g is None else g * scale.view(-1, *(1 for _ in g.shape[1:])) for g in grads]


def minimize(
    objective: Objective,
    members: Params,
    source: Source,
    seeds: Sequence[int],
    streams: Sequence[int],
    options: Options,
    *,
    where: Where | None = None,
    gradients: Gradients = one_by_one,
    make_movers: Callable[[Sequence[Tensor], Options], Movers] = Movers.separate,
) -> Params:
    """Train ``K`` networks on an objective: the one loop that every fit runs.

    Args:
        objective: Loss of one network.
        members: Where they start; every leaf has a leading axis ``K``.
        source: The data.
        seeds: One a network, for its noise.
        streams: Seeds of the streams of batches: one a network, or one for all.
        options: How to descend.
        where: Which leaves to train.
        gradients: How gradients are found.
        make_movers: How optimizers are shared out.

    Returns:
        Trained members, all new tensors without a graph.
    """
    # Whatever the caller's mode: gradients are needed here, and tensors that autograd can save.
    with torch.inference_mode(False), torch.enable_grad():
        networks = Networks(objective, members, seeds, where, options.call)
        movers = make_movers(networks.leaves, options)
        with _bar(options) as show:
            for epoch in range(options.num_epochs):
                losses = _run_epoch(epoch, networks, movers, gradients, source, streams, options)
                _check_finite(movers.leaves(), networks, epoch)
                show(losses)
                if options.callback and options.callback(epoch, losses, networks.assemble(movers.leaves())):
                    break
        return networks.assemble(movers.leaves())


def _run_epoch(
    epoch: int,
    networks: Networks,
    movers: Movers,
    gradients: Gradients,
    source: Source,
    streams: Sequence[int],
    options: Options,
) -> Tensor:
    """Go through the data once; the mean losses ``(K,)``, every row counting the same."""
    losses, rows = [], []
    for batch in source.epoch(streams, epoch, networks.device):
        if networks.num_steps == 0:
            networks.probe(batch)
        losses.append(movers.step(gradients, networks, batch, networks.num_steps))
        rows.append(torch.as_tensor(batch.rows))
        networks.num_steps += 1
        if options.scheduler_interval == "step":
            movers.schedule(losses[-1])
    # Looked at once an epoch, for on an accelerator every look makes it wait.
    table = torch.stack(losses).cpu()
    _check_losses(table, networks, epoch)
    weights = torch.stack([r.expand(table.shape[1]) for r in rows]).to(table.dtype)
    mean = (weights * table).sum(0) / weights.sum(0)
    if options.scheduler_interval == "epoch":
        movers.schedule(mean)
    return mean


def _check_losses(table: Tensor, networks: Networks, epoch: int) -> None:
    bad = (~table.isfinite()).nonzero()
    if len(bad):
        step, k = bad[0].tolist()
        raise RuntimeError(
            f"The loss{_of_member(k, networks)} in `{networks.call}` is {table[step, k].item()} in step "
            f"{step} of epoch {epoch}. A lower learning rate, or `max_grad_norm=1.0`, usually helps."
        )


def _check_finite(leaves: Sequence[Tensor], networks: Networks, epoch: int) -> None:
    """Refuse parameters that the last step has made infinite, which no loss has shown yet."""
    fine = torch.stack([leaf.isfinite().reshape(len(leaf), -1).all(1) for leaf in leaves]).all(0)
    if not bool(fine.all()):
        k = int((~fine).nonzero()[0])
        raise RuntimeError(
            f"The parameters{_of_member(k, networks)} in `{networks.call}` are not finite after epoch "
            f"{epoch}. A lower learning rate, or `max_grad_norm=1.0`, usually helps."
        )


def _of_member(k: int, networks: Networks) -> str:
    return f" of member {k}" if networks.num_members > 1 else ""


@contextmanager
def _bar(options: Options) -> Iterator[Callable[[Tensor], None]]:
    """Show a bar over the epochs, if it is asked for."""
    if not options.progress:
        yield lambda losses: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=options.num_epochs, desc=options.call, unit="epoch") as bar:

        def show(losses: Tensor) -> None:
            bar.set_postfix(loss=f"{losses.mean().item():.4g}", refresh=False)
            bar.update()

        yield show
