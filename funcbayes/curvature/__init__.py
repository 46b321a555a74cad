"""Second derivatives of the log likelihood in the parameters, by structure, and products with them."""

from ._curvature import (
    empirical_fisher as empirical_fisher,
    fisher as fisher,
    ggn as ggn,
    hessian as hessian,
)
from ._products import ggn_matvec as ggn_matvec, hvp as hvp
from ._structures import (
    Curvature as Curvature,
    Diag as Diag,
    EigenKron as EigenKron,
    Full as Full,
    Kron as Kron,
    LowRank as LowRank,
)
