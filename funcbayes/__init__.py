"""Bayesian deep learning for PyTorch as pure functions.

A model is ``fn(params, x)``, a posterior is a pytree that can be sampled, and ``predict`` evaluates its
draws together.
"""

from . import (
    covariances as covariances,
    curvature as curvature,
    ensemble as ensemble,
    ivon as ivon,
    laplace as laplace,
    likelihoods as likelihoods,
    metrics as metrics,
    modules as modules,
    plots as plots,
    priors as priors,
    sgmcmc as sgmcmc,
    swag as swag,
    training as training,
    vi as vi,
)
from ._batch_norm import refresh_batch_norm as refresh_batch_norm
from ._divergence import kl as kl
from ._functional import (
    FunctionalModule as FunctionalModule,
    make_functional as make_functional,
    training_call as training_call,
)
from ._linearize import linearize as linearize
from ._linearized_prediction import LinearizedPrediction as LinearizedPrediction
from ._predict import predict as predict, predict_batches as predict_batches, predictor as predictor
from ._predict_linearized import predict_linearized as predict_linearized
from ._prediction import Prediction as Prediction
from ._sample_function import SampledFunction as SampledFunction, sample_function as sample_function
from ._tree import MISSING as MISSING, Fixed as Fixed
from .io import load as load, save as save
from .posteriors import (
    Draw as Draw,
    Dropout as Dropout,
    Ensemble as Ensemble,
    Gaussian as Gaussian,
    Join as Join,
    Mixture as Mixture,
    Point as Point,
    Posterior as Posterior,
    antithetic as antithetic,
    join as join,
    mixture as mixture,
    orthogonal as orthogonal,
    restrict as restrict,
    temper as temper,
    to as to,
    to_ensemble as to_ensemble,
)

__version__ = "0.1.0"
