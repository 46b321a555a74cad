"""What :func:`funcbayes.vi.fit` descends on, and what it looks at on the way."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import check_num_data
from .._functional import Model, training_call
from .._random import Seed, fold
from .._tree import Params, index, map_leaves, merge, named_leaves
from ..likelihoods import Likelihood
from ..priors._given import HasLogProb
from ..training._batch import Batch, RaggedBatch
from ..training._data import Source
from ..training._networks import Networks
from ._elbo import Estimator, Terms, terms
from ._layers import leaves_of_layers
from ._schedules import Schedule, checked_weight
from ._state import VariationalState


class DivergedError(RuntimeError):
    """The ELBO is no longer finite.

    Attributes:
        step: Number of the step at which that was so, from 0 on.
        term: ``"log likelihood"`` or ``"KL"``.
        state: The last state whose ELBO was finite; ``None`` if there was none.
    """

    def __init__(self, message: str, step: int, term: str, state: VariationalState | None) -> None:
        super().__init__(message)
        self.step, self.term, self.state = step, term, state


class Objective:
    """The negative ELBO divided by the number of rows, of one network ``{"params": ..., "state": ...}``.

    Attributes:
        step: How many steps were taken, which the weight of the KL depends on.
    """

    def __init__(
        self,
        fn: Model,
        likelihood: Likelihood,
        *,
        prior: HasLogProb,
        num_data: int,
        num_samples: int,
        estimator: Estimator,
        kl_weight: float | Schedule,
        call: str,
        chunk_size: int | None,
    ) -> None:
        self.fn, self.likelihood, self.prior = fn, likelihood, prior
        self.num_data, self.num_samples = num_data, num_samples
        self.estimator: Estimator = estimator
        self.kl_weight, self.call, self.chunk_size = kl_weight, call, chunk_size
        self.step = 0
        self._buffers: set[str] = set()  # that training changes

    def __call__(
        self, network: Params, x: Any, y: Tensor, seed: Seed, check: bool = False
    ) -> tuple[Tensor, Params]:
        """The loss and the buffers that changed."""
        if check:
            return self._checked(network, x, y, seed)
        found = self.terms(network, x, y, seed)
        loss = found.nll + self.weight() / self.num_data * found.kl
        return loss, {"params": found.changed} if found.changed else {}

    def weight(self) -> float:
        """Of the KL, at this step."""
        if not callable(self.kl_weight):
            return self.kl_weight
        return checked_weight(self.kl_weight(self.step), self.step, self.call)

    def terms(self, network: Params, x: Any, y: Tensor, seed: Seed) -> Terms:
        """The terms of the ELBO, in training mode."""
        params = held(network)
        # Buffers that are still inside `fn` have no axis of draws: those draws are evaluated one by one.
        adds_buffers = not self._buffers <= named_leaves(params).keys()
        return terms(
            *(self.fn, params, network["state"], x, y, self.likelihood),
            prior=self.prior,
            num_samples=self.num_samples,
            seed=seed,
            estimator=self.estimator,
            evaluate=lambda leaves, x, key: training_call(self.fn, leaves, x, key),
            call=self.call,
            chunk_size=1 if adds_buffers else self.chunk_size,
        )

    def _checked(self, network: Params, x: Any, y: Tensor, seed: Seed) -> tuple[Tensor, Params]:
        """Look at one evaluation at the mean, outside of any transform."""
        state = network["state"]
        whole = merge(held(network), state.mean)
        outputs, changed = training_call(self.fn, whole, x, seed)
        self.likelihood.check(outputs, y, call=f"{self.call}(data=...)")
        check_num_data(self.num_data, y.shape[0], self.call)
        self._buffers = set(named_leaves(changed))
        if self.estimator in ("local", "flipout"):  # what is found out here is remembered for transforms
            names = list(named_leaves(state.mean))
            leaves_of_layers(self.fn, whole, names, x, rows_first=self.estimator == "flipout")
        return outputs.new_zeros(()), {"params": changed} if changed else {}


def held(network: Params) -> Params:
    """What a network has beside its state; ``None`` for nothing, whatever container the state has."""
    params = network.get("params")
    return params if named_leaves(params) else None


class Watch:
    """Counts steps, and keeps the best state of each network, if that is wanted.

    Args:
        objective: Whose steps are counted.
        elbo: ``(network) -> ELBO`` of one network over all data; ``None`` to keep nothing.
        num_networks: ``K``.
    """

    def __init__(
        self, objective: Objective, elbo: Callable[[Params], float] | None, num_networks: int
    ) -> None:
        objective.step = 0
        self.objective, self.elbo = objective, elbo
        self.best: list[Params | None] = [None] * num_networks
        self._highest = [-torch.inf] * num_networks

    def after_step(self, members: Callable[[], Params]) -> None:
        """Count."""
        self.objective.step += 1

    def after_epoch(self, members: Callable[[], Params]) -> bool:
        """Keep what is better than all before."""
        if self.elbo is None:
            return False
        present = members()
        for k in range(len(self.best)):
            network = index(present, k)
            value = self.elbo(network)
            if value > self._highest[k]:  # which NaN never is
                self._highest[k], self.best[k] = value, map_leaves(torch.clone, network)
        return False


class Inspector:
    """Stops at the first ELBO that is not finite, and says of which term that is."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self._finite: list[Tensor] | None = None

    def __call__(
        self, networks: Networks, leaves: Sequence[Tensor], batch: Batch | RaggedBatch, losses: Tensor
    ) -> None:
        """Look at the losses of a step, before the leaves are moved."""
        if networks.num_steps == 0:
            self._finite = None  # of networks trained before
        fine = losses.isfinite()
        if bool(fine.all()):
            if self._finite is None:
                self._finite = [leaf.detach().clone() for leaf in leaves]
            else:
                torch._foreach_copy_(self._finite, [leaf.detach() for leaf in leaves])
            return
        k = int((~fine).nonzero()[0])
        key = fold(networks.keys[k], networks.num_steps)
        with torch.no_grad():
            found = self.objective.terms(index(networks.present(leaves), k), *batch.member(k), key)
        term, value = ("KL", found.kl) if found.nll.isfinite() else ("log likelihood", -found.nll)
        state = None
        if self._finite is not None:
            state = index(networks.present(self._finite), k)["state"]
        of_member = f" of member {k}" if networks.num_members > 1 else ""
        raise DivergedError(
            f"The ELBO{of_member} in `{self.objective.call}` is not finite in step {networks.num_steps}: its "
            f"{term} is {float(value)}. A lower learning rate, `max_grad_norm=1.0`, or a smaller "
            "`init_scale` usually helps; the last finite state is `error.state`.",
            networks.num_steps,
            term,
            state,
        )


def elbo_over(objective: Objective, source: Source, seed: int) -> Callable[[Params], float]:
    """The ELBO of one network over all data, by draws that are the same every time, without dropout."""

    def elbo(network: Params) -> float:
        params, state = held(network), network["state"]
        total, rows, kl = 0.0, 0, 0.0
        with torch.no_grad():
            for batch in source.plain_batches(None):
                x, y = batch.member(0)
                found = terms(
                    *(objective.fn, params, state, x, y, objective.likelihood),
                    prior=objective.prior,
                    num_samples=objective.num_samples,
                    seed=fold(seed, "elbo"),
                    estimator="reparam",
                    evaluate=lambda leaves, x, key: (objective.fn(leaves, x), {}),
                    call=objective.call,
                    chunk_size=objective.chunk_size,
                )
                total, rows, kl = total + float(found.nll) * len(y), rows + len(y), float(found.kl)
        return -total * objective.num_data / rows - kl

    return elbo
