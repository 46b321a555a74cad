"""SWAG: a Gaussian fitted to the snapshots that stochastic gradient descent passes through.

With snapshots ``theta_1, ..., theta_n`` let ``m_t`` be the mean of the first ``t``, ``var`` the variance
of all (divided by ``n``), and let the columns of ``D`` be the last ``K`` deviations ``theta_t - m_t``. Then

    posterior = N(m_n, scale * (diag(var) + D D^T / (K - 1))),

Maddox et al. (2019), "A simple baseline for Bayesian uncertainty in deep learning", equation 1 and
algorithm 1, https://arxiv.org/abs/1902.02476. The paper's SWAG has ``scale=0.5`` and a rank of 20, its
SWAG-diagonal ``scale=1.0`` and a rank of 0. ``K`` is the number of deviations that exist: the first, always
zero, is none, and where ``K`` is 1 the divisor is 1.

Several such Gaussians from independent runs, mixed, are MultiSWAG (Wilson & Izmailov 2020, "Bayesian deep
learning and a probabilistic perspective of generalization", https://arxiv.org/abs/2002.08791):
``fit(..., stacked=True)``.
"""

from ._fit import fit as fit
from ._posterior import posterior as posterior
from ._state import State as State, init as init, update as update
