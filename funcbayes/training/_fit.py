"""Training of one network."""

from typing import Any

from torch import Tensor

from .._checks import check_model
from .._functional import Model
from .._random import resolve_seed
from .._tree import Params, Where, index, map_leaves
from ..likelihoods import Likelihood
from ._data import Data, open_data
from ._early_stopping import EarlyStopping, Validation
from ._loop import minimize
from ._objective import MapObjective
from ._options import Callback, Interval, MakeOptimizer, MakeScheduler, Options


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
    bootstrap: bool = False,
    adversarial: float | None = None,
    validation: Data | None = None,
    patience: int | None = None,
    compile: bool = False,
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
        bootstrap: Whether to train on a resample of ``N`` of the ``N`` rows with replacement, the same in
            every epoch: see :func:`bootstrap_rows`. Data in tensors only. ``N`` stays what it is.
        adversarial: How far inputs move in adversarial training, as a fraction of the range of each
            entry of a row over the data: 0.01 in Lakshminarayanan et al. (2017), whose algorithm 1 this is,
            with ``x' = x + eps sign(grad_x l)`` (Goodfellow et al. 2015). The loss is then the **sum**
            ``l(theta, x, y) + l(theta, x', y)``, each a mean over rows, with ``x'`` a constant and one
            dropout mask for all passes; BatchNorm's statistics are updated by ``x`` alone. A prior is added
            once, so it weighs half as much. Only inputs of floating point move. A loader is gone through once
            more, for the ranges.
        validation: Held-out rows, ``(x, y)`` or a re-iterable of such batches, always gone through in the
            same order. After every epoch their mean ``-log p(y|f)`` is found in evaluation mode,
            and the result is the epoch at which it is lowest; one that is not finite never is.
        patience: After how many epochs in a row without a lower one training ends; ``None``: never.
        compile: Whether the loss and its gradient are found by a program that ``torch.compile`` makes, one
            for each shape of a batch, at the first step with it. Results change by rounding, which training
            magnifies. What ``fn`` refers to beside its arguments stays as it was at the first step.
        progress: Whether to show a bar over the epochs.
        callback: ``(epoch, loss, params)`` after every epoch, with the mean loss of the epoch as a float and
            a copy of the parameters; training ends when it returns ``True``.

    Returns:
        Trained parameters: new, detached tensors in the structure of ``params``. Buffers that
        training changed (BatchNorm's statistics) are added by name as ``Fixed``.

    Raises:
        TypeError: If an argument is of the wrong kind: a module for ``fn``, an iterator for ``data``.
        ValueError: If an argument is out of range, data are empty, or rows of x and y do not match.
        RuntimeError: If the loss or a parameter is no longer finite, checked after every epoch; or if the
            loss on ``validation`` never is.

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
        compile=compile,
        progress=progress,
        callback=callback and for_one(callback),
        patience=patience,
        has_validation=validation is not None,
    )
    check_model(fn, options.call)
    members = map_leaves(with_member_axis, params)
    source = open_data(data, batch_size=batch_size, num_streams=1, call=options.call, bootstrap=bootstrap)
    seed = int(resolve_seed(seed))
    objective = MapObjective.over(
        fn, likelihood, source, seed, prior_precision, num_data, options.call, adversarial=adversarial
    )
    stopping = None
    if validation is not None:
        held_out = Validation(fn, likelihood, validation, members, call=options.call)
        stopping = EarlyStopping(held_out, patience, 1)
    trained = minimize(objective, members, source, [seed], [seed], options, where=where, watcher=stopping)
    return index(trained if stopping is None else stopping.best(), 0)


def with_member_axis(leaf: Any) -> Any:
    """A leaf of a single network as one of several."""
    return leaf.unsqueeze(0) if isinstance(leaf, Tensor) else leaf


def for_one(callback: Callback) -> Callback:
    """What calls a callback for one network where there could be several."""
    return lambda epoch, losses, members: callback(epoch, losses.item(), index(members, 0))
