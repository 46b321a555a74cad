"""Structures of a Gaussian's covariance over the leaves of a tree."""

from ._dense import Dense as Dense
from ._diagonal import Diagonal as Diagonal
from ._interface import Covariance as Covariance
from ._kronecker import Kronecker as Kronecker
from ._low_rank_plus_diagonal import LowRankPlusDiagonal as LowRankPlusDiagonal
from ._low_rank_precision import LowRankPrecision as LowRankPrecision
