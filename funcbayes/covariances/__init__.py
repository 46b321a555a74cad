"""Structures of a Gaussian's covariance over the leaves of a tree."""

from ._diagonal import Diagonal as Diagonal
from ._interface import Covariance as Covariance
