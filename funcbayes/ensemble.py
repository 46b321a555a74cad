"""Deep ensembles: members trained at once, each as if it were alone.

Networks that start and shuffle at random end in different modes; the mixture of what they predict
is better calibrated than any of them (Lakshminarayanan et al. 2017, "Simple and scalable predictive
uncertainty estimation using deep ensembles", https://arxiv.org/abs/1612.01474).
"""

import functools
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import optree
import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ._data import Batch, Data, RaggedBatch, open_data
from ._functional import FunctionalModule, Model, make_functional
from ._random import fold, forked, resolve_seed
from ._tree import Fixed, Params, Where, difference, index, merge, named_leaves, select, stack
from .likelihoods import Likelihood
from .posteriors import Ensemble
from .training import (
    Callback,
    Interval,
    MakeOptimizer,
    MakeScheduler,
    MapObjective,
    Mover,
    Movers,
    Networks,
    Options,
    check_model,
    minimize,
    one_by_one,
)

# These treat every entry of a tensor by itself, so stacked tensors move as they would alone. Exact
# types: a subclass may do anything.
_ELEMENTWISE: tuple[type[Optimizer], ...] = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.ASGD,
)


def member_seeds(seed: int, num_members: int) -> tuple[int, ...]:
    """Seeds of the members of an ensemble: what a member does depends on its own only.

    Args:
        seed: Seed of the ensemble.
        num_members: How many; the first seeds do not depend on it.

    Returns:
        One seed a member.

    Example:
        >>> from funcbayes import ensemble
        >>> ensemble.member_seeds(0, 5)[:2] == ensemble.member_seeds(0, 2)
        True
    """
    return tuple(fold(fold(seed, "member"), k) for k in range(num_members))


def init(
    make_module: Callable[[], nn.Module],
    num_members: int,
    seed: int | None = None,
    call: Callable[[nn.Module, Any], Any] | None = None,
) -> tuple[FunctionalModule, Params]:
    """Build the members of an ensemble, each from random weights of its own.

    Args:
        make_module: Builds a module, with torch's global random state seeded from the member's seed;
            the state is put back afterwards.
        num_members: How many, ``K``.
        seed: See :func:`member_seeds`; ``None`` draws one.
        call: As in :func:`funcbayes.make_functional`.

    Returns:
        ``fn`` and ``members``, parameters with a leading axis ``K``. Buffers whose values differ between
        the modules are among them as ``Fixed``; the others are frozen in ``fn``.

    Raises:
        TypeError: If ``make_module`` is a module or makes something else.
        ValueError: If there is less than one member, or the modules differ in more than values.

    Example:
        >>> import torch, funcbayes as fb
        >>> fn, members = fb.ensemble.init(lambda: torch.nn.Linear(3, 2), num_members=4, seed=0)
        >>> members["weight"].shape
        torch.Size([4, 2, 3])
    """
    if isinstance(make_module, nn.Module) or not callable(make_module):
        raise TypeError(
            "`ensemble.init(make_module, ...)` should be given a function that builds a new module, got "
            f"{type(make_module).__name__}. Write `lambda: Net(...)`."
        )
    if num_members < 1:
        raise ValueError(f"`ensemble.init(num_members=...)` should be at least 1, got {num_members}.")
    modules = []
    for member_seed in member_seeds(int(resolve_seed(seed)), num_members):
        with forked(member_seed):
            modules.append(make_module())
    return _stacked_modules(
        modules, call, "ensemble.init(make_module, ...)", "Build a new one at every call."
    )


def from_modules(
    modules: Iterable[nn.Module], call: Callable[[nn.Module, Any], Any] | None = None
) -> tuple[FunctionalModule, Ensemble]:
    """Make an ensemble of modules that were trained elsewhere.

    Args:
        modules: Modules of one architecture; they are copied.
        call: As in :func:`funcbayes.make_functional`.

    Returns:
        ``fn`` and the ensemble, with equal weights. Buffers whose values differ between the modules
        (BatchNorm's statistics) are in the members as ``Fixed``.

    Raises:
        TypeError: If one of them is no module.
        ValueError: If there are none, one is there twice, or they differ in more than values.

    Example:
        >>> import torch, funcbayes as fb
        >>> fn, ensemble = fb.ensemble.from_modules([torch.nn.Linear(3, 2) for _ in range(4)])
        >>> ensemble.members["bias"].shape
        torch.Size([4, 2])
    """
    modules = list(modules)
    if not modules:
        raise ValueError("`ensemble.from_modules(modules)` should be given at least one module, got none.")
    fn, members = _stacked_modules(
        modules, call, "ensemble.from_modules(modules)", "Keep copies: `copy.deepcopy(module)`."
    )
    return fn, Ensemble(members)


