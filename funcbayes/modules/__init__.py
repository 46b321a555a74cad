"""Methods as ``nn.Module`` classes, for code that is written around modules.

They hold modules and call the functions of the package: a class is a face, and the method is in the room of
its name. All of them predict in the same way: ``predict(x)`` gives the mean and the variance over draws.
Where a network ends in class logits these are of class probabilities. Whether it does is told by the argument
``likelihood``: ``"classification"`` (one column is the logit of the second of two classes), ``"regression"``,
one of :mod:`funcbayes.likelihoods`, or ``None`` for this rule: outputs of two axes with more than one
column are class logits, and all others are values. Predictions follow parameters and buffers of the modules
that are held; anything else of a module is as it was when the face was made.
"""

from ._deep_ensemble import DeepEnsemble as DeepEnsemble
from ._gaussian_linear import GaussianLinear as GaussianLinear
from ._laplace import LaplaceApproximation as LaplaceApproximation
from ._mc_dropout import MCDropout as MCDropout
from ._swag import SWAG as SWAG
from ._variational import VariationalBayesNN as VariationalBayesNN
