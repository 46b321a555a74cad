"""Posteriors: pytrees that can be sampled."""

from ._compose import (
    antithetic as antithetic,
    orthogonal as orthogonal,
    restrict as restrict,
    temper as temper,
    to_ensemble as to_ensemble,
)
from ._dropout import Dropout as Dropout
from ._ensemble import Ensemble as Ensemble
from ._gaussian import Gaussian as Gaussian
from ._interface import Draw as Draw, Posterior as Posterior
from ._join import Join as Join, join as join
from ._mixture import Mixture as Mixture, mixture as mixture
from ._move import to as to
from ._point import Point as Point