def fit(
    fn: Model,
    members: Params,
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
    chunk_size: int | None = None,
    share_batches: bool = False,
    progress: bool = False,
    callback: Callback | None = None,
) -> Ensemble:
    """Train the members of an ensemble at once, by one vectorised pass a step.

    Member ``k`` ends, to rounding, where it would with ``training.fit(fn, member_k, ...)`` and
    ``seed=member_seeds(seed, K)[k]``: it has its own shuffling, dropout masks and BatchNorm statistics.
    The loss of each member is, as there, the **mean** over the batch's rows of ``-log p(y|f)`` plus
    ``prior_precision / (2 N) * sum(theta ** 2)``.

    Args:
        fn: Pure model, ``fn(params, x) -> outputs``. One that ``vmap`` cannot take is evaluated member by
            member, with a warning.
        members: Where training starts, every leaf with a leading axis ``K``; not changed. See :func:`init`.
        data: As in :func:`funcbayes.training.fit`. Each member goes through a loader by itself, at the
            same time as the others, with worker processes of its own; see ``share_batches``.
        likelihood: ``p(y|f)``.
        optimizer: ``leaves -> torch.optim.Optimizer``. torch's elementwise optimizers (SGD, the Adam family,
            RMSprop, ...) move the stacked leaves; any other type is made once a member. It is called
            for one member first, to see which.
        num_epochs: Passes through the data, of each member.
        batch_size: Rows a batch for data in tensors; ``None``: one batch of all rows, in order.
        prior_precision: Precision (1 / variance) of a Gaussian prior of mean zero on every parameter.
        num_data: The number ``N`` of rows, if it is not that of the data.
        where: Which leaves to train; ``None`` for all. The others are held.
        seed: See :func:`member_seeds`; ``None`` draws one.
        scheduler: ``optimizer -> LRScheduler``.
        scheduler_interval: Whether the scheduler steps every epoch or every step.
        max_grad_norm: Longer gradients are shortened to this norm, each member's by itself.
        chunk_size: How many members are evaluated at a time; ``None`` for all.
        share_batches: Whether all members see the same batches, shuffled by ``seed``: ``K`` times less
            loading, and members that differ in their start and dropout only.
        progress: Whether to show a bar over the epochs.
        callback: ``(epoch, losses, members)`` after every epoch, with the mean loss of each member ``(K,)``;
            training ends when it returns ``True``.

    Returns:
        The trained members, with equal weights: new, detached tensors.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range, data are empty, or leaves disagree on ``K``.
        RuntimeError: If a loss or a parameter is no longer finite; checked after every epoch.

    Example:
        >>> import functools, torch, funcbayes as fb
        >>> x = torch.linspace(-1, 1, 20)[:, None]
        >>> fn, members = fb.ensemble.init(lambda: torch.nn.Linear(1, 1), num_members=3, seed=0)
        >>> adam = functools.partial(torch.optim.Adam, lr=0.1)
        >>> normal = fb.likelihoods.Normal(0.1)
        >>> fitted = fb.ensemble.fit(
        ...     fn, members, (x, 3 * x), normal, optimizer=adam, num_epochs=2, batch_size=5, seed=0
        ... )
        >>> fitted.members["weight"].shape
        torch.Size([3, 1, 1])
    """
    options = Options(
        call="ensemble.fit",
        optimizer=optimizer,
        num_epochs=num_epochs,
        scheduler=scheduler,
        scheduler_interval=scheduler_interval,
        max_grad_norm=max_grad_norm,
        progress=progress,
        callback=callback,
    )
    check_model(fn, options.call)
    num_members = _check_members(members)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"`ensemble.fit(chunk_size=...)` should be at least 1 or None, got {chunk_size}.")
    source = open_data(
        data, batch_size=batch_size, num_streams=1 if share_batches else num_members, call=options.call
    )
    seed = int(resolve_seed(seed))
    seeds = member_seeds(seed, num_members)
    objective = MapObjective.over(fn, likelihood, source, seed, prior_precision, num_data, options.call)
    trained = minimize(
        objective,
        members,
        source,
        seeds,
        (seed,) if share_batches else seeds,
        options,
        where=where,
        gradients=Together(chunk_size),
        make_movers=shared_movers,
    )
    return Ensemble(trained)


