"""Training of networks: one loop, for a single network and for many at once.

The objective of a network is its mean negative log joint density, over the ``N`` rows of the data,

    loss(theta) = mean over the batch's rows of -log p(y | f_theta(x)) + prior_precision / (2 N) |theta|^2,

that is, ``-log p(D, theta) / N`` up to a constant, with a prior ``N(0, 1 / prior_precision)`` on each
parameter: its minimum is the MAP estimate that ``laplace`` expects for the same ``prior_precision``.
"""

from ._batch import Batch as Batch, RaggedBatch as RaggedBatch
from ._data import Data as Data, open_data as open_data
from ._fit import check_model as check_model, fit as fit
from ._loop import minimize as minimize
from ._movers import Mover as Mover, Movers as Movers
from ._networks import Gradients as Gradients, Networks as Networks, one_by_one as one_by_one
from ._objective import MapObjective as MapObjective, Objective as Objective
from ._options import (
    Callback as Callback,
    Interval as Interval,
    MakeOptimizer as MakeOptimizer,
    MakeScheduler as MakeScheduler,
    Options as Options,
)
