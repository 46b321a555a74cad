"""Priors: log densities over trees of parameters, summed over all of them.

All of these are independent between parameters. A :class:`funcbayes.Gaussian` of any structure is a prior,
too.
"""

from ._horseshoe import HorseshoePrior
from ._interface import Prior as Prior
from ._laplace import LaplacePrior
from ._normal import NormalPrior
from ._scale_mixture import ScaleMixturePrior

Horseshoe = HorseshoePrior
Laplace = LaplacePrior
Normal = NormalPrior
ScaleMixture = ScaleMixturePrior
