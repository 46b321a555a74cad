"""What is minimised: the mean negative log joint density."""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from .._functional import Model, training_call
from .._random import Seed
from .._tree import Fixed, Params, is_parameter
from ..likelihoods import Likelihood
from ..likelihoods._checks import check_is_likelihood
from ._adversarial import Steps, steps_of, summed_losses
from ._data import Source

NO_RULES: AbstractContextManager[Any] = nullcontext()


def rules_around(likelihood: Likelihood, rules: AbstractContextManager[Any]) -> AbstractContextManager[Any]:
    """Rules for what the likelihoods of a user do, who may view outputs as if they lay in memory as alone."""
    return NO_RULES if type(likelihood).__module__.startswith(_OURS) else rules


_OURS = f"{__name__.partition('.')[0]}."


class Objective(ABC):
    """The loss of one network.

    Attributes:
        fn: The model.
    """

    fn: Model

    @abstractmethod
    def __call__(
        self,
        params: Params,
        x: Any,
        y: Tensor,
        seed: Seed,
        check: bool = False,
        rules: AbstractContextManager[Any] = NO_RULES,
    ) -> tuple[Tensor, Params]:
        """Return the loss and the buffers that changed.

        Args:
            params: Of the network.
            x: Inputs of a batch.
            y: Targets.
            seed: Of the noise.
            check: Whether to look at values.
            rules: What is on while the model is called, and code of the user's. Ours is faster without.
        """

    def numbers(self) -> Params:
        """What changes from step to step, or from one training to the next, a tree: a step is given it."""
        return {}

    def at(self, numbers: Params) -> "Objective":
        """The objective with these numbers."""
        del numbers
        return self

    def rest(self) -> Hashable:
        """All that the loss depends on beside arguments and numbers, or ``None`` if it is this object."""
        return None


@dataclass(frozen=True)
class MapObjective(Objective):
    """Mean negative log joint of one network: see :mod:`funcbayes.training`.

    ``decay`` is ``prior_precision / N``; ``steps`` say how far inputs move in adversarial training.
    """

    fn: Model
    likelihood: Likelihood
    decay: float
    call: str
    steps: Steps | None = None

    @classmethod
    def over(
        cls,
        fn: Model,
        likelihood: Likelihood,
        source: Source,
        seed: int,
        prior_precision: float,
        num_data: int | None,
        call: str,
        *,
        adversarial: float | None = None,
    ) -> "MapObjective":
        """Make the objective for the data of ``source``; rows are counted only if a prior asks for it."""
        check_is_likelihood(likelihood, f"{call}(likelihood=...)")
        if not (0 <= prior_precision < math.inf):
            raise ValueError(
                f"`{call}(prior_precision=...)` should be at least 0 and finite, got {prior_precision}."
            )
        if num_data is not None and num_data < 1:
            raise ValueError(f"`{call}(num_data=...)` should be at least 1, got {num_data}.")
        steps = None if adversarial is None else steps_of(source, adversarial, call)
        if not prior_precision:
            return cls(fn, likelihood, 0.0, call, steps)
        num_rows = source.num_data(seed) if num_data is None else num_data
        return cls(fn, likelihood, float(prior_precision) / max(num_rows, 1), call, steps)

    def numbers(self) -> Params:
        """The likelihood."""
        return {"likelihood": self.likelihood}

    def at(self, numbers: Params) -> "MapObjective":
        """The objective with another one."""
        return dataclasses.replace(self, likelihood=numbers["likelihood"])

    def rest(self) -> Hashable:
        """The decay; inputs that move do so by numbers of their own."""
        return (self.decay,) if self.steps is None else None

    def __call__(
        self,
        params: Params,
        x: Any,
        y: Tensor,
        seed: Seed,
        check: bool = False,
        rules: AbstractContextManager[Any] = NO_RULES,
    ) -> tuple[Tensor, Params]:
        """Return the loss and the buffers that changed."""

        def mean_nll(x: Any) -> tuple[Tensor, Params]:
            with rules:
                outputs, changed = training_call(self.fn, params, x, seed)
            if check:
                self.likelihood.check(outputs, y, call=f"{self.call}(data=...)")
            with rules_around(self.likelihood, rules):
                return -self.likelihood.log_prob(outputs, y).mean(), changed

        # A check looks at values, and at what one evaluation does: no transform should be around it.
        if self.steps is None or check:
            loss, changed = mean_nll(x)
        else:
            loss, changed = summed_losses(mean_nll, x, self.steps)
        if self.decay:
            leaves = optree.tree_leaves(params, is_leaf=lambda node: isinstance(node, Fixed))
            squares = [leaf.square().sum() for leaf in leaves if is_parameter(leaf)]
            loss = loss + 0.5 * self.decay * torch.stack(squares).sum().to(loss.dtype)
        return loss, changed
