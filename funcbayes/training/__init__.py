"""Training of networks: one loop, for a single network and for many at once.

The objective of a network is its mean negative log joint density, over the ``N`` rows of the data,

    loss(theta) = mean over the batch's rows of -log p(y | f_theta(x)) + prior_precision / (2 N) |theta|^2,

that is, ``-log p(D, theta) / N`` up to a constant, with a prior ``N(0, 1 / prior_precision)`` on each
parameter: its minimum is the MAP estimate that ``laplace`` expects for the same ``prior_precision``.
"""

from ._data import bootstrap_rows as bootstrap_rows
from ._fit import fit as fit
