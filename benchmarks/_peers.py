"""Other libraries: which are there, their layers, and their steps on a mean-field ELBO, as documented."""

import copy
import importlib
import math
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Step = Callable[[], Tensor]
_T = TypeVar("_T")
_MODULES = {
    "laplace-torch": "laplace",
    "bayesian-torch": "bayesian_torch",
    "torch-uncertainty": "torch_uncertainty.methods",
}  # named otherwise than the library


def steps(net: nn.Module, x: Tensor, y: Tensor, draws: int, num_data: int, scale: float) -> dict[str, Step]:
    """Value and gradient of the negative ELBO, summed over the data, by each library that is installed."""
    makers = {"posteriors": _posteriors, "bayesian-torch": _bayesian_torch, "blitz": _blitz}
    return {who: make(net, x, y, draws, num_data, scale) for who, make in installed(makers).items()}


def installed(makers: dict[str, _T]) -> dict[str, _T]:
    """The entries of the libraries that can be imported, by their names."""
    found = {}
    for name, make in makers.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importlib.import_module(_MODULES.get(name, name))
        except Exception:  # one that is half there raises anything
            continue
        found[name] = make
    return found


def with_gaussian_layers(net: nn.Module, std: float) -> nn.Module:
    """A copy of ``net`` in layers of bayesian-torch that draw their weights around its own."""
    from bayesian_torch.models.dnn_to_bnn import dnn_to_bnn

    model = copy.deepcopy(net)
    settings = {"prior_mu": 0.0, "prior_sigma": 1.0, "posterior_mu_init": 0.0, "posterior_rho_init": 0.0}
    dnn_to_bnn(model, {**settings, "type": "Reparameterization", "moped_enable": False, "moped_delta": 0.1})
    _copy_means(model, net, std)
    return model


def _posteriors(net: nn.Module, x: Tensor, y: Tensor, draws: int, num_data: int, scale: float) -> Step:
    from posteriors.vi import diag
    from torch.func import functional_call, grad_and_value

    params = {name: p.detach().clone() for name, p in net.named_parameters()}
    log_std = {name: torch.full_like(p, math.log(scale)) for name, p in params.items()}

    def log_posterior(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        outputs = functional_call(net, params, (batch[0],))
        log_prior = sum(
            -0.5 * p.square().sum() - 0.5 * p.numel() * math.log(2 * math.pi) for p in params.values()
        )
        return -num_data * F.cross_entropy(outputs, batch[1]) + log_prior, outputs

    def nelbo(mean: dict[str, Tensor], log_std: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        std = {name: t.exp() for name, t in log_std.items()}
        return diag.nelbo(mean, std, (x, y), log_posterior, 1.0, draws, True)

    step = grad_and_value(nelbo, argnums=(0, 1), has_aux=True)

    def run() -> Tensor:
        _, (value, _) = step(params, log_std)
        return value

    return run


def _bayesian_torch(net: nn.Module, x: Tensor, y: Tensor, draws: int, num_data: int, scale: float) -> Step:
    from bayesian_torch.models.dnn_to_bnn import get_kl_loss

    model = with_gaussian_layers(net, scale)

    def run() -> Tensor:
        nll = torch.stack([F.cross_entropy(model(x), y) for _ in range(draws)]).mean()
        loss = num_data * nll + get_kl_loss(model)
        torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        return loss

    return run


def _blitz(net: nn.Module, x: Tensor, y: Tensor, draws: int, num_data: int, scale: float) -> Step:
    from blitz.modules import BayesianConv2d, BayesianLinear
    from blitz.utils import variational_estimator

    def converted(part: nn.Module) -> nn.Module:
        rho, sigma = (
            math.log(math.expm1(scale)),
            {"prior_sigma_1": 1.0, "prior_sigma_2": 1.0, "prior_pi": 1.0},
        )
        if isinstance(part, nn.Linear):
            return BayesianLinear(part.in_features, part.out_features, posterior_rho_init=rho, **sigma)
        if isinstance(part, nn.Conv2d):
            options = {"padding": part.padding[0], "posterior_rho_init": rho, **sigma}
            return BayesianConv2d(part.in_channels, part.out_channels, part.kernel_size, **options)
        return part

    @variational_estimator
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(*map(converted, net))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    model = Net()
    with torch.no_grad():
        for own, part in zip(model.body, net, strict=True):
            for name in ("weight", "bias"):
                if hasattr(own, f"{name}_mu"):
                    getattr(own, f"{name}_mu").copy_(getattr(part, name))
                    getattr(own, f"{name}_rho").fill_(math.log(math.expm1(scale)))

    def run() -> Tensor:
        loss = num_data * model.sample_elbo(x, y, F.cross_entropy, draws, 1 / num_data)
        torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        return loss

    return run


def _copy_means(model: nn.Module, net: nn.Module, scale: float) -> None:
    start = math.log(math.expm1(scale))
    with torch.no_grad():
        for own, part in zip(model.modules(), net.modules(), strict=True):
            for kind in ("weight", "kernel"):
                if hasattr(own, f"mu_{kind}"):
                    getattr(own, f"mu_{kind}").copy_(part.weight)
                    getattr(own, f"rho_{kind}").fill_(start)
            if hasattr(own, "mu_bias"):
                own.mu_bias.copy_(part.bias)
                own.rho_bias.fill_(start)
