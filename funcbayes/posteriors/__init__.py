"""Posteriors: pytrees that can be sampled."""

from ._dropout import Dropout as Dropout
from ._ensemble import Ensemble as Ensemble
from ._gaussian import Gaussian as Gaussian
from ._interface import Draw as Draw, Posterior as Posterior
from ._move import to as to
from ._point import Point as Point
