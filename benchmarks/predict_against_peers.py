"""`predict` is faster than most ways to the predictive of a Gaussian or of dropout, the drawing included.

Outputs at 32 draws of a Gaussian with a diagonal covariance, the drawing included, against each way of doing
it: a plain loop with `torch.func.functional_call`; and the libraries that are installed, each as its
documentation has it: `posteriors`, whose samples go through `vmap`; the sampled predictive of
`laplace-torch`; and `bayesian-torch`, whose layers draw in every forward pass. One case is of the same draws
without their weights, `marginal=True`, where the plain loop is what it is compared with.

The claim: faster in the median, and never slower than a loop or a library that loops. `posteriors` is faster
for the smallest network: its normals come from one call of the generator for all draws. Here a draw is the
same however many are asked for, which takes a call for each leaf and draw.

Draws of dropout are against a plain loop over the module in training mode; and against all of them as further
rows of one call of it, which is what torch-uncertainty does, by its own class where that is installed. Those
masks are not a function of a draw's number, as they are here; nothing is claimed of them. (Its ensembles, and
its draws of Bayesian layers, are the loops that `predict_against_loop` measures.)

Beforehand the means over draws are compared, which agree within their standard errors, and the variances.
"""

import copy
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

import funcbayes as fb

from . import _laplace_torch
from ._measure import How, Result, compare, median_of
from ._models import MODELS, around, inputs
from ._peers import installed, with_gaussian_layers

DRAWS, STD, ROWS = 32, 0.01, (1, 32)
NETWORKS = ("mlp-small", "mlp", "lenet")
Predictive = Callable[[], Tensor]  # (S, N, C)


def run(how: How) -> Iterator[Result]:
    found = []
    for name in how.some(NETWORKS, 2):
        for rows in how.some(ROWS):
            torch.manual_seed(0)
            net, x = MODELS[name]().eval(), inputs(name, rows)  # others evaluate it in the mode it is in
            fn, params = fb.make_functional(net)
            gaussian = around(params, STD**2)

            def ours(fn=fn, gaussian=gaussian, x=x, *, marginal: bool = False) -> Tensor:  # noqa: ANN001
                options = {"num_samples": DRAWS, "seed": 0, "marginal": marginal}
                return fb.predict(fn, None, gaussian, x, **options).samples

            others = _others(net, x)
            for who, theirs in others.items():
                _assert_they_agree(ours(), theirs())
                case = f"{name}, {rows} rows, against {who}"
                loops = who != "posteriors"
                claim = {"at_least": 0.95 if loops else None, "of_interval": loops}
                found.append(compare(case, theirs, ours, repeats=how.repeats, **claim))
                yield found[-1]
            if name == "mlp":
                case = f"{name}, {rows} rows, marginal, against loop"
                yield compare(case, others["loop"], lambda f=ours: f(marginal=True), repeats=how.repeats)
    yield median_of("median of all", found, None if how.is_quick else 1.0)
    yield from _of_dropout(how)


def _of_dropout(how: How) -> Iterator[Result]:
    for name in how.some(NETWORKS, 2):
        for rows in how.some(ROWS):
            torch.manual_seed(0)
            net, x = MODELS[name](rate=0.1), inputs(name, rows)
            fn, params = fb.make_functional(net)

            def ours(fn=fn, params=params, x=x) -> Tensor:  # noqa: ANN001
                return fb.predict(fn, params, fb.Dropout(), x, num_samples=DRAWS, seed=0).samples

            for who, theirs in _ways_to_drop(net.train(), x).items():
                _assert_they_agree(ours(), theirs())
                claim = {"at_least": 0.95, "of_interval": True} if who == "loop" else {}
                case = f"dropout, {name}, {rows} rows, against {who}"
                yield compare(case, theirs, ours, repeats=how.repeats, **claim)


def _ways_to_drop(net: nn.Module, x: Tensor) -> dict[str, Predictive]:
    """By a module in training mode: a loop, and draws as further rows."""

    @torch.no_grad()
    def loop() -> Tensor:
        return torch.stack([net(x) for _ in range(DRAWS)])

    @torch.no_grad()
    def further_rows() -> Tensor:
        return net(x.repeat(DRAWS, *(1 for _ in x.shape[1:]))).unflatten(0, (DRAWS, -1))

    makers = {"torch-uncertainty": _torch_uncertainty}
    by_others = {who: make(net, x) for who, make in installed(makers).items()}
    return {"loop": loop, **(by_others or {"further rows": further_rows})}


def _torch_uncertainty(net: nn.Module, x: Tensor) -> Predictive:
    from torch_uncertainty.methods import mc_dropout

    model = mc_dropout(copy.deepcopy(net), DRAWS).eval()  # in which it draws, and leaves its dropout on

    @torch.no_grad()
    def run() -> Tensor:
        return model(x).unflatten(0, (DRAWS, -1))

    return run


def _assert_they_agree(ours: Tensor, theirs: Tensor) -> None:
    variance = (ours.var(0) + theirs.var(0)) / DRAWS
    off = (ours.mean(0) - theirs.mean(0)).abs() / variance.sqrt()
    assert off.max() < 7, f"means over draws differ by {off.max():.1f} standard errors"
    spread = float(ours.var(0).sum() / theirs.var(0).sum())
    assert 0.5 < spread < 2, f"the variances over draws differ by a factor of {spread:.2f}"


def _others(net: nn.Module, x: Tensor) -> dict[str, Predictive]:
    makers = {"posteriors": _posteriors, "laplace-torch": _sampled, "bayesian-torch": _bayesian_torch}
    return {"loop": _loop(net, x), **{who: make(net, x) for who, make in installed(makers).items()}}


def _loop(net: nn.Module, x: Tensor) -> Predictive:
    params = {name: p.detach() for name, p in net.named_parameters()}

    def one() -> Tensor:
        draw = {name: p + STD * torch.randn_like(p) for name, p in params.items()}
        return functional_call(net, draw, (x,))

    def run() -> Tensor:
        with torch.no_grad():
            return torch.stack([one() for _ in range(DRAWS)])

    return run


def _posteriors(net: nn.Module, x: Tensor) -> Predictive:
    from posteriors.vi import diag

    params = {name: p.detach() for name, p in net.named_parameters()}
    log_std = {name: torch.full_like(p, math.log(STD)) for name, p in params.items()}
    state = diag.VIDiagState(params, log_std, None)

    def run() -> Tensor:
        with torch.no_grad():
            draws = diag.sample(state, torch.Size([DRAWS]))
            return vmap(lambda draw: functional_call(net, draw, (x,)))(draws)

    return run


def _sampled(net: nn.Module, x: Tensor) -> Predictive:
    laplace = _laplace_torch.load()
    model = copy.deepcopy(net)
    with _laplace_torch.quiet():
        # A Gaussian without data, whose samples are outputs: all of its precision is that of the prior.
        la = laplace.Laplace(model, "regression", "all", "diag", prior_precision=STD**-2)
        la.mean = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
        la.H = torch.zeros_like(la.mean)

    def run() -> Tensor:
        with torch.no_grad():
            return la.predictive_samples(x, pred_type="nn", n_samples=DRAWS)

    return run


def _bayesian_torch(net: nn.Module, x: Tensor) -> Predictive:
    model = with_gaussian_layers(net, STD)

    def run() -> Tensor:
        with torch.no_grad():
            return torch.stack([model(x) for _ in range(DRAWS)])

    return run
