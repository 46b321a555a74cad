"""Stochastic gradient MCMC: chains whose states, kept along the way, are an ensemble.

A posterior is ``exp(-U)`` with the potential energy ``U = -log p(D|theta) - log p(theta)``, **summed** over
the data (:func:`potential`). Samplers are pairs of pure functions that move a chain along a gradient
of ``U``, found from a batch, and add noise:

========= ================================================ =================================
Sampler   after                                            bias, in its step size
========= ================================================ =================================
``sgld``  Welling & Teh (2011)                             first order
``psgld`` Li et al. (2016): scaled by squares of gradients first order, and ``1 - decay``
``sghmc`` Chen, Fox & Guestrin (2014): with momentum       first order, second in its root
========= ================================================ =================================

Their step sizes go with a potential that is summed: they are about the learning rate of a mean loss divided
by the number of rows. :func:`fit` runs chains on data, all in vectorised passes, and :func:`run` keeps them
apart, for :func:`split_r_hat` and :func:`effective_sample_size`. :func:`hmc` has no bias, and needs all data
in every step.
"""

from ._chains import Chains as Chains
from ._diagnostics import effective_sample_size as effective_sample_size, split_r_hat as split_r_hat
from ._hmc import hmc as hmc
from ._potential import Potential as Potential, potential as potential
from ._psgld import PSGLDState as PSGLDState, psgld as psgld
from ._run import fit as fit, run as run
from ._sampler import ChainState as ChainState, Sampler as Sampler
from ._schedules import (
    Cyclical as Cyclical,
    Polynomial as Polynomial,
    cyclical as cyclical,
    polynomial as polynomial,
)
from ._sghmc import SGHMCState as SGHMCState, sghmc as sghmc
from ._sgld import SGLDState as SGLDState, sgld as sgld
