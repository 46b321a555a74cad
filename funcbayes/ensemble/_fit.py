"""Training of all members at once."""

import functools

from .._checks import check_model, positive_int
from .._functional import Model
from .._random import resolve_seed
from .._tree import Params, Where, concatenate
from ..likelihoods import Likelihood
from ..posteriors import Ensemble
from ..training._data import Data, open_data
from ..training._early_stopping import EarlyStopping, Validation
from ..training._objective import MapObjective
from ..training._options import Callback, Interval, MakeOptimizer, MakeScheduler, Options
from ..training._several import count_members, member_seeds, minimize_several


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
    bootstrap: bool = False,
    adversarial: float | None = None,
    validation: Data | None = None,
    patience: int | None = None,
    compile: bool = False,
    progress: bool = False,
    callback: Callback | None = None,
) -> Ensemble:
    """Train the members of an ensemble, at once where that is faster.

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
        chunk_size: How many members are evaluated at a time. ``None`` to choose by the sizes of the model's
            parameters and intermediates. Members evaluated one at a time are trained one after another,
            unless there is a callback or batches are shared: then a step of each follows one of the others.
        share_batches: Whether all members see the same batches, shuffled by ``seed``: ``K`` times less
            loading, and members that differ in their start and dropout only.
        bootstrap: Whether each member trains on a bootstrap resample of its own (Breiman 1996), that of
            :func:`funcbayes.training.bootstrap_rows` with its seed. Lakshminarayanan et al. (2017), section
            2.4, found all rows better for networks, whose starts and shuffling differ anyway.
        adversarial: Adversarial training, as in :func:`funcbayes.training.fit`; the paper's is 0.01.
        validation: Held-out rows, as in :func:`funcbayes.training.fit`: each member ends at its own best
            epoch. All members are evaluated in one vectorised pass where that goes.
        patience: After how many epochs in a row that do not improve on ``validation`` a member is done:
            its best epoch so far is kept, as if it were alone. Training ends when all are.
        compile: As for :func:`funcbayes.training.fit`.
        progress: Whether to show a bar over the epochs.
        callback: ``(epoch, losses, members)`` after every epoch, with the mean loss of each member ``(K,)``;
            training ends when it returns ``True``.

    Returns:
        The trained members, with equal weights: new, detached tensors.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range, data are empty, or leaves disagree on ``K``.
        RuntimeError: If a loss or a parameter is no longer finite, checked after every epoch; or if a
            member's loss on ``validation`` never is.

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
        compile=compile,
        progress=progress,
        callback=callback,
        patience=patience,
        has_validation=validation is not None,
    )
    check_model(fn, options.call)
    num_members = count_members(members, f"{options.call}(fn, members, ...)")
    if chunk_size is not None:
        chunk_size = positive_int(chunk_size, "ensemble.fit(chunk_size=...)")
    if bootstrap and share_batches:
        raise ValueError(
            "`ensemble.fit(bootstrap=True)` gives each member rows of its own, which `share_batches=True` "
            "forbids. Leave one of them out."
        )
    source = open_data(
        data,
        batch_size=batch_size,
        num_streams=1 if share_batches else num_members,
        call=options.call,
        bootstrap=bootstrap,
    )
    seed = int(resolve_seed(seed))
    seeds = member_seeds(seed, num_members)
    objective = MapObjective.over(
        fn, likelihood, source, seed, prior_precision, num_data, options.call, adversarial=adversarial
    )
    watchers: list[EarlyStopping] = []
    make_watcher = None
    if validation is not None:
        held_out = Validation(fn, likelihood, validation, members, call=options.call, chunk_size=chunk_size)
        make_watcher = functools.partial(_watcher, held_out, patience, watchers)
    trained = minimize_several(
        objective,
        members,
        source,
        seeds,
        (seed,) if share_batches else seeds,
        options,
        where=where,
        chunk_size=chunk_size,
        in_step=share_batches or callback is not None,
        watch=make_watcher,
    )
    if watchers:
        trained = concatenate([stopping.best() for stopping in watchers])
    return Ensemble(trained)


def _watcher(
    held_out: Validation, patience: int | None, made: list[EarlyStopping], members: slice
) -> EarlyStopping:
    """One for some of the members, in the order in which they are trained."""
    made.append(EarlyStopping(held_out, patience, members.stop - members.start, members.start))
    return made[-1]
