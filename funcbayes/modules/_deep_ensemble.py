"""A deep ensemble as a module."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import positive_int
from .._functional import FunctionalModule, make_functional, unwrapped
from .._random import Seed
from .._tree import Params, stack
from ..metrics import diversity
from ..posteriors import Ensemble, Posterior, to
from ._predicting import Outputs, Predicting, check_module


class DeepEnsemble(Predicting):
    """Networks trained from different starts, Lakshminarayanan et al. (2017).

    Members may be trained by :meth:`train_member` or elsewhere, so predicting is never refused. To train all
    members at once in vectorised steps use :func:`funcbayes.ensemble.fit`.

    Args:
        model_fn: Builds a new module at every call, with weights from torch's global random state.
        num_models: How many, ``K``.
        likelihood: What outputs are: see :mod:`funcbayes.modules`.

    Attributes:
        models: The members, an ``nn.ModuleList``.

    Example:
        >>> import torch
        >>> from funcbayes.modules import DeepEnsemble
        >>> ensemble = DeepEnsemble(lambda: torch.nn.Linear(3, 2), num_models=4)
        >>> mean, variance = ensemble.predict(torch.ones(5, 3))
        >>> ensemble.diversity(torch.ones(5, 3)).shape
        torch.Size([5])
    """

    def __init__(
        self, model_fn: Callable[[], nn.Module], num_models: int = 5, *, likelihood: Outputs = None
    ) -> None:
        super().__init__("DeepEnsemble", likelihood, None)
        if isinstance(model_fn, nn.Module) or not callable(model_fn):
            raise TypeError(
                "`DeepEnsemble(model_fn)` should be given a function that builds a new module, got "
                f"{type(model_fn).__name__}. Write `lambda: Net(...)`."
            )
        num_models = positive_int(num_models, "DeepEnsemble(num_models=...)")
        models = [check_module(model_fn(), "DeepEnsemble(model_fn)") for _ in range(num_models)]
        if len({id(model) for model in models}) < num_models:
            raise ValueError(
                "`DeepEnsemble(model_fn)` should be given a function that builds a new module at every call; "
                "this one returns one module again."
            )
        self.models = nn.ModuleList(models)
        self._fn, _ = make_functional(models[0])

    def forward(self, x: Any, model_idx: int | None = None) -> Any:
        """Evaluate one member, or average the outputs of all members (logits too: see ``predict``)."""
        if model_idx is not None:
            return self.models[self._member(model_idx, "forward")](x)
        return torch.stack([model(x) for model in self.models]).mean(0)

    def train_member(
        self,
        model_idx: int,
        train_loader: Iterable[tuple[Any, Any]],
        optimizer: torch.optim.Optimizer,
        criterion: Callable[[Any, Any], Tensor],
        num_epochs: int = 1,
        device: torch.device | str | None = None,
    ) -> list[float]:
        """Train one member, in place.

        Args:
            model_idx: Which.
            train_loader: Batches ``(x, y)``.
            optimizer: An optimizer of this member's parameters.
            criterion: ``(outputs, y) -> loss``, a scalar.
            num_epochs: Passes through the data.
            device: Where to train: member and batches are moved there; ``None`` for where the member is.

        Returns:
            Mean loss of the batches of each epoch.

        Raises:
            IndexError: If there is no such member.
            TypeError: If ``train_loader`` can be gone through once only, and there are several epochs.
            ValueError: If the optimizer holds none of its parameters, or there are no batches.
        """
        model = self.models[self._member(model_idx, "train_member")]
        own = {id(p) for p in model.parameters()}
        if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
            raise ValueError(
                f"`train_member({model_idx}, ..., optimizer)` should be given an optimizer of "
                f"`models[{model_idx}].parameters()`, got one of other tensors."
            )
        if num_epochs != 1 and hasattr(type(train_loader), "__next__"):
            raise TypeError(
                "`train_member(train_loader=...)` should be a re-iterable for several epochs, got "
                f"{type(train_loader).__name__}, which can be gone through once. Write `list(batches)`."
            )
        if device is None:
            device = next(model.parameters()).device
        was_training = model.training
        model.to(device).train()
        try:
            return [
                self._train_epoch(model, train_loader, optimizer, criterion, device)
                for _ in range(positive_int(num_epochs, "train_member(num_epochs=...)"))
            ]
        finally:
            model.train(was_training)

    def _train_epoch(
        self,
        model: nn.Module,
        train_loader: Iterable[tuple[Any, Any]],
        optimizer: torch.optim.Optimizer,
        criterion: Callable[[Any, Any], Tensor],
        device: torch.device | str,
    ) -> float:
        losses = []
        for batch in train_loader:
            x, y = to(batch, device=device)
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        if not losses:
            raise ValueError("`train_member(train_loader=...)` should yield at least one batch, got none.")
        return torch.stack(losses).mean().item()

    def diversity(self, x: Any, *, seed: Seed | None = None) -> Tensor:
        """Variance over members, of class probabilities for a classifier, averaged over outputs: ``(N,)``."""
        return diversity(self._prediction(x, seed))

    def _member(self, model_idx: int, call: str) -> int:
        if not 0 <= model_idx < len(self.models):
            raise IndexError(
                f"`{call}(model_idx=...)` should be below the number of members {len(self.models)}, got "
                f"{model_idx}."
            )
        return model_idx

    def _posterior(self) -> tuple[FunctionalModule, Params, Posterior, int | None]:
        members = stack([self._fn.values_of(unwrapped(model)) for model in self.models])
        return self._fn, None, Ensemble(members), None
