"""Likelihoods ``p(y | f)``: what the raw outputs ``f`` of a network say about the targets ``y``.

Every likelihood takes the outputs of one draw, ``(N, *event)``, and every method but
``check`` is a pure function that works under ``torch.func`` transforms: put a leading axis of
draws there with ``vmap``. Whatever is a number for the data is summed over rows, positions and
outputs, never averaged.

======================= ============================== ==================================
Likelihood              outputs                        targets
======================= ============================== ==================================
Categorical             logits, classes on one axis    integers, without the class axis
Bernoulli               logits of ``y = 1``            0 or 1, in the shape of the outputs
Normal                  means                          reals, in the shape of the outputs
HeteroscedasticNormal   means, then log variances      reals, half of the last axis
Poisson                 log rates                      counts, in the shape of the outputs
======================= ============================== ==================================

**Layout of second derivatives.** ``fisher`` and ``hessian`` have shape ``(N, *positions, C, C)``,
one block for each row and position. ``C`` is the length of the output axis: the class axis for
``Categorical``, the last axis for the others; outputs of shape ``(N,)`` are one output a row and
give ``(N, 1, 1)``. ``fisher_sqrt`` keeps the layout of the outputs instead, ``(K, *outputs.shape)``.
"""

from ._bernoulli import Bernoulli as Bernoulli
from ._categorical import Categorical as Categorical
from ._heteroscedastic import HeteroscedasticNormal as HeteroscedasticNormal
from ._likelihood import Likelihood as Likelihood
from ._normal import Normal as Normal
from ._poisson import Poisson as Poisson
