"""The negative ELBO and its estimators."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.func import vmap

from .._checks import check_covers, check_model, check_num_data, positive_int
from .._compiled import with_gradient
from .._engine import signature
from .._functional import Model
from .._functorch import is_inside_transform
from .._layer_noise import FlippedNoise, LayerNoise, LocalNoise, leaves_of_layers, names_by_identity
from .._mapping import map_draws
from .._random import Seed, fold, keys_by_name, resolve_seed
from .._tree import (
    Params,
    as_tree,
    index,
    map_leaves,
    merge,
    named_leaves,
    num_rows,
    select,
)
from ..covariances._flat import at_least_single, dtype_of
from ..likelihoods import Likelihood
from ..likelihoods._checks import check_is_likelihood
from ..likelihoods._layout import wide
from ..priors._given import HasLogProb, checked_prior
from ..training._buffers import averaged, varying
from ._mean_field import Independent, MeanFieldState
from ._prior import expected_log_prior, log_prior
from ._scale import Scale
from ._schedules import checked_weight
from ._state import VariationalState, check_state

Estimator = Literal["reparam", "stl", "flipout", "local"]
_CALL = "vi.negative_elbo"
# (params, x, key) -> (outputs, buffers that changed)
Evaluate = Callable[[Params, Any, Tensor], tuple[Tensor, Params]]


@dataclass(frozen=True)
class Terms:
    """The two terms of a negative ELBO.

    Attributes:
        nll: ``E_q[-log p(y|f)]``, mean over the rows of the batch, a scalar.
        kl: ``KL(q || prior)``, summed over parameters, a scalar.
        changed: Buffers that evaluating the model changed, averaged over draws.
    """

    nll: Tensor
    kl: Tensor
    changed: Params


def negative_elbo(
    fn: Model,
    params: Params,
    state: VariationalState,
    batch: tuple[Any, Tensor],
    likelihood: Likelihood,
    *,
    prior: HasLogProb | None = None,
    prior_precision: Any = 1.0,
    num_data: int,
    num_samples: int = 1,
    seed: Seed | None = None,
    estimator: Estimator = "reparam",
    kl_weight: float | Tensor = 1.0,
    chunk_size: int | None = None,
    compile: bool = False,
) -> Tensor:
    """Estimate the negative ELBO, ``num_data * mean_batch(E_q[-log p(y|f)]) + kl_weight * KL(q || prior)``.

    Both terms are of the whole data: the first is **summed** over ``num_data`` rows, of which the batch
    stands for all, and the KL is **summed** over parameters. It is differentiable in the tensors of
    ``state``, of ``prior`` and of ``likelihood``; all draws are evaluated in vectorised passes. The KL is
    found in closed form where there is one (Gaussian and Laplace priors), else from the draws.

    Args:
        fn: Pure model, evaluated as it is: without dropout, and with the running statistics of BatchNorm.
        params: What the state does not cover; ``None`` if it covers everything.
        state: ``q``: see :func:`init`.
        batch: ``(x, y)``, ``B`` rows.
        likelihood: ``p(y|f)``.
        prior: One of :mod:`funcbayes.priors`, or a Gaussian of any structure over the covered leaves;
            ``None`` for mean zero and ``prior_precision``.
        prior_precision: Precision (1 / variance): one number, or a tree with one for each leaf.
        num_data: Number of rows ``N`` of the whole data.
        num_samples: Draws ``S``.
        seed: Draws are a function of it; ``None`` takes one number from torch's global state.
        estimator: Of the gradient; all have the same value in expectation.

            * ``"reparam"``: weights are drawn, Kingma & Welling (2014), Blundell et al. (2015).
            * ``"stl"``: likewise, without the score of ``q`` ("sticking the landing", Roeder et al. 2017,
              eq. 8): no variance where ``q`` is the posterior. The KL is found from the draws.
            * ``"flipout"``: a draw has other signs in each row, Wen et al. (2018); ``"diag"`` only.
            * ``"local"``: pre-activations of linear and convolution layers are drawn instead of weights,
              Kingma, Salimans & Welling (2015); ``"diag"`` only. Where a layer is applied at several
              positions of a row (convolutions, tokens) each has noise of its own, as in Molchanov et al.
              (2017), section 4.4: their correlations within a row are left out, so that it is another ``q``
              wherever later layers mix positions.

            The last two are for leaves that are the weight or bias of one such layer, called once; others are
            drawn. Activation checkpointing, which calls layers again later, is for the first two.
        kl_weight: Factor of the KL; 1 for the ELBO.
        chunk_size: Draws of one pass; ``None`` to choose by the size of intermediates.
        compile: Whether the value and its gradient are found by one program that ``torch.compile`` makes, for
            all calls with tensors of these shapes and these settings: see :func:`funcbayes.training.fit`.
            The result can be differentiated once.

    Returns:
        A scalar.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If ``num_data`` is below the number of rows of the batch, ``estimator`` is none of these
            or not for the family, or leaves do not fit.

    Example:
        >>> import torch, funcbayes as fb
        >>> fn, params = fb.make_functional(torch.nn.Linear(3, 1))
        >>> state = fb.vi.init(params)
        >>> batch = torch.ones(4, 3), torch.zeros(4, 1)
        >>> normal = fb.likelihoods.Normal(1.0)
        >>> loss = fb.vi.negative_elbo(fn, None, state, batch, normal, num_data=100, seed=0)
        >>> loss.shape
        torch.Size([])
    """
    check_model(fn, _CALL)
    check_state(state, f"{_CALL}(fn, params, state, ...)")
    check_covers(state.mean, params, f"{_CALL}(fn, params, state, ...)")
    check_is_likelihood(likelihood, f"{_CALL}(likelihood=...)")
    check_estimator(estimator, state, f"{_CALL}(estimator=...)")
    num_samples = positive_int(num_samples, f"{_CALL}(num_samples=...)")
    if chunk_size is not None:
        chunk_size = positive_int(chunk_size, f"{_CALL}(chunk_size=...)")
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not isinstance(batch[1], Tensor):
        raise TypeError(f"`{_CALL}(batch=...)` should be `(x, y)` with tensors, got {type(batch).__name__}.")
    check_num_data(num_data, batch[1].shape[0] if batch[1].ndim else 0, _CALL)
    if not isinstance(kl_weight, Tensor):
        kl_weight = checked_weight(kl_weight, f"{_CALL}(kl_weight=...)")
    prior = checked_prior(prior, prior_precision, state.mean, _CALL)
    given = (state, params, as_tree(batch[0]), batch[1], likelihood, prior, resolve_seed(seed), kl_weight)

    def evaluate(given: Any) -> Tensor:
        state, params, x, y, likelihood, prior, seed, kl_weight = given
        found = terms(
            *(fn, params, state, x, y, likelihood),
            prior=prior,
            num_samples=num_samples,
            seed=seed,
            estimator=estimator,
            evaluate=lambda leaves, x, key: (fn(leaves, x), {}),
            call=_CALL,
            chunk_size=chunk_size,
        )
        return num_data * found.nll + kl_weight * found.kl

    if not compile:
        return evaluate(given)
    if is_inside_transform():
        raise ValueError(
            f"`{_CALL}(compile=True)` is evaluated outside of transforms of `torch.func`. Take gradients by "
            "`torch.autograd.grad`, or leave `compile` out."
        )
    *others, seed, kl_weight = given
    if not isinstance(kl_weight, Tensor):  # a number would be a part of the program
        kl_weight = torch.tensor(kl_weight, dtype=at_least_single(dtype_of(state.mean)))
    settings = ("elbo", num_data, num_samples, estimator, chunk_size)
    return with_gradient(fn, settings, evaluate, (*others, torch.as_tensor(seed), kl_weight))


def check_estimator(estimator: Any, state: VariationalState, call: str) -> None:
    """Refuse an estimator that is unknown, or not for the family."""
    if estimator not in get_args(Estimator):
        known = ", ".join(map(repr, get_args(Estimator)))
        raise ValueError(f"`{call}` should be one of {known}, got {estimator!r}.")
    if estimator in ("local", "flipout") and not isinstance(state, MeanFieldState):
        raise ValueError(
            f"`{call}` should be 'reparam' or 'stl' for a family with correlations, got {estimator!r}, which "
            "needs independent parameters. Write `family='diag'`."
        )


def terms(
    fn: Model,
    params: Params,
    state: VariationalState,
    x: Any,
    y: Tensor,
    likelihood: Likelihood,
    *,
    prior: HasLogProb,
    num_samples: int,
    seed: Seed,
    estimator: Estimator,
    evaluate: Evaluate,
    call: str,
    chunk_size: int | None = None,
) -> Terms:
    """Find the terms of the negative ELBO; arguments were checked."""
    scale = state.scale()
    expected = None if estimator == "stl" else expected_log_prior(scale, prior)
    sampler = _Sampler.of(fn, params, scale, x, seed, estimator)
    constant = state.detached().scale() if estimator == "stl" else None
    misused: set[str] = set()

    def one(entry: Any) -> dict[str, Any]:
        leaves, deviations, buffers, (key, keys) = entry
        given = merge(merge(params, sampler.seen), merge(leaves, buffers))
        noise = sampler.noise(given, deviations, keys)
        with noise or nullcontext():
            outputs, changed = evaluate(given, x, key)
        if noise is not None:
            misused.update(noise.misused())
        found = {"log_lik": wide(likelihood.log_prob(outputs, y)).mean(), "changed": changed}
        if expected is None and not sampler.layers:
            found["log_prior"] = log_prior(prior, leaves)
        if constant is not None:
            found["log_q"] = constant.log_prob(leaves)
        return found

    buffers = varying(params)

    def entries(part: slice) -> Any:
        indices = torch.arange(num_samples)[part]
        repeated = map_leaves(lambda leaf: leaf.expand(len(indices), *leaf.shape), buffers)
        return *sampler.draws(indices), repeated, sampler.keys(indices)

    shapes = ("vi", type(state), estimator, signature(state), signature(x), torch.is_grad_enabled())
    while True:
        found = map_draws(
            *(one, entries, num_samples),
            owner=fn,
            num_rows=num_rows(x) or 1,
            key=(*shapes, sampler.layers),
            call=call,
            chunk_size=chunk_size,
            has_rules=not sampler.draws_nothing,
        )
        if not misused:
            break
        # These layers did not run as with a row or two in evaluation mode. It is found out anew every time,
        # so that a result depends on nothing that was evaluated before.
        sampler = sampler.without(misused)
        misused.clear()
    if expected is not None:
        kl = -scale.entropy() - expected
    else:
        log_priors = found.get("log_prior")
        if log_priors is None:  # weights were not drawn
            draws = scale.draws(torch.arange(num_samples), fold(seed, "prior"))
            log_priors = vmap(lambda leaves: log_prior(prior, leaves))(draws)
        log_q = found["log_q"].mean() if estimator == "stl" else -scale.entropy()
        kl = log_q - log_priors.mean()
    return Terms(-found["log_lik"].mean(), kl, index(averaged(found["changed"], 1), 0))


@dataclass(frozen=True)
class _Sampler:
    """What is drawn, and how the model gets the rest of its noise.

    Attributes:
        scale: Of the Gaussian.
        seed: Of the draws.
        layers: Leaves whose noise layers add by themselves.
        seen: What the model is given for these: their means; ``None`` without any.
        is_local: Whether it is the noise of pre-activations.
    """

    scale: Scale
    seed: Seed
    layers: frozenset[str] = frozenset()
    seen: Params = None
    is_local: bool = False

    @classmethod
    def of(
        cls, fn: Model, params: Params, scale: Scale, x: Any, seed: Seed, estimator: Estimator
    ) -> "_Sampler":
        if estimator not in ("local", "flipout"):
            return cls(scale, seed)
        names = list(named_leaves(scale.mean))
        whole = merge(params, scale.mean)
        layers = leaves_of_layers(fn, whole, names, x, rows_first=estimator == "flipout")
        return cls(scale, seed, is_local=estimator == "local")._with(frozenset(layers))

    def without(self, names: set[str]) -> "_Sampler":
        """The same, but that these leaves are drawn."""
        return self._with(self.layers - names)

    def _with(self, layers: frozenset[str]) -> "_Sampler":
        seen = select(self.scale.mean, lambda name, _: name in layers) if layers else None
        return replace(self, layers=layers, seen=seen)

    @property
    def draws_nothing(self) -> bool:
        """Whether all noise is that of pre-activations."""
        return self.is_local and len(self.layers) == len(named_leaves(self.scale.mean))

    def draws(self, indices: Tensor) -> tuple[Params, dict[str, Tensor]]:
        """Leaves that are drawn, and deviations that layers use, ``(S, *s)`` each."""
        if not isinstance(self.scale, Independent) or not self.layers:
            return self.scale.draws(indices, self.seed), {}
        others = frozenset(named_leaves(self.scale.mean)) - self.layers
        leaves = self.scale.drawn(indices, self.seed, others) if others else {}
        return leaves, {} if self.is_local else self.scale.deviations(indices, self.seed, self.layers)

    def keys(self, indices: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Keys of the draws, ``(S,)``, and of the noise of each layer's leaves."""
        keys = fold(self.seed, indices)
        return keys, keys_by_name(fold(keys, "layers"), sorted(self.layers))

    def noise(
        self, given: Params, deviations: dict[str, Tensor], keys: dict[str, Tensor]
    ) -> LayerNoise | None:
        """What adds the noise of layers while the model runs; ``None`` if it gets none so."""
        if not self.layers:
            return None
        names = names_by_identity(given, self.layers)
        if not self.is_local:
            return FlippedNoise(names, deviations, keys)
        variance = named_leaves(self.scale.variance())
        return LocalNoise(names, {name: variance[name] for name in self.layers}, keys)
