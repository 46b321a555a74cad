"""One update of IVON."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._checks import check_covers, check_model, positive_int
from .._engine import signature
from .._functional import Model
from .._mapping import map_draws
from .._random import Seed, fold, resolve_seed
from .._tree import (
    Params,
    as_tree,
    index,
    map_leaves,
    map_named,
    merge,
    named_leaves,
    num_rows,
    tensors,
)
from ..likelihoods import Likelihood
from ..likelihoods._checks import check_is_likelihood
from ..training._buffers import averaged, varying
from ._state import IVONState, check_positive, check_state, draws, scales

_CALL = "ivon.update"
# (params, x, key) -> (outputs, buffers that changed)
Evaluate = Callable[[Params, Any, Tensor], tuple[Tensor, Params]]


@dataclass(frozen=True)
class Rule:
    """How a state is moved: the arguments of :func:`update` that stay the same."""

    num_data: int
    prior_precision: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.99999
    num_samples: int = 1
    clip_radius: float | None = None
    max_grad_norm: float | None = None
    ess: float | None = None
    rescale_lr: bool = True
    call: str = _CALL

    def __post_init__(self) -> None:
        scales(self.num_data, self.prior_precision, self.ess, self.call)
        positive_int(self.num_samples, f"{self.call}(num_samples=...)")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, float | int) or not 0 <= value < 1:
                raise ValueError(
                    f"`{self.call}({name}=...)` should be at least 0 and below 1, got {value!r}."
                )
        for name in ("clip_radius", "max_grad_norm"):
            if getattr(self, name) is not None:
                check_positive(getattr(self, name), f"{self.call}({name}=...)")

    def draws(self, state: IVONState, seed: Seed) -> Params:
        """Where gradients are wanted, leaves ``(S, *s)``."""
        numbers = {"num_data": self.num_data, "prior_precision": self.prior_precision, "ess": self.ess}
        return draws(state, self.num_samples, seed, **numbers)

    def moved(self, state: IVONState, at: Params, gradients: Params, learning_rate: float) -> IVONState:
        """The next state, Shen et al. (2024), algorithm 1, lines 3 to 8.

        Args:
            state: The state.
            at: The draws, leaves ``(S, *s)``.
            gradients: Of the **mean** loss of the batch there.
            learning_rate: ``alpha``.
        """
        scale, delta = scales(self.num_data, self.prior_precision, self.ess, self.call)
        rate = learning_rate * ((state.hess_init + delta) if self.rescale_lr else 1.0)
        step = state.step + 1
        debias = 1 - self.beta1 ** step.to(torch.float64)
        places, slopes = named_leaves(at), named_leaves(gradients)
        mean, momentum, hessian = {}, {}, {}
        for name, m in named_leaves(state.mean).items():
            g, h = named_leaves(state.momentum)[name], named_leaves(state.hessian)[name]
            slope = slopes[name].to(m.dtype)
            # E[g (theta - m)] / sigma^2 = E[g'] by Stein's identity, with 1 / sigma^2 = lambda (h + delta).
            curved = (slope * (places[name] - m)).mean(0) * scale * (h + delta)
            momentum[name] = self.beta1 * g + (1 - self.beta1) * slope.mean(0)
            # With a = (1 - beta2) (h - curved) / (h + delta) the new h + delta is the old one times
            # 1 - a + a^2 / 2 = (1 + (1 - a)^2) / 2: positive, whatever the gradients.
            off = (1 - self.beta2) * (h - curved)
            hessian[name] = h - off + 0.5 * off.square() / (h + delta)
            direction = (momentum[name] / debias.to(m.dtype) + delta * m) / (hessian[name] + delta)
            if self.clip_radius is not None:
                direction = direction.clamp(-self.clip_radius, self.clip_radius)
            mean[name] = m - rate * direction

        def tree(new: dict[str, Tensor]) -> Params:
            return map_named(lambda name, _: new[name], state.mean)

        return IVONState(tree(mean), tree(momentum), tree(hessian), step, state.hess_init)


def update(
    fn: Model,
    params: Params,
    state: IVONState,
    batch: tuple[Any, Tensor],
    likelihood: Likelihood,
    *,
    learning_rate: float,
    num_data: int,
    prior_precision: float = 1.0,
    beta1: float = 0.9,
    beta2: float = 0.99999,
    num_samples: int = 1,
    seed: Seed | None = None,
    clip_radius: float | None = None,
    ess: float | None = None,
    rescale_lr: bool = True,
) -> tuple[IVONState, Tensor]:
    """Move a state by one step: Shen et al. (2024), "Variational learning is effective for large networks".

    A pure function: nothing is perturbed on the way, so an exception leaves nothing behind. Noise is a
    function of the seed and of the number of the step, so that a run that goes on from a saved state is the
    same run.

    Args:
        fn: Pure model, evaluated as it is: without dropout, with the running statistics of BatchNorm.
        params: What the state does not cover; ``None`` if it covers everything.
        state: See :func:`init`.
        batch: ``(x, y)``, ``B`` rows.
        likelihood: ``p(y|f)``; the loss is the **mean** of ``-log p(y|f)`` over the rows.
        learning_rate: ``alpha``; the paper's for networks trained from scratch is 0.1 to 0.2 with
            ``rescale_lr``.
        num_data: Number of rows ``N`` of the whole data.
        prior_precision: Precision (1 / variance) of a Gaussian prior of mean zero; the paper's weight decay
            is ``delta = prior_precision / ess``.
        beta1: Of the moving average of gradients.
        beta2: Of the moving average of Hessians.
        num_samples: Draws ``S``, all in vectorised passes.
        seed: Draws are a function of it; ``None`` takes one number from torch's global state.
        clip_radius: Bound of each entry of the preconditioned gradient; ``None`` for none.
        ess: Effective number of data ``lambda``; less than ``num_data`` for a warmer posterior. ``None`` for
            ``num_data``.
        rescale_lr: Whether the learning rate is multiplied by ``hess_init + delta``, so that first steps do
            not depend on ``hess_init``.

    Returns:
        The next state, and the mean loss over rows and draws, a scalar.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range, or leaves do not fit.

    Example:
        >>> import torch, funcbayes as fb
        >>> x = torch.linspace(-1, 1, 20)[:, None]
        >>> fn, params = fb.make_functional(torch.nn.Linear(1, 1))
        >>> state, normal = fb.ivon.init(params), fb.likelihoods.Normal(0.5)
        >>> for step in range(200):
        ...     state, loss = fb.ivon.update(
        ...         *(fn, None, state, (x, 3 * x), normal), learning_rate=0.1, num_data=20, beta2=0.99, seed=0
        ...     )
        >>> q = fb.ivon.posterior(state, num_data=20)
        >>> bool((q.mean["weight"] - 3).abs() < 0.5)
        True
    """
    check_model(fn, _CALL)
    check_state(state, f"{_CALL}(fn, params, state, ...)")
    check_is_likelihood(likelihood, f"{_CALL}(likelihood=...)")
    check_positive(learning_rate, f"{_CALL}(learning_rate=...)")
    rule = Rule(
        num_data=num_data,
        prior_precision=prior_precision,
        beta1=beta1,
        beta2=beta2,
        num_samples=num_samples,
        clip_radius=clip_radius,
        ess=ess,
        rescale_lr=rescale_lr,
    )
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not isinstance(batch[1], Tensor):
        raise TypeError(f"`{_CALL}(batch=...)` should be `(x, y)` with tensors, got {type(batch).__name__}.")
    check_rows(num_data, batch[1], _CALL)
    check_covers(state.mean, params, f"{_CALL}(fn, params, state, ...)")
    x, y = as_tree(batch[0]), batch[1]
    new, loss, _ = stepped(
        *(fn, params, state, x, y, likelihood, rule, learning_rate, resolve_seed(seed)),
        evaluate=lambda leaves, x, key: (fn(leaves, x), {}),
    )
    return new, loss


def stepped(
    fn: Model,
    params: Params,
    state: IVONState,
    x: Any,
    y: Tensor,
    likelihood: Likelihood,
    rule: Rule,
    learning_rate: float,
    seed: Seed,
    *,
    evaluate: Evaluate,
    chunk_size: int | None = None,
) -> tuple[IVONState, Tensor, Params]:
    """The next state, the mean loss, and the buffers that evaluating the model changed."""
    at = rule.draws(state, seed)
    given = _in_dtypes_of(at, params, state)
    with torch.inference_mode(False), torch.enable_grad():
        leaves = map_leaves(lambda leaf: leaf.detach().requires_grad_(), given)
        buffers = varying(params)
        keys = fold(fold(fold(seed, state.step), "model"), torch.arange(rule.num_samples))

        def one(entry: Any) -> tuple[Tensor, Params]:
            own, fixed, key = entry
            outputs, changed = evaluate(merge(params, merge(own, fixed)), x, key)
            return -likelihood.log_prob(outputs, y).mean(), changed

        def entries(part: slice) -> Any:
            size = len(range(rule.num_samples)[part])
            repeated = map_leaves(lambda leaf: leaf.expand(size, *leaf.shape), buffers)
            return index(leaves, part), repeated, keys[part]

        losses, changed = map_draws(
            *(one, entries, rule.num_samples),
            owner=fn,
            num_rows=num_rows(x) or 1,
            key=("ivon", signature(state), signature(x)),
            call=rule.call,
            chunk_size=chunk_size,
        )
        found = torch.autograd.grad(losses.sum(), tensors(leaves), allow_unused=True, materialize_grads=True)
    names = named_leaves(leaves)
    slopes = dict(zip(names, found, strict=True))
    if rule.max_grad_norm is not None:
        slopes = _shortened(slopes, rule.max_grad_norm)
    with torch.no_grad():
        gradients = map_named(lambda name, _: slopes[name], leaves)
        return (
            rule.moved(state, at, gradients, learning_rate),
            losses.detach().mean(),
            averaged(map_leaves(torch.detach, changed)),
        )


def check_rows(num_data: int, y: Tensor, call: str) -> None:
    """Refuse a number of data that is less than the rows of a batch."""
    rows = y.shape[0] if y.ndim else 0
    if num_data < rows:
        raise ValueError(
            f"`{call}(num_data=...)` should be the number of rows of the whole data, at least the {rows} of "
            f"this batch, got {num_data}."
        )


def _in_dtypes_of(at: Params, params: Params, state: IVONState) -> Params:
    """Draws in the dtypes of the model's parameters, where these are known."""
    there = {} if params is None else named_leaves(params)
    return map_named(lambda name, leaf: leaf.to(there[name].dtype) if name in there else leaf, at)


def _shortened(slopes: dict[str, Tensor], longest: float) -> dict[str, Tensor]:
    """Gradients of each draw, scaled to a norm of at most ``longest``."""
    squares = [g.reshape(len(g), -1).square().sum(1) for g in slopes.values()]
    factor = (longest / (torch.stack(squares).sum(0).sqrt() + 1e-6)).clamp(max=1.0)
    return {name: g * factor.reshape(-1, *(1 for _ in g.shape[1:])) for name, g in slopes.items()}