def _check_members(members: Params) -> int:
    """Number of members, on which all leaves agree."""
    tensors = {
        name: leaf.tensor if isinstance(leaf, Fixed) else leaf for name, leaf in named_leaves(members).items()
    }
    if not tensors:
        raise ValueError(
            "`ensemble.fit(fn, members, ...)` should be given at least one leaf, got an empty tree."
        )
    sizes = {
        name: leaf.shape[0] if isinstance(leaf, Tensor) and leaf.ndim else None
        for name, leaf in tensors.items()
    }
    first, expected = next(iter(sizes.items()))
    for name, size in sizes.items():
        if not size or size != expected:
            raise ValueError(
                "`ensemble.fit(fn, members, ...)` should be given leaves with one leading axis over the "
                f"members; {first!r} has {expected or 'none'}, {name!r} has {size or 'none'}. "
                "Write `fn, members = ensemble.init(make_module, num_members)`."
            )
    assert expected is not None
    return expected


class Together:
    """Losses of all members in one vmapped pass, and one backward pass for their sum.

    One backward pass and not ``vmap(grad)``, which is slower; the gradient of the sum in a member's
    leaves is that of its own loss. A model that ``vmap`` cannot take is evaluated in a loop.
    """

    def __init__(self, chunk_size: int | None) -> None:
        self.chunk_size = chunk_size
        self._is_tried = False
        self._loops = False

    def __call__(
        self, networks: Networks, leaves: list[Tensor], batch: Batch | RaggedBatch, step: int
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        """Return losses ``(K,)`` and gradients in ``leaves``, ``(K, *s)`` each."""
        if networks.num_members == 1 or self._loops:
            return one_by_one(networks, leaves, batch, step)
        if networks.draws_globally and not self._is_tried:
            return self._give_up(networks, leaves, batch, step, "it draws from torch's global random state")
        # Under vmap a buffer that is written has to have an axis of members. Those that still are
        # frozen in `fn` are given one by the first step.
        adds_buffers = networks.adds_buffers and networks.num_steps == 0
        if adds_buffers or isinstance(batch, RaggedBatch):
            return one_by_one(networks, leaves, batch, step)
        if self._is_tried:
            return self._by_chunks(networks, leaves, batch, step)
        try:
            found = self._by_chunks(networks, leaves, batch, step)
        except (
            Exception
        ) as error:  # whatever it is, a loop that works is an answer, and its error the plainer one
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        else:
            self._is_tried = True
            return found
        return self._give_up(networks, leaves, batch, step, reason)

    def _give_up(
        self, networks: Networks, leaves: list[Tensor], batch: Batch | RaggedBatch, step: int, reason: str
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        found = one_by_one(networks, leaves, batch, step)
        self._loops = self._is_tried = True
        warnings.warn(
            f"`ensemble.fit` trains the members one by one, because `vmap` cannot take the model: {reason}",
            stacklevel=7,
        )
        return found

    def _by_chunks(
        self, networks: Networks, leaves: list[Tensor], batch: Batch, step: int
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        size = self.chunk_size or networks.num_members
        starts = range(0, networks.num_members, size)
        found = [_vmapped(networks, leaves, batch, step, slice(a, a + size)) for a in starts]
        if len(found) == 1:
            losses, grads, varying, common = found[0]
        else:
            losses = torch.cat([chunk[0] for chunk in found])
            grads = [
                None if parts[0] is None else torch.cat(parts)
                for parts in zip(*(c[1] for c in found), strict=True)
            ]
            varying = optree.tree_map(lambda *parts: torch.cat(parts), *(chunk[2] for chunk in found))
            common = found[-1][3]
        networks.fixed.put_stacked(varying, common)
        return losses, grads


def _vmapped(
    networks: Networks, leaves: list[Tensor], batch: Batch, step: int, part: slice
) -> tuple[Tensor, Sequence[Any], Params, Params]:
    """Losses and gradients of some members, and their fixed values afterwards."""
    varying, common = networks.fixed.stacked()
    held, keys = networks.held, torch.tensor(networks.keys)
    if part.start > 0 or part.stop < networks.num_members:
        batch, keys = batch.part(part), keys[part]
        held, varying = index(held, part), index(varying, part)
    own = [leaf[part].detach().requires_grad_() for leaf in leaves]
    one = functools.partial(_loss_of_one, networks, batch.spec, frozenset(named_leaves(common)))
    dims: Any = (0, 0, None)  # torch's annotation leaves None out
    with torch.enable_grad():
        mapped = vmap(one, in_dims=(0, 0, 0, None, batch.dims, 0), out_dims=dims)
        losses, varying, common = mapped(own, held, varying, common, batch.leaves, fold(keys, step))
        grads = torch.autograd.grad(losses.sum(), own, allow_unused=True)
    return losses.detach(), grads, varying, common


def _loss_of_one(
    networks: Networks,
    spec: Any,
    names: frozenset[str],
    leaves: list[Tensor],
    held: Params,
    varying: Params,
    common: Params,
    batch: list[Any],
    key: Tensor,
) -> tuple[Tensor, Params, Params]:
    """Loss of one member, and its fixed values with and without an axis of members (those in ``names``)."""
    fixed = merge(varying, common)
    loss, fixed = networks.loss(leaves, held, fixed, spec.unflatten(batch), key)
    if not names:
        return loss, fixed, common
    return (
        loss,
        select(fixed, lambda name, _: name not in names),
        select(fixed, lambda name, _: name in names),
    )


def shared_movers(leaves: Sequence[Tensor], options: Options) -> Movers:
    """One optimizer for all members if that is certain to be the same, else one a member."""
    alone = Mover.of([leaf[0] for leaf in leaves], options)
    if type(alone.optimizer) in _ELEMENTWISE and not isinstance(alone.scheduler, ReduceLROnPlateau):
        together = Mover.of(leaves, options)
        # A factory may look at shapes (no weight decay for vectors, say), which stacking changes.
        if _same_groups(alone, together):
            return Movers([together], True, options.max_grad_norm)
    return Movers.separate(leaves, options)


def _same_groups(a: Mover, b: Mover) -> bool:
    """Whether two optimizers treat the same leaves in the same way."""
    if type(a.optimizer) is not type(b.optimizer):
        return False
    described = [_groups(a), _groups(b)]
    return len(described[0]) == len(described[1]) and all(
        one.keys() == two.keys() and all(_equal(one[k], two[k]) for k in one)
        for one, two in zip(*described, strict=True)
    )


def _groups(mover: Mover) -> list[dict[str, Any]]:
    places = {id(leaf): i for i, leaf in enumerate(mover.leaves)}
    return [
        {**group, "params": [places[id(p)] for p in group["params"]]}
        for group in mover.optimizer.param_groups
    ]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    return a == b


def _stacked_modules(
    modules: Sequence[nn.Module], call: Callable[[nn.Module, Any], Any] | None, quoted: str, way_out: str
) -> tuple[FunctionalModule, Params]:
    for k in range(len(modules)):
        _check_module(k, modules, quoted, way_out)
    split = [make_functional(module, call) for module in modules]
    fn = split[0][0]
    for k, (other, params) in enumerate(split[1:], start=1):
        found = difference(params, split[0][1]) or difference(other.buffers, fn.buffers)
        if found:
            raise ValueError(
                f"`{quoted}` should be given modules of one architecture; in module {k}, {found} (module 0)."
            )
    buffers = stack([other.buffers for other, _ in split])
    varying = {name: Fixed(b) for name, b in buffers.items() if not bool((b == b[0]).all())}
    return fn, {**stack([params for _, params in split]), **varying}


def _check_module(k: int, modules: Sequence[nn.Module], quoted: str, way_out: str) -> None:
    """Refuse a module that is none, is there twice, or is built otherwise than the first."""
    module = modules[k]
    if not isinstance(module, nn.Module):
        raise TypeError(f"`{quoted}` should be given modules, got {type(module).__name__}.")
    for j in range(k):
        if modules[j] is module:
            raise ValueError(f"`{quoted}` should be given different modules; {j} and {k} are one. {way_out}")
    first = {name: _description(part) for name, part in modules[0].named_modules()}
    own = {name: _description(part) for name, part in module.named_modules()}
    for name in (*first, *own):
        if first.get(name) != own.get(name):
            raise ValueError(
                f"`{quoted}` should be given modules of one architecture; {name!r} is "
                f"{own.get(name, 'missing')} in module {k} and {first.get(name, 'missing')} in module 0."
            )


def _description(part: nn.Module) -> str:
    # What torch's layers say of themselves is how they were built; others may say anything.
    is_torch = type(part).__module__.startswith("torch.nn.")
    return type(part).__name__ + (f"({part.extra_repr()})" if is_torch else "")
