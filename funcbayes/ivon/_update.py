"""One update of IVON: draws, gradients at them, and a step."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .._checks import check_covers, check_model, check_num_data, positive_int
from .._compiled import compiled, refuse_random_numbers
from .._functional import Model
from .._functorch import map_first_axis
from .._global_random import forked
from .._random import Seed, fold, resolve_seed
from .._tree import Params, as_tree, device_of, index, map_leaves, merge, named_leaves, stack
from ..covariances._flat import at_least_single
from ..likelihoods import Likelihood
from ..likelihoods._checks import check_is_likelihood
from ..training._batch import Batch, RaggedBatch, flat, ready
from ..training._buffers import averaged
from ._checks import positive_or_none
from ._evaluate import Found, Traits, evaluated, split, traits_of
from ._state import IVONState, check_state, in_dtypes_of_the_model
from ._step import Rule, Scale, drawn, key_of_step, moved

_CALL = "ivon.update"


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
    seed: Seed,
    clip_radius: float | None = None,
    max_grad_norm: float | None = None,
    ess: float | None = None,
    rescale_lr: bool = True,
    chunk_size: int | None = None,
    compile: bool = False,
) -> tuple[IVONState, Tensor]:
    """Move a state by one batch: see :mod:`funcbayes.ivon`.

    A pure function: the network is evaluated at other values of its parameters and is never given them, so
    that nothing is left perturbed, whatever happens. Noise is a function of ``seed`` and of how many updates
    there were, which the state knows: a run that goes on from a saved state is the same run.

    As in :func:`fit`, which is a loop of this, dropout is active and BatchNorm uses the statistics of the
    batch; the running ones, averaged over the draws, are in the new state.

    Args:
        fn: Pure model, ``fn(params, x) -> outputs``. One that ``vmap`` cannot take is evaluated draw by draw,
            with a warning.
        params: What the state does not cover, held as it is; a whole tree is fine, and ``None`` if the state
            covers everything. Buffers are taken from the state.
        state: See :func:`init`.
        batch: ``(x, y)``, ``B`` rows.
        likelihood: ``p(y|f)``; the loss is the **mean** over rows of ``-log p(y|f)``.
        learning_rate: ``alpha``. With ``rescale_lr`` that of SGD with momentum is a good start.
        num_data: Number of rows ``N`` of the whole data.
        prior_precision: Precision (1 / variance) of a Gaussian prior of mean zero on every covered parameter;
            the paper's weight decay is ``delta = prior_precision / N``.
        beta1: How much of the momentum stays.
        beta2: How much of the Hessian stays: it is an average over some ``1 / (1 - beta2)`` steps, and one
            that is longer than the run remembers ``hess_init``.
        num_samples: Draws ``S``, all in vectorised passes.
        seed: Of the draws and of the dropout masks: the same in all updates of a run.
        clip_radius: Bound of each entry of the step, before the learning rate; ``None`` for none.
        max_grad_norm: Longer gradients are shortened to this norm, each draw's by itself.
        ess: ``lambda``, the effective number of rows: more of them for a colder posterior, as of temperature
            ``N / lambda``; ``None`` for ``num_data``.
        rescale_lr: Whether the learning rate is multiplied by ``hess_init + delta``, as the authors
            recommend, so that the first steps are those of SGD whatever ``hess_init`` is.
        chunk_size: Draws of one pass; ``None`` to choose by the size of intermediates.
        compile: Whether losses and gradients at the draws are found by a program that ``torch.compile``
            makes, for all calls with tensors of these shapes: see :func:`funcbayes.training.fit`.

    Returns:
        The next state, all new tensors but for buffers that no update changes, and the mean loss over rows
        and draws, a scalar.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range, ``num_data`` is below the rows of the batch, or leaves do
            not fit.

    Example:
        >>> import torch, funcbayes as fb
        >>> x = torch.linspace(-1, 1, 20)[:, None]
        >>> fn, params = fb.make_functional(torch.nn.Linear(1, 1))
        >>> state, normal = fb.ivon.init(params), fb.likelihoods.Normal(0.5)
        >>> for _ in range(200):
        ...     state, loss = fb.ivon.update(
        ...         *(fn, params, state, (x, 3 * x), normal),
        ...         learning_rate=0.1,
        ...         num_data=20,
        ...         beta2=0.99,
        ...         seed=0,
        ...     )
        >>> q = fb.ivon.posterior(state, num_data=20)
        >>> bool((q.mean["weight"] - 3).abs() < 0.5)
        True
    """
    check_model(fn, _CALL)
    check_state(state, f"{_CALL}(fn, params, state, ...)")
    check_covers(state.mean, params, f"{_CALL}(fn, params, state, ...)")
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not isinstance(batch[1], Tensor):
        raise TypeError(f"`{_CALL}(batch=...)` should be `(x, y)` with tensors, got {type(batch).__name__}.")
    scale = Scale.of(num_data, prior_precision, ess, _CALL)
    check_num_data(num_data, batch[1].shape[0] if batch[1].ndim else 1, _CALL)
    rule = Rule.of(scale, learning_rate, beta1, beta2, clip_radius, rescale_lr, _CALL)
    updater = Updater.of(fn, likelihood, num_samples, max_grad_norm, chunk_size, compile, _CALL)
    with torch.inference_mode(False), torch.enable_grad():
        params = map_leaves(lambda leaf: ready(leaf, None), params)
        rows = flat((as_tree(batch[0]), batch[1]), device_of(state.mean))
        traits = traits_of(fn, whole(params, state), rows.member(0)[0])
        updater.check(traits)
        return updater.one(params, state, rows, rule, resolve_seed(seed), traits)


def whole(params: Params, state: IVONState) -> Params:
    """Parameters of the model at the mean, with its buffers."""
    return merge(merge(params, in_dtypes_of_the_model(state, state.mean)), state.fixed)


@dataclass(frozen=True)
class Updater:
    """What stays the same from one update to the next; see :func:`update`."""

    fn: Model
    likelihood: Likelihood
    num_samples: int
    max_grad_norm: float | None
    chunk_size: int | None
    compile: bool
    call: str

    @classmethod
    def of(
        cls,
        fn: Model,
        likelihood: Likelihood,
        num_samples: Any,
        max_grad_norm: Any,
        chunk_size: Any,
        compile: bool,
        call: str,
    ) -> "Updater":
        """Check the arguments that a user gives."""
        check_is_likelihood(likelihood, f"{call}(likelihood=...)")
        num_samples = positive_int(num_samples, f"{call}(num_samples=...)")
        max_grad_norm = positive_or_none(max_grad_norm, f"{call}(max_grad_norm=...)")
        if chunk_size is not None:
            chunk_size = positive_int(chunk_size, f"{call}(chunk_size=...)")
        return cls(fn, likelihood, num_samples, max_grad_norm, chunk_size, compile, call)

    def check(self, traits: Traits) -> None:
        """Refuse what cannot be compiled."""
        if self.compile and traits.draws_globally:
            refuse_random_numbers(self.call)

    def one(
        self, params: Params, state: IVONState, batch: Batch, rule: Rule, seed: Seed, traits: Traits
    ) -> tuple[IVONState, Tensor]:
        """Move one network; its loss, a scalar."""
        key = key_of_step(seed, state.step)
        draws = drawn(state, self.num_samples, key, rule.scale)
        common, own = split(map_leaves(lambda leaf: leaf.unsqueeze(0), state.fixed))
        # Noise that is not dropout's comes from torch's global state: then that is seeded for the step.
        with forked(int(fold(key, "global"))) if traits.draws_globally else nullcontext():
            found = self._found(
                *(merge(params, common), own, in_dtypes_of_the_model(state, draws), batch),
                fold(fold(key, "dropout"), torch.arange(self.num_samples)),
                self._can_be_mapped(state, traits),
            )
        new = moved(state, found.gradients, draws, rule)
        return _with_buffers(new, index(averaged(found.changed, 1), 0)), found.losses.mean()

    def several(
        self,
        members: Params,
        states: IVONState,
        batch: Batch | RaggedBatch,
        rule: Rule,
        seeds: Tensor,
        traits: Traits,
    ) -> tuple[IVONState, Tensor]:
        """Move ``K`` networks, every tensor with a leading axis; their losses ``(K,)``."""
        num = len(seeds)
        if isinstance(batch, RaggedBatch) or traits.draws_globally:
            moves = [
                self.one(
                    *(index(members, k), index(states, k), flat(batch.member(k), None)),
                    *(rule, int(seeds[k]), traits),
                )
                for k in range(num)
            ]
            return stack([state for state, _ in moves]), torch.stack([loss for _, loss in moves])
        keys = key_of_step(seeds, states.step)
        draws = map_first_axis(
            lambda each: drawn(each[0], self.num_samples, each[1], rule.scale), (states, keys), num
        )
        common, own = split(states.fixed)
        found = self._found(
            *(common, merge(members, own)),
            map_leaves(lambda leaf: leaf.flatten(0, 1), in_dtypes_of_the_model(states, draws)),
            batch,
            fold(fold(keys, "dropout").unsqueeze(1), torch.arange(self.num_samples)).flatten(),
            self._can_be_mapped(states, traits),
        )
        gradients = map_leaves(lambda leaf: leaf.unflatten(0, (num, -1)), found.gradients)
        new = map_first_axis(lambda each: moved(*each, rule), (states, gradients, draws), num)
        losses = found.losses.unflatten(0, (num, -1)).mean(1)
        return _with_buffers(new, averaged(found.changed, num)), losses

    def _can_be_mapped(self, state: IVONState, traits: Traits) -> bool:
        # Under vmap a buffer that is written has to have an axis of draws. Those that are still inside `fn`
        # get one by the first update. What draws from the global state would be upset by trying vmap.
        return traits.changes <= named_leaves(state.fixed).keys() and not traits.draws_globally

    def _found(
        self, shared: Params, own: Params, draws: Params, batch: Batch, keys: Tensor, can_be_mapped: bool
    ) -> Found:
        spec, dims = batch.spec, batch.dims
        settings = "ivon", spec, tuple(dims), self.max_grad_norm, self.chunk_size

        def find(given: Any) -> tuple[Tensor, Params, Params]:
            likelihood, shared, own, draws, rows, keys = given
            found = evaluated(
                *(self.fn, likelihood, shared, own, draws, Batch(rows, spec, dims), keys),
                call=self.call,
                chunk_size=self.chunk_size if can_be_mapped else 1,
            )
            gradients = found.gradients
            if self.max_grad_norm is not None:
                gradients = _shortened(gradients, self.max_grad_norm)
            return found.losses, gradients, found.changed

        given = self.likelihood, shared, own, draws, batch.leaves, keys
        if not self.compile or not can_be_mapped:
            return Found(*find(given))
        return Found(*compiled(self.fn, settings, find, given))


def _with_buffers(state: IVONState, changed: Params) -> IVONState:
    return replace(state, fixed=merge(state.fixed, changed)) if named_leaves(changed) else state


def _shortened(gradients: Params, longest: float) -> Params:
    """Gradients ``(E, *s)``, those of each evaluation with a norm of at most ``longest``."""
    rows = [leaf.reshape(len(leaf), leaf[0].numel()) for leaf in named_leaves(gradients).values()]
    squares = [row.to(at_least_single(row.dtype)).square().sum(1) for row in rows]
    factor = (longest / (torch.stack(squares).sum(0).sqrt() + 1e-6)).clamp(max=1.0)

    def scaled(leaf: Tensor) -> Tensor:
        return (leaf * factor.reshape(-1, *(1 for _ in leaf.shape[1:]))).to(leaf.dtype)

    return map_leaves(scaled, gradients)
