"""Fitting with IVON: passes through the data."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .._checks import check_model, positive_int
from .._functional import Model, training_call
from .._random import fold, forked, resolve_seed
from .._tree import (
    Fixed,
    Params,
    Where,
    device_of,
    index,
    map_leaves,
    map_named,
    merge,
    named_leaves,
    select,
    stack,
)
from ..covariances import Diagonal
from ..likelihoods import Likelihood
from ..likelihoods._checks import check_is_likelihood
from ..posteriors import Gaussian
from ..training._data import Data, Source, open_data
from ..training._several import count_members, member_seeds
from ._state import IVONState, check_positive, check_state, init, posterior
from ._update import Rule, check_rows, stepped

_CALL = "ivon.fit"
Callback = Callable[[int, float, IVONState], bool | None]
Rate = float | Callable[[int], float]


def fit(
    fn: Model,
    params: Params,
    data: Data,
    likelihood: Likelihood,
    *,
    learning_rate: Rate,
    num_epochs: int,
    batch_size: int | None = None,
    prior_precision: float = 1.0,
    num_data: int | None = None,
    hess_init: float = 1.0,
    beta1: float = 0.9,
    beta2: float = 0.99999,
    num_samples: int = 1,
    where: Where | None = None,
    start: IVONState | None = None,
    seed: int | None = None,
    clip_radius: float | None = None,
    max_grad_norm: float | None = None,
    ess: float | None = None,
    rescale_lr: bool = True,
    stacked: bool = False,
    progress: bool = False,
    callback: Callback | None = None,
) -> Gaussian:
    """Fit a mean-field Gaussian with IVON, Shen et al. (2024).

    As in :func:`funcbayes.training.fit` dropout is active, with masks that are a function of the seed, and
    BatchNorm uses the statistics of the batch.

    Args:
        fn: Pure model, ``fn(params, x) -> outputs``.
        params: Where the mean starts; not changed.
        data: As in :func:`funcbayes.training.fit`.
        likelihood: ``p(y|f)``.
        learning_rate: ``alpha``: a number, or a function of the number of the step, from 0 on.
        num_epochs: Passes through the data.
        batch_size: Rows a batch for data in tensors; ``None``: one batch of all rows, in order.
        prior_precision: Precision (1 / variance) of a Gaussian prior of mean zero.
        num_data: The number ``N`` of rows, if it is not that of the data.
        hess_init: The Hessian to begin with.
        beta1: Of the moving average of gradients.
        beta2: Of the moving average of Hessians; it should forget in about as many steps as there are.
        num_samples: Draws of each step.
        where: Which leaves are uncertain and moved; ``None`` for all. The others are held as they are.
        start: A state to go on from; then ``hess_init`` and ``where`` are left out. Steps are counted on.
        seed: Of the draws, the shuffling and the dropout masks; ``None`` draws one.
        clip_radius: Bound of each entry of the preconditioned gradient.
        max_grad_norm: Longer gradients are shortened to this norm, each draw's by itself.
        ess: Effective number of data; ``None`` for ``num_data``.
        rescale_lr: Whether the learning rate is multiplied by ``hess_init + delta``.
        stacked: Whether ``params`` are those of several networks, every leaf with a leading axis ``K``.
            Network ``k`` becomes what ``fit(fn, params_k, ...)`` with ``seed=member_seeds(seed, K)[k]`` makes
            of it.
        progress: Whether to show a bar over the epochs.
        callback: ``(epoch, loss, state)`` after every epoch, with the mean loss of the epoch as a float;
            fitting ends when it returns ``True``.

    Returns:
        Gaussian over the covered leaves, in their dtypes. Its mean carries buffers that training changed
        (BatchNorm's statistics) as ``Fixed``. With ``stacked`` every leaf has a leading axis ``K``:
        ``mixture(posterior, stacked=True)`` makes one posterior of it.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range, or data are empty.
        RuntimeError: If the loss is no longer finite.

    Example:
        >>> import torch, funcbayes as fb
        >>> x = torch.linspace(-1, 1, 20)[:, None]
        >>> fn, params = fb.make_functional(torch.nn.Linear(1, 1))
        >>> normal, options = fb.likelihoods.Normal(0.5), {"learning_rate": 0.1, "beta2": 0.99, "seed": 0}
        >>> q = fb.ivon.fit(fn, params, (x, 3 * x), normal, num_epochs=200, **options)
        >>> bool((q.mean["weight"] - 3).abs() < 0.5)
        True
    """
    check_model(fn, _CALL)
    check_is_likelihood(likelihood, f"{_CALL}(likelihood=...)")
    num_epochs = positive_int(num_epochs, f"{_CALL}(num_epochs=...)")
    _rate_at(learning_rate, 0)
    if start is not None:
        check_state(start, f"{_CALL}(start=...)")
        if (hess_init, where) != (1.0, None):
            raise ValueError(
                f"`{_CALL}(start=...)` has a Hessian and leaves: leave out `hess_init` and `where`."
            )
    num = count_members(params, f"{_CALL}(fn, params, ..., stacked=True)") if stacked else 1
    source = open_data(data, batch_size=batch_size, num_streams=1, call=_CALL)
    seed = int(resolve_seed(seed))
    if num_data is not None:
        positive_int(num_data, f"{_CALL}(num_data=...)")
    rule = Rule(
        num_data=max(source.num_data(seed), 1) if num_data is None else num_data,
        prior_precision=prior_precision,
        beta1=beta1,
        beta2=beta2,
        num_samples=num_samples,
        clip_radius=clip_radius,
        max_grad_norm=max_grad_norm,
        ess=ess,
        rescale_lr=rescale_lr,
        call=_CALL,
    )
    found = []
    with _bar(num * num_epochs, shown=progress) as show:
        for k in range(num):
            own = index(params, k) if stacked else params
            state = init(own, hess_init=hess_init, where=where) if start is None else start
            state = index(state, k) if stacked and start is not None else state
            run = _Run(fn, likelihood, rule, learning_rate, member_seeds(seed, num)[k] if stacked else seed)
            found.append(run(own, state, source, num_epochs, callback, show))
    return stack(found) if stacked else found[0]


class _Run:
    """The fit of one network."""

    def __init__(self, fn: Model, likelihood: Likelihood, rule: Rule, learning_rate: Rate, seed: int) -> None:
        self.fn, self.likelihood, self.rule = fn, likelihood, rule
        self.learning_rate, self.seed = learning_rate, seed
        self._buffers: set[str] | None = None  # that training changes; unknown at first

    def __call__(
        self,
        params: Params,
        state: IVONState,
        source: Source,
        num_epochs: int,
        callback: Callback | None,
        show: Callable[[float], None],
    ) -> Gaussian:
        """Go through the data."""
        params = map_leaves(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, params)
        for epoch in range(num_epochs):
            losses, rows = [], []
            for batch in source.epoch([self.seed], epoch, device_of(state.mean)):
                x, y = batch.member(0)
                if self._buffers is None:
                    self._probe(params, state, x, y)
                state, loss, changed = self._step(params, state, x, y)
                params = merge(params, changed) if changed else params
                losses.append(loss)
                rows.append(y.shape[0])
            table = torch.stack(losses).cpu()
            _check(table, epoch)
            mean = float((table * torch.tensor(rows)).sum() / sum(rows))
            show(mean)
            if callback is not None and callback(epoch, mean, state):
                break
        return self._gaussian(params, state)

    def _step(self, params: Params, state: IVONState, x: Any, y: Tensor) -> tuple[IVONState, Tensor, Params]:
        assert self._buffers is not None
        # Buffers that are still inside `fn` have no axis of draws: those draws are evaluated one by one.
        adds_buffers = not self._buffers <= named_leaves(params).keys()
        return stepped(
            *(self.fn, params, state, x, y, self.likelihood, self.rule),
            _rate_at(self.learning_rate, int(state.step)),
            self.seed,
            evaluate=lambda leaves, x, key: training_call(self.fn, leaves, x, key),
            chunk_size=1 if adds_buffers else None,
        )

    def _probe(self, params: Params, state: IVONState, x: Any, y: Tensor) -> None:
        """Look at one evaluation at the mean, to refuse what does not fit before work starts."""
        check_rows(self.rule.num_data, y, _CALL)
        with torch.no_grad(), forked(fold(self.seed, "probe")):
            outputs, changed = training_call(self.fn, params, x, self.seed)
        self.likelihood.check(outputs, y, call=f"{_CALL}(data=...)")
        self._buffers = set(named_leaves(changed))

    def _gaussian(self, params: Params, state: IVONState) -> Gaussian:
        rule = self.rule
        found = posterior(state, num_data=rule.num_data, prior_precision=rule.prior_precision, ess=rule.ess)
        there = named_leaves(params)

        def like(tree: Params) -> Params:
            return map_named(lambda name, leaf: leaf.to(there[name].dtype), tree)

        mean = like(found.mean)
        buffers = select(params, lambda _, leaf: isinstance(leaf, Fixed))
        mean = merge(mean, buffers) if named_leaves(buffers) else mean
        return Gaussian(mean, Diagonal(like(found.variance)))


def _rate_at(learning_rate: Rate, step: int) -> float:
    if not callable(learning_rate):
        check_positive(learning_rate, f"{_CALL}(learning_rate=...)")
        return learning_rate
    rate = learning_rate(step)
    if isinstance(rate, bool) or not isinstance(rate, float | int) or not rate >= 0:
        raise ValueError(
            f"`{_CALL}(learning_rate=...)` should give a number that is not negative, got {rate!r} for step "
            f"{step}."
        )
    return float(rate)


def _check(losses: Tensor, epoch: int) -> None:
    bad = (~losses.isfinite()).nonzero()
    if len(bad):
        step = int(bad[0])
        raise RuntimeError(
            f"The loss in `{_CALL}` is {losses[step].item()} in step {step} of epoch {epoch}. A lower "
            "learning rate, a larger `hess_init`, or `clip_radius=1e-3` usually helps."
        )


@contextmanager
def _bar(total: int, *, shown: bool) -> Iterator[Callable[[float], None]]:
    if not shown:
        yield lambda loss: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=_CALL, unit="epoch") as bar:

        def show(loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
            bar.update()

        yield show
