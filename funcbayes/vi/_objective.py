"""What :func:`funcbayes.vi.fit` descends on, and what it looks at on the way."""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from .._checks import check_num_data
from .._functional import Model, training_call
from .._layer_noise import leaves_of_layers
from .._random import Seed, fold
from .._tree import Params, index, map_leaves, merge, named_leaves
from ..likelihoods import Likelihood
from ..priors._given import HasLogProb
from ..training._batch import Batch, RaggedBatch
from ..training._data import Source
from ..training._networks import Networks
from ..training._objective import NO_RULES, Objective
from ._elbo import Estimator, Terms, terms
from ._schedules import Schedule, checked_weight
from ._state import VariationalState


class DivergedError(RuntimeError):
    """The ELBO is no longer finite.

    Attributes:
        step: Number of the step at which that was so, from 0 on.
        term: ``"log likelihood"`` or ``"KL"``; ``"state"`` where the step itself made numbers of the state
            infinite.
        state: The last state whose ELBO was finite; ``None`` if there was none.
    """

    def __init__(self, message: str, step: int, term: str, state: VariationalState | None) -> None:
        super().__init__(message, step, term, state)
        self.step, self.term, self.state = step, term, state

    def __str__(self) -> str:
        """The message alone."""
        return self.args[0]


class NegativeElbo(Objective):
    """The negative ELBO divided by the number of rows, of one network ``{"params": ..., "state": ...}``.

    Attributes:
        step: How many steps were taken, which the weight of the KL depends on.
        first: Number of the first of the networks that are fitted at present, for messages.
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
        num_networks: int,
    ) -> None:
        self.fn, self.likelihood, self.prior = fn, likelihood, prior
        self.num_networks = num_networks
        self.num_data, self.num_samples = num_data, num_samples
        self.estimator: Estimator = estimator
        self.kl_weight, self.call, self.chunk_size = kl_weight, call, chunk_size
        self.step, self.first = 0, 0
        self._buffers: set[str] = set()  # that training changes
        self._weight: Tensor | None = None  # of the KL, where it is given

    def __call__(
        self,
        network: Params,
        x: Any,
        y: Tensor,
        seed: Seed,
        check: bool = False,
        rules: AbstractContextManager[Any] = NO_RULES,
    ) -> tuple[Tensor, Params]:
        """The loss and the buffers that changed."""
        if check:
            return self._checked(network, x, y, seed)
        with rules:
            found = self.terms(network, x, y, seed)
        weight = (self.weight() if self._weight is None else self._weight) / self.num_data
        if isinstance(weight, Tensor):
            weight = weight.to(found.kl.dtype)  # only now, as a number would be
        loss = found.nll + weight * found.kl
        return loss, {"params": found.changed} if found.changed else {}

    def numbers(self) -> Params:
        """The weight of the KL."""
        return {"kl_weight": torch.tensor(self.weight(), dtype=torch.float64)}

    def at(self, numbers: Params) -> "NegativeElbo":
        """The objective with this weight."""
        given = copy.copy(self)
        given._weight = numbers["kl_weight"]
        return given

    def weight(self) -> float:
        """Of the KL, at this step."""
        if not callable(self.kl_weight):
            return checked_weight(self.kl_weight, f"{self.call}(kl_weight=...)")
        return checked_weight(self.kl_weight(self.step), f"{self.call}(kl_weight=...)({self.step})")

    def terms(self, network: Params, x: Any, y: Tensor, seed: Seed) -> Terms:
        """The terms of the ELBO, in training mode."""
        params = held(network)
        check_num_data(self.num_data, y.shape[0], self.call)
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
        elbos: ``(network) -> ELBO`` over all data, of each of the networks; empty to keep nothing.
        first: Number of the first of the networks.
    """

    def __init__(
        self, objective: NegativeElbo, elbos: Sequence[Callable[[Params], float]], first: int
    ) -> None:
        objective.step, objective.first = 0, first
        self.objective, self.elbos = objective, elbos
        self.best: list[Params | None] = [None] * len(elbos)
        self._highest = [-torch.inf] * len(elbos)

    def after_step(self, members: Callable[[], Params]) -> None:
        """Count."""
        self.objective.step += 1

    def after_epoch(self, members: Callable[[], Params]) -> bool:
        """Keep what is better than all before."""
        present = members() if self.elbos else None
        for k, elbo in enumerate(self.elbos):
            network = index(present, k)
            value = elbo(network)
            if value > self._highest[k]:  # which NaN never is
                self._highest[k], self.best[k] = value, map_leaves(torch.clone, network)
        return False


class Inspector:
    """Stops at the first ELBO or state that is not finite, and says what it was."""

    def __init__(self, objective: NegativeElbo) -> None:
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
        raise self._diverged(networks, k, networks.num_steps, "ELBO", term, f": its {term} is {float(value)}")

    def after_epoch(self, networks: Networks, leaves: Sequence[Tensor]) -> None:
        """Look at what the last step of an epoch made of the leaves, which no loss has shown yet."""
        fine = torch.stack([leaf.isfinite().reshape(len(leaf), -1).all(1) for leaf in leaves]).all(0)
        if not bool(fine.all()):
            k = int((~fine).nonzero()[0])
            raise self._diverged(networks, k, networks.num_steps - 1, "state", "state", " afterwards")

    def _diverged(
        self, networks: Networks, k: int, step: int, what: str, term: str, detail: str
    ) -> DivergedError:
        of_member = f" of member {self.objective.first + k}" if self.objective.num_networks > 1 else ""
        state = None
        if self._finite is not None:
            state = map_leaves(torch.clone, index(networks.present(self._finite), k)["state"])
        return DivergedError(
            f"The {what}{of_member} in `{self.objective.call}` is not finite in step {step}{detail}. A lower "
            "learning rate, `max_grad_norm=1.0`, or a smaller `init_scale` usually helps; the last finite "
            "state is `error.state`.",
            step,
            term,
            state,
        )


def elbo_over(objective: NegativeElbo, source: Source, seed: int) -> Callable[[Params], float]:
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
