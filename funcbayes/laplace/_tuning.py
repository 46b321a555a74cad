"""Choosing the prior, and the noise, of a Laplace approximation: by evidence, or by held-out data."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from .._checks import positive_int
from .._tree import Params, map_named, select
from ..covariances._flat import at_least_single
from ..curvature import Curvature, EigenKron, Kron
from ._posterior import covered_leaves, evidence
from ._prior import Numbers, by_leaf

Per = Literal["model", "leaf", "parameter"]
_LIMIT = 23.0  # logarithms of precisions and noises stay within this: from 1e-10 to 1e10


@dataclass(frozen=True)
class Hyperparameters:
    """What was chosen, in the form that :func:`funcbayes.laplace.posterior` takes.

    Attributes:
        prior_precision: One number, a tree with one for each leaf, or one for each parameter.
        noise_std: The noise of a ``Normal`` likelihood; ``None`` if there is none to choose.
        log_marginal_likelihood: The evidence there, a scalar.
    """

    prior_precision: Numbers
    noise_std: Tensor | None
    log_marginal_likelihood: Tensor


def maximize_evidence(
    params: Params,
    c: Curvature,
    *,
    per: Per = "model",
    prior_precision: Numbers = 1.0,
    prior_mean: Numbers = 0.0,
    noise_std: float | Tensor | None = None,
    tune_noise: bool = True,
    temperature: float | Tensor = 1.0,
    num_steps: int = 100,
) -> Hyperparameters:
    """Choose the prior precision, and the noise, for which the evidence is largest (MacKay 1992).

    The curvature is held at what it is: nothing is evaluated but its eigenvalues. The logarithms are found by
    L-BFGS. They stay between -23 and 23: where the data say that a parameter is at the prior's mean, its
    precision would grow for ever.

    Args:
        params: The mode.
        c: The curvature there; for ``Normal`` likelihoods it carries the squared residuals, so noise can be
            chosen.
        per: One precision for the ``"model"``, for each ``"leaf"``, or, but for Kronecker curvatures, for
            each ``"parameter"``.
        prior_precision: Where to start: a number, or a tree.
        prior_mean: Mean of the prior, as for :func:`posterior`.
        noise_std: Noise to start at; ``None`` for that of the likelihood.
        tune_noise: Whether to choose the noise, too, where there is one.
        temperature: As for :func:`posterior`.
        num_steps: At most so many steps of L-BFGS.

    Returns:
        What was chosen.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If a number is out of range, or ``per`` does not go with the curvature.
        RuntimeError: If the evidence is not finite at the start.

    Example:
        >>> import torch, funcbayes as fb
        >>> fn, params = fb.make_functional(torch.nn.Linear(3, 1))
        >>> x = torch.randn(20, 3)
        >>> c = fb.curvature.ggn(fn, params, (x, x @ torch.ones(3, 1)), fb.likelihoods.Normal(1.0), "full")
        >>> found = fb.laplace.maximize_evidence(params, c)
        >>> q = fb.laplace.posterior(params, c, found.prior_precision, noise_std=found.noise_std)
    """
    call = "laplace.maximize_evidence"
    check_per(per, f"{call}(per=...)", is_kronecker=isinstance(c, Kron | EigenKron))
    num_steps = positive_int(num_steps, f"{call}(num_steps=...)")
    # At the start, for all its checks.
    value = evidence(
        *(params, c, prior_precision, prior_mean, None, noise_std, temperature),
        call=call,
    )
    if not bool(value.isfinite()):
        raise RuntimeError(f"The evidence in `{call}` is {float(value)} at the start.")
    leaves = covered_leaves(params, c, call)
    with torch.inference_mode(False):
        logs = {name: n.detach().log() for name, n in _start(prior_precision, leaves, per).items()}
        noise = None
        if c.data.has_noise and tune_noise:
            noise = c.data.noise(noise_std).detach().clone().log()

    def precisions(logs: dict[str, Tensor]) -> Numbers:
        numbers = {name: log.clamp(-_LIMIT, _LIMIT).exp() for name, log in logs.items()}
        return (
            numbers[""]
            if "" in numbers
            else map_named(lambda name, _: numbers[name], select(params, lambda name, _: name in leaves))
        )

    def noise_of(noise: Tensor | None) -> float | Tensor | None:
        return noise_std if noise is None else noise.clamp(-_LIMIT, _LIMIT).exp()

    def negative(logs: dict[str, Tensor], noise: Tensor | None) -> Tensor:
        return -evidence(
            *(params, c, precisions(logs), prior_mean, None, noise_of(noise), temperature),
            call=call,
        )

    logs, noise = _minimized(negative, logs, noise, num_steps)
    with torch.no_grad():
        best = -negative(logs, noise)
        chosen = _in_dtype(precisions(logs), leaves)
    told = c.data.noise(noise_std) if noise is None else noise_of(noise)
    dtype = next(iter(leaves.values())).dtype
    return Hyperparameters(
        chosen, torch.as_tensor(told).to(dtype) if c.data.has_noise else None, best.to(at_least_single(dtype))
    )


def check_per(per: Per, call: str, *, is_kronecker: bool) -> None:
    """Refuse numbers of precisions that there are not, or not for a curvature."""
    if per not in get_args(Per):
        raise ValueError(f"`{call}` should be 'model', 'leaf' or 'parameter', got {per!r}.")
    if per == "parameter" and is_kronecker:
        raise ValueError(
            f"`{call}` should not be 'parameter' with a Kronecker curvature, whose prior has one number, or "
            "one for each leaf: write 'model' or 'leaf'."
        )


def _start(prior_precision: Numbers, leaves: dict[str, Tensor], per: Per) -> dict[str, Tensor]:
    """Numbers to start at, by leaf, or by ``""`` for all."""
    given = by_leaf(prior_precision, leaves, "laplace.maximize_evidence(prior_precision=...)")
    if per == "parameter":
        return {name: number.expand(leaves[name].shape) for name, number in given.items()}
    means = {name: number.log().mean().exp() for name, number in given.items()}
    return means if per == "leaf" else {"": torch.stack(list(means.values())).log().mean().exp()}


def _minimized(
    function: Callable[[dict[str, Tensor], Tensor | None], Tensor],
    logs: dict[str, Tensor],
    noise: Tensor | None,
    num_steps: int,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """L-BFGS with a line search; the best point that was seen, should the last not be it."""
    with torch.inference_mode(False), torch.enable_grad():
        logs = {name: log.clone().requires_grad_() for name, log in logs.items()}
        noise = None if noise is None else noise.clone().requires_grad_()
        variables = [*logs.values(), *([] if noise is None else [noise])]
        optimizer = torch.optim.LBFGS(
            variables,
            max_iter=num_steps,
            tolerance_grad=1e-8,
            tolerance_change=1e-10,
            line_search_fn="strong_wolfe",
        )
        best, kept = math.inf, [v.detach().clone() for v in variables]

        def closure() -> Tensor:
            nonlocal best, kept
            optimizer.zero_grad()
            value = function(logs, noise)
            value.backward()
            if float(value.detach()) < best:
                best, kept = float(value.detach()), [v.detach().clone() for v in variables]
            return value

        optimizer.step(closure)  # type: ignore[arg-type]  # a tensor is what it wants of a float
    found = dict(zip(logs, kept, strict=False))
    return found, None if noise is None else kept[-1]


def _in_dtype(numbers: Numbers, leaves: dict[str, Tensor]) -> Numbers:
    if isinstance(numbers, float | Tensor):
        return torch.as_tensor(numbers).detach().to(next(iter(leaves.values())).dtype)
    return map_named(lambda name, number: number.detach().to(leaves[name].dtype), numbers)
