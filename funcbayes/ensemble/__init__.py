"""Deep ensembles: members trained at once, each as if it were alone.

Networks that start and shuffle at random end in different modes; the mixture of what they predict
is better calibrated than any of them (Lakshminarayanan et al. 2017, "Simple and scalable predictive
uncertainty estimation using deep ensembles", https://arxiv.org/abs/1612.01474). Members may also be
snapshots of one run, and be chosen among by how well they predict together.
"""

from ..training._several import member_seeds as member_seeds
from ._fit import fit as fit
from ._members import from_modules as from_modules, init as init
from ._selection import prune as prune, select as select
from ._snapshots import fit_snapshots as fit_snapshots
