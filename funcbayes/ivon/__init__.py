"""IVON: variational inference at the cost of Adam, Shen et al. (2024).

A mean-field Gaussian is moved by natural gradients, whose curvature is estimated from the gradients
themselves. :func:`init`, :func:`update` and :func:`posterior` are pure functions; :func:`fit` is the loop.
"""

from ._fit import fit as fit
from ._state import IVONState as IVONState, draws as draws, init as init, posterior as posterior
from ._update import update as update
