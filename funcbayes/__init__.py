"""Bayesian deep learning for PyTorch as pure functions."""

from . import covariances as covariances, likelihoods as likelihoods
from ._functional import FunctionalModule as FunctionalModule, make_functional as make_functional
from ._predict import predict as predict, predict_batches as predict_batches, predictor as predictor
from ._prediction import Prediction as Prediction
from ._tree import MISSING as MISSING, Fixed as Fixed
from .posteriors import (
    Draw as Draw,
    Dropout as Dropout,
    Ensemble as Ensemble,
    Gaussian as Gaussian,
    Point as Point,
    Posterior as Posterior,
    to as to,
)
