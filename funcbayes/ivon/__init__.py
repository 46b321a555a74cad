"""IVON: a Gaussian of independent parameters, moved by natural gradients at the cost of Adam.

The Improved Variational Online Newton method, Shen et al. (2024), "Variational learning is effective for
large deep networks", algorithm 1, https://arxiv.org/abs/2402.17641. With ``N`` rows, an effective number of
rows ``lambda`` (``ess``, by default ``N``) and ``delta = prior_precision / N``, the Gaussian is

    q = N(m, sigma^2),    sigma^2 = 1 / (lambda (h + delta)),

where ``h`` stands for the diagonal of the Hessian of the mean loss, ``-log p(y|f)`` averaged over rows. A
step draws ``theta = m + sigma eps`` and takes the gradient ``ghat`` of the mean loss of a batch there:

    hhat = ghat (theta - m) / sigma^2
    g <- beta1 g + (1 - beta1) ghat
    h <- beta2 h + (1 - beta2) hhat + 1/2 (1 - beta2)^2 (h - hhat)^2 / (h + delta)
    m <- m - alpha (g / (1 - beta1^t) + delta m) / (h + delta)

With several draws ``ghat`` and ``hhat`` are their means. By Stein's identity (Price's theorem) ``hhat`` has
the expectation, over draws, of the diagonal of the Hessian, so that no second derivatives are needed.

The steps descend on ``lambda E_q[mean loss] + KL(q || N(0, N / (lambda prior_precision)))``. With ``lambda =
N`` this is the negative ELBO for a prior of precision ``prior_precision``; otherwise that of the posterior,
prior included, to the power ``lambda / N``, as :func:`funcbayes.temper` means it: of temperature ``N /
lambda``.

:func:`init`, :func:`update` and :func:`posterior` are pure functions; :func:`fit` is a loop of updates. An
update is :func:`draws`, gradients at them, and :func:`step`, for whoever finds gradients otherwise.
"""

from ._fit import fit as fit
from ._posterior import posterior as posterior
from ._schedules import cosine as cosine
from ._state import IVONState as IVONState, init as init
from ._step import draws as draws, step as step
from ._update import update as update
