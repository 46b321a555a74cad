"""Variational inference on any pure model: a Gaussian moved to where the ELBO is largest.

``q`` is a Gaussian of one of four families, a pytree of unconstrained numbers (:func:`init`);
:func:`negative_elbo` is a pure function of it, for a loop of one's own, and :func:`fit` is the loop. Both end
in a :class:`funcbayes.Gaussian`, which predicts and composes like any other.
"""

from ._elbo import negative_elbo as negative_elbo
from ._fit import fit as fit
from ._full_rank import FullRankState as FullRankState
from ._init import init as init, moped as moped
from ._low_rank import LowRankState as LowRankState
from ._matrix_normal import MatrixNormalState as MatrixNormalState
from ._mean_field import MeanFieldState as MeanFieldState
from ._objective import DivergedError as DivergedError
from ._schedules import cyclical as cyclical, halving as halving, linear_warmup as linear_warmup
from ._state import VariationalState as VariationalState, posterior as posterior
