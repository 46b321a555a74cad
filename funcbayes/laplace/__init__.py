"""Laplace approximations: Gaussians at a mode, their evidence, and what is tuned by it."""

from ._fit import fit as fit
from ._functional import FunctionalLaplace as FunctionalLaplace, functional as functional
from ._grid import GridSearch as GridSearch, minimize_validation_nll as minimize_validation_nll
from ._posterior import log_marginal_likelihood as log_marginal_likelihood, posterior as posterior
from ._subnetwork import (
    largest_magnitude as largest_magnitude,
    largest_variance as largest_variance,
    random_mask as random_mask,
    subnetwork as subnetwork,
)
from ._train import Trained as Trained, train as train
from ._tuning import Hyperparameters as Hyperparameters, maximize_evidence as maximize_evidence
