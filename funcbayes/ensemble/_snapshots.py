"""Snapshot ensembles: several members from one run whose learning rate is restarted again and again.

Huang et al. (2017), "Snapshot ensembles: train 1, get M for free", https://arxiv.org/abs/1704.00109.
"""

import math
from collections import deque
from collections.abc import Callable

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .._checks import check_model, positive_int
from .._functional import Model
from .._random import resolve_seed
from .._tree import Params, Where, concatenate, map_leaves
from ..likelihoods import Likelihood
from ..posteriors import Ensemble
from ..training._data import Data, open_data
from ..training._fit import for_one, with_member_axis
from ..training._loop import minimize
from ..training._objective import MapObjective
from ..training._options import Callback, MakeOptimizer, Options

_CALL = "ensemble.fit_snapshots"


def fit_snapshots(
    fn: Model,
    params: Params,
    data: Data,
    likelihood: Likelihood,
    *,
    optimizer: MakeOptimizer,
    num_cycles: int,
    epochs_per_cycle: int,
    num_members: int | None = None,
    batch_size: int | None = None,
    prior_precision: float = 0.0,
    num_data: int | None = None,
    where: Where | None = None,
    seed: int | None = None,
    max_grad_norm: float | None = None,
    adversarial: float | None = None,
    progress: bool = False,
    callback: Callback | None = None,
) -> Ensemble:
    """Train one network in cycles and keep it at the end of each.

    In step ``t = 1, 2, ...`` the learning rate is that of the optimizer times
    ``(cos(pi mod(t - 1, n) / n) + 1) / 2``, with ``n`` steps a cycle (Huang et al. 2017, equation 2): from
    the full rate it falls towards 0, where the network settles, and jumps back to leave that mode. The
    optimizer itself goes on: momentum is kept over restarts. The loss is that of
    :func:`funcbayes.training.fit`.

    Args:
        fn: Pure model, ``fn(params, x) -> outputs``.
        params: Where training starts, not changed.
        data: As in :func:`funcbayes.training.fit`. A loader has to give the same number of batches in every
            epoch; one that does not know its length is gone through once more, to count them.
        likelihood: ``p(y|f)``.
        optimizer: ``leaves -> torch.optim.Optimizer``, with the highest learning rate; that of every group
            is scaled.
        num_cycles: How often the learning rate falls, ``M``.
        epochs_per_cycle: Passes through the data in one cycle.
        num_members: Keep the last so many members only (the paper's ``m``); ``None`` for all ``M``.
        batch_size: Rows a batch for data in tensors; ``None``: one batch of all rows, in order.
        prior_precision: Precision (1 / variance) of a Gaussian prior of mean zero on every parameter.
        num_data: The number ``N`` of rows, if it is not that of the data.
        where: Which leaves to train; ``None`` for all. The others are held.
        seed: Of the shuffling and of the dropout masks; ``None`` draws one.
        max_grad_norm: Longer gradients are shortened to this norm.
        adversarial: As in :func:`funcbayes.training.fit`.
        progress: Whether to show a bar over the epochs.
        callback: As in :func:`funcbayes.training.fit`; a cycle that it ends early gives no member.

    Returns:
        One member for each cycle, the oldest first, with equal weights: leaves ``(M, *s)``, new, detached
        tensors, with BatchNorm statistics of their own.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range, or data are empty.
        RuntimeError: If the loss or a parameter is no longer finite; if the number of batches differs between
            epochs; or if the callback ends training before the first cycle does.

    Example:
        >>> import functools, torch, funcbayes as fb
        >>> x = torch.linspace(-1, 1, 20)[:, None]
        >>> fn, params = fb.make_functional(torch.nn.Linear(1, 1))
        >>> sgd = functools.partial(torch.optim.SGD, lr=0.5)
        >>> normal = fb.likelihoods.Normal(1.0)
        >>> ensemble = fb.ensemble.fit_snapshots(
        ...     fn, params, (x, 3 * x), normal, optimizer=sgd, num_cycles=3, epochs_per_cycle=2, batch_size=5
        ... )
        >>> ensemble.members["weight"].shape
        torch.Size([3, 1, 1])
    """
    num_cycles = positive_int(num_cycles, f"{_CALL}(num_cycles=...)")
    epochs_per_cycle = positive_int(epochs_per_cycle, f"{_CALL}(epochs_per_cycle=...)")
    if num_members is not None:
        num_members = positive_int(num_members, f"{_CALL}(num_members=...)")
        if num_members > num_cycles:
            raise ValueError(
                f"`{_CALL}(num_members=...)` should be at most the number of cycles, {num_cycles}, got "
                f"{num_members}."
            )
    check_model(fn, _CALL)
    source = open_data(data, batch_size=batch_size, num_streams=1, call=_CALL)
    seed = int(resolve_seed(seed))
    steps = source.num_batches(seed)
    options = Options(
        call=_CALL,
        optimizer=optimizer,
        num_epochs=num_cycles * epochs_per_cycle,
        scheduler=_Cosine(max(1, steps) * epochs_per_cycle),  # without batches the loop refuses
        scheduler_interval="step",
        max_grad_norm=max_grad_norm,
        progress=progress,
        callback=callback and for_one(callback),
    )
    objective = MapObjective.over(
        fn, likelihood, source, seed, prior_precision, num_data, _CALL, adversarial=adversarial
    )
    snapshots = _Snapshots(steps, epochs_per_cycle, num_members)
    members = map_leaves(with_member_axis, params)
    minimize(objective, members, source, [seed], [seed], options, where=where, watcher=snapshots)
    if not snapshots.kept:
        raise RuntimeError(
            f"`{_CALL}(callback=...)` should let the first cycle come to its end, after {epochs_per_cycle} "
            "epochs: there is no member before that."
        )
    return Ensemble(concatenate([*snapshots.kept]))


class _Cosine:
    """Makes the scheduler of equation 2."""

    def __init__(self, steps_per_cycle: int) -> None:
        self.steps_per_cycle = steps_per_cycle

    def __call__(self, optimizer: Optimizer) -> LambdaLR:
        return LambdaLR(optimizer, self.factor)

    def factor(self, steps_taken: int) -> float:
        """What the learning rate is multiplied by: ``steps_taken`` is ``t - 1``."""
        n = self.steps_per_cycle
        return (math.cos(math.pi * (steps_taken % n) / n) + 1) / 2


class _Snapshots:
    """A watcher that copies the network at the end of each cycle."""

    def __init__(self, steps_per_epoch: int, epochs_per_cycle: int, num_members: int | None) -> None:
        self.steps_per_epoch, self.epochs_per_cycle = steps_per_epoch, epochs_per_cycle
        self.kept: deque[Params] = deque(maxlen=num_members)
        self._steps = self._epochs = 0

    def after_step(self, members: Callable[[], Params]) -> None:
        """Count."""
        self._steps += 1

    def after_epoch(self, members: Callable[[], Params]) -> bool:
        """Copy the network if a cycle has come to its end."""
        if self._steps != self.steps_per_epoch:
            raise RuntimeError(
                f"`{_CALL}(data=...)` should give the same number of batches in every epoch, for the "
                f"learning rate to fall over whole cycles; expected {self.steps_per_epoch}, got "
                f"{self._steps} in epoch {self._epochs}."
            )
        self._steps = 0
        self._epochs += 1
        if self._epochs % self.epochs_per_cycle == 0:
            self.kept.append(map_leaves(torch.clone, members()))
        return False
