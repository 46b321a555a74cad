"""A linear layer with Gaussian weights."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import vi
from .._checks import positive_int, positive_number
from .._layer_noise import moments, noise
from .._random import Seed, resolve_seed
from ..posteriors import Gaussian
from ..priors import Normal
from ..vi._prior import expected_log_prior


class GaussianLinear(nn.Module):
    """A linear layer whose weights and biases are independent Gaussians, Blundell et al. (2015).

    Pre-activations are drawn instead of weights, with noise of each row's own (Kingma, Salimans & Welling
    2015). Its parameters are ``weight_mean``, ``weight_rho``, ``bias_mean`` and ``bias_rho``; standard
    deviations are ``softplus(rho)``. For a loop of one's own add the :meth:`kl_divergence` of all such layers
    to ``num_data`` times the mean loss of the batch. :class:`VariationalBayesNN` does the same for any
    network as it is.

    Args:
        in_features: Size of the inputs.
        out_features: Size of the outputs.
        bias: Whether there is a bias.
        prior_std: Standard deviation (not variance) of the prior, of mean zero.
        init_scale: Standard deviation of weights at the start.

    Example:
        >>> import torch
        >>> from funcbayes.modules import GaussianLinear
        >>> layer = GaussianLinear(3, 2)
        >>> layer(torch.ones(5, 3), seed=0).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        prior_std: float = 1.0,
        init_scale: float = 1e-2,
    ) -> None:
        super().__init__()
        self.in_features = positive_int(in_features, "GaussianLinear(in_features=...)")
        self.out_features = positive_int(out_features, "GaussianLinear(out_features=...)")
        self.prior_std = positive_number(prior_std, "GaussianLinear(prior_std=...)")
        init_scale = positive_number(init_scale, "GaussianLinear(init_scale=...)")
        start = nn.Linear(in_features, out_features, bias)
        state = vi.MeanFieldState.around(
            {name: p.detach() for name, p in start.named_parameters()}, init_scale
        )
        for name, mean in state.mean.items():
            self.register_parameter(f"{name}_mean", nn.Parameter(mean))
            self.register_parameter(f"{name}_rho", nn.Parameter(state.rho[name]))

    def forward(self, x: Tensor, *, sample: bool | None = None, seed: Seed | None = None) -> Tensor:
        """Evaluate the layer.

        Args:
            x: Inputs ``(..., in_features)``.
            sample: Whether pre-activations are drawn, or are those of the mean; ``None``: drawn in training
                mode.
            seed: Draws are a function of it; ``None`` takes one number from torch's global state.

        Returns:
            ``(..., out_features)``.
        """
        state = self.state
        if not (self.training if sample is None else sample):
            return F.linear(x, state.mean["weight"], state.mean.get("bias"))
        variance = state.variance()
        weights, spreads = ((tree["weight"], tree.get("bias")) for tree in (state.mean, variance))
        mean, std = moments(F.linear, weights, spreads, 0, x)
        key = torch.as_tensor(resolve_seed(seed))
        return torch.addcmul(mean, std, noise(key, mean.shape, mean))

    @property
    def state(self) -> vi.MeanFieldState:
        """Its distribution, over leaves ``weight`` and ``bias``."""
        means, rhos = (
            {
                name: getattr(self, f"{name}_{part}")
                for name in ("weight", "bias")
                if hasattr(self, f"{name}_{part}")
            }
            for part in ("mean", "rho")
        )
        return vi.MeanFieldState(means, rhos)

    def posterior(self) -> Gaussian:
        """Its distribution, over leaves ``weight`` and ``bias``, without a graph."""
        return vi.posterior(self.state)

    def kl_divergence(self) -> Tensor:
        """``KL(q || prior)``, summed over weights and biases, a scalar."""
        state = self.state
        expected = expected_log_prior(state.scale(), Normal(precision=self.prior_std**-2))
        assert expected is not None
        return -state.entropy() - expected

    def extra_repr(self) -> str:
        """Show sizes as ``nn.Linear`` does."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={hasattr(self, 'bias_mean')}, prior_std={self.prior_std}"
