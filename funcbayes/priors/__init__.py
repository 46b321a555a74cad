"""Priors: log densities over trees of parameters, **summed** over all of them.

============ ============================================ =============================
Prior        one parameter                                ``E log p`` under a Gaussian
============ ============================================ =============================
Normal       ``N(mean, 1 / precision)``                   closed form
Laplace      ``exp(-|theta - location| / scale)``         closed form
ScaleMixture two normals around zero, wide and narrow     none
Horseshoe    a normal around zero, half-Cauchy deviation  none
============ ============================================ =============================

All of these are independent between parameters. A :class:`funcbayes.Gaussian` of any structure is a prior,
too. In files the classes are called ``NormalPrior`` and so on, as likelihoods have some of the names.
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
