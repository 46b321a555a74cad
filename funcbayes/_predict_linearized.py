"""``predict_linearized``: the predictive of the linearised model in closed form."""

import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ._checks import check_model, positive_int
from ._compiled import compiled, refuse_gradients
from ._functional import Model
from ._functorch import is_concrete
from ._linearized_prediction import Component, LinearizedPrediction, Link, check_link, seed_of
from ._output_covariance import Form, Jacobian, Terms, covariance_terms, gathered, jacobians
from ._random import Seed
from ._tree import Params, as_tree, merge, missing_path, named_leaves, num_rows, parameters_of, tensors
from .likelihoods import Categorical, Likelihood
from .likelihoods._checks import check_is_likelihood
from .posteriors import Dropout, Ensemble, Gaussian, Join, Mixture, Point, Posterior

_CALL = "predict_linearized"
# Covariances of so many outputs, and of so many bytes, are found at once, whether or not they are asked for.
_FEW, _COVARIANCE_BYTES = 128, 16 << 20
_MOST_BYTES = 8 << 30  # of covariances, unless the user gives more
_OUTPUTS = 64  # of whole positions, whose covariance is found at a time


def predict_linearized(
    fn: Model,
    params: Params,
    posterior: Posterior,
    x: Any,
    *,
    likelihood: Likelihood | None = None,
    link: Link = "probit",
    joint: bool = False,
    num_samples: int = 1000,
    seed: Seed | None = None,
    max_bytes: int | None = None,
    compile: bool = False,
) -> LinearizedPrediction:
    """Predict with the linearised model, in closed form: no draws.

    A Gaussian ``N(m, S)`` over parameters makes the outputs of ``f(m) + J (theta - m)`` a Gaussian, with mean
    ``f(m)`` and covariance ``J S J^T`` (MacKay 1992; Khan et al. 2019; Immer et al. 2021, "Improving
    predictions of Bayesian neural nets via local linearization", eq. 9). It is what ``predict`` converges to
    for a Gaussian that is ``linearized``, and works for every Gaussian: of a Laplace approximation, SWAG or
    variational inference. The Jacobian is not formed where the layers of the model do without.

    Args:
        fn: Pure model ``fn(params, x) -> outputs (N, ...)``; the outputs of a row must depend on that row
            alone.
        params: What the posterior does not cover; ``None`` if it covers everything.
        posterior: A Gaussian; a join of Gaussians and points; or a mixture of these, whose predictive is the
            mixture of theirs.
        x: Inputs, a tensor or any pytree of tensors, ``N`` rows.
        likelihood: What outputs say of ``y``. Without it mean and variance are those of the outputs; with
            ``Normal`` the variance has the noise in it.
        link: How a Gaussian over logits becomes probabilities, for ``Categorical`` and ``Bernoulli``:
            ``"probit"`` (MacKay 1992), ``"bridge"`` and ``"bridge_norm"`` (the Laplace bridge, and with
            normalisation; Hobbhahn et al. 2022), or ``"mc"``, Monte Carlo over logits.
        joint: Whether the covariance between rows is wanted, too: for ``joint_covariance`` and ``sample``.
        num_samples: For ``"mc"``: how many draws of the logits.
        seed: For ``"mc"``: draws are a function of it; ``None`` takes one number from torch's global state.
        max_bytes: As for :func:`funcbayes.curvature.ggn`: rows, and outputs where variances are enough, are
            seen so many at a time, unless ``joint``. Covariances may have as much, or 8 GiB.
        compile: As for :func:`predict`: one program for all calls with ``x`` of one shape, whose result is
            not differentiable in the covariance.

    Returns:
        The prediction, without a graph through the model; it is differentiable in the covariance.

    Raises:
        TypeError: If an argument is of the wrong kind, or the posterior is no Gaussian, nor made of such.
        ValueError: If ``link`` is none of these, rows of the outputs depend on other rows, leaves do not fit,
            or a compiled prediction is wanted with gradients.
        RuntimeError: If covariances are asked for that have more bytes than they may.

    Example:
        >>> import torch, funcbayes as fb
        >>> fn = lambda params, x: x @ params["w"]
        >>> q = fb.Gaussian({"w": torch.ones(2, 1)}, fb.covariances.Diagonal({"w": torch.full((2, 1), 0.5)}))
        >>> prediction = fb.predict_linearized(fn, None, q, torch.tensor([[1.0, 2.0]]))
        >>> prediction.output_mean, prediction.output_covariance  # 1 + 2, 0.5 (1 + 4)
        (tensor([[3.]]), tensor([[[2.5000]]]))
    """
    check_model(fn, _CALL)
    if not isinstance(posterior, Posterior):
        raise TypeError(
            f"`{_CALL}(fn, params, posterior, x)` should be given a posterior, got "
            f"{type(posterior).__name__}."
        )
    if likelihood is not None:
        check_is_likelihood(likelihood, f"{_CALL}(likelihood=...)")
    check_link(link, likelihood, _CALL)
    num_samples = positive_int(num_samples, f"{_CALL}(num_samples=...)")
    if max_bytes is not None:
        max_bytes = positive_int(max_bytes, f"{_CALL}(max_bytes=...)")
    params, x = as_tree(params), as_tree(x)
    program = None
    if compile:
        refuse_gradients((params, posterior, x), _CALL)
        program = type(likelihood), link
    weights, components = [], []
    for weight, gaussians, points in _components(posterior):
        run = _Linearized(fn, params, gaussians, points, x)
        weights.append(weight)
        wanted = wants_covariance(likelihood, link)
        components.append(
            run.component(joint=joint, wants_covariance=wanted, max_bytes=max_bytes, compile_as=program)
        )
    if likelihood is not None:
        likelihood.check(components[0].mean, None, call=f"{_CALL}(..., likelihood=...)")
    return LinearizedPrediction(
        components=tuple(components),
        weights=torch.stack(weights),
        likelihood=likelihood,
        link=link,
        num_samples=num_samples,
        seed=seed_of(likelihood, link, seed),
    )


def wants_covariance(likelihood: Likelihood | None, link: Link) -> Callable[[Tensor], bool]:
    """Whether the link needs the covariance of all outputs of a row, and not just of those of a position."""
    return lambda outputs: (
        isinstance(likelihood, Categorical) and link != "probit" and likelihood.num_positions(outputs) == 1
    )


def _components(posterior: Posterior) -> Iterator[tuple[Tensor, list[Gaussian], list[Params]]]:
    """Weights, Gaussians over different leaves, and values of others, for each component of a mixture."""
    if isinstance(posterior, Mixture):
        for weight, component in zip(posterior.probabilities(), posterior.components, strict=True):
            for inner, gaussians, points in _components(component):
                yield weight * inner.to(weight), gaussians, points
        return
    gaussians, points = [], []
    for part in posterior.parts if isinstance(posterior, Join) else (posterior,):
        if isinstance(part, Gaussian):
            gaussians.append(part)
        elif isinstance(part, Point):
            points.append(part.params)
        else:
            raise TypeError(
                f"`{_CALL}(fn, params, posterior, x)` should be given a Gaussian, a join of Gaussians and "
                f"points, or a mixture of such, got a {type(part).__name__}{_instead(part)}"
            )
    yield torch.ones((), dtype=torch.float64), gaussians, points


def _instead(part: Posterior) -> str:
    if isinstance(part, Dropout | Ensemble):
        return ", whose outputs are no Gaussian. Write `predict(fn, params, posterior, x)`."
    return ". Put mixtures outside of joins: `mixture(join(...), join(...))`."


@dataclass(frozen=True)
class _Linearized:
    """One Gaussian, or several over different leaves, pushed through a model."""

    fn: Model
    params: Params
    gaussians: list[Gaussian]
    points: list[Params]
    x: Any
    center: Params = field(init=False)

    def __post_init__(self) -> None:
        center = self.params
        for values in (*self.points, *(gaussian.mean for gaussian in self.gaussians)):
            if self.params is not None:
                _check_fit(values, self.params)
            center = merge(center, values)
        missing = missing_path(center)
        if center is None or missing is not None:
            raise ValueError(
                f"`{_CALL}(fn, params, posterior, x)` should find every leaf in the posterior or in "
                f"`params`; {missing!r} is in neither."
            )
        object.__setattr__(self, "center", center)

    def component(
        self,
        *,
        joint: bool,
        wants_covariance: Callable[[Tensor], bool],
        max_bytes: int | None,
        compile_as: Hashable = None,
    ) -> Component:
        """Mean and covariance of the outputs; ``compile_as`` tells programs for other forms of them apart."""
        program = None
        if compile_as is not None:
            key = "linearized", joint, max_bytes, compile_as
            given = self.params, self.gaussians, self.points, self.x

            def moments(given: Any) -> tuple[Tensor, Tensor, Form]:
                return _Linearized(self.fn, *given)._pushforward(joint, wants_covariance, max_bytes).moments()

            program = functools.partial(compiled, self.fn, key, moments, given)
        return self._pushforward(joint, wants_covariance, max_bytes).component(program)

    def _pushforward(
        self, joint: bool, wants_covariance: Callable[[Tensor], bool], max_bytes: int | None
    ) -> "Pushforward":
        return Pushforward(
            *(self.fn, self.center, self._names, self.x, self._terms),
            call=_CALL,
            joint=joint,
            wants_covariance=wants_covariance,
            max_bytes=max_bytes,
            covariances=[gaussian.covariance for gaussian in self.gaussians],
        )

    @property
    def _names(self) -> list[str]:
        return [name for gaussian in self.gaussians for name in parameters_of(gaussian.mean)]

    def _terms(self, jacobian: Jacobian, form: Form) -> Terms:
        for gaussian in self.gaussians:
            yield from covariance_terms(gaussian.covariance, jacobian, form)


@dataclass(frozen=True)
class Pushforward:
    """A Gaussian over some leaves, pushed through a model that is linearised in them.

    Attributes:
        fn: Pure model.
        center: Where it is linearised.
        names: The leaves.
        x: Inputs.
        terms: Of the covariance: see :func:`funcbayes._output_covariance.covariance_terms`.
        call: How the user called us, for messages.
        joint: Whether the covariance between rows is wanted.
        wants_covariance: Whether that of the outputs of a row is, given outputs; else, if it is large, it is
            found when it is asked for.
        max_bytes: Bytes that the gradients of the rows of one block may have.
        covariances: What else ``terms`` depends on, a tree.
    """

    fn: Model
    center: Params
    names: Sequence[str]
    x: Any
    terms: Callable[[Jacobian, Form], Terms]
    call: str
    joint: bool
    wants_covariance: Callable[[Tensor], bool]
    max_bytes: int | None = None
    covariances: Any = None

    def component(self, program: Callable[[], tuple[Tensor, Tensor, Form]] | None = None) -> Component:
        """Mean and covariance of the outputs; ``program`` gives what :meth:`moments` does."""
        given = (tensors(tree) for tree in (self.center, self.x, self.covariances))
        versions = [(leaf, leaf._version) for leaves in given for leaf in leaves if not leaf.is_inference()]

        def check_unchanged() -> None:
            if any(leaf._version != version for leaf, version in versions):
                raise RuntimeError(
                    "The covariance of the outputs is found when it is first asked for, and a tensor that "
                    f"`{self.call}` was given has been changed in place since. Ask for it before, or give "
                    "copies."
                )

        def later() -> Tensor:
            check_unchanged()
            return replace(self, wants_covariance=lambda _: True).moments()[1]

        def of_positions(axis: int) -> Tensor:
            check_unchanged()
            return torch.cat([_of_positions(jacobian, self.terms, axis) for jacobian in self._jacobians()])

        mean, found, form = self.moments() if program is None else program()
        if is_concrete(found) and bool(mean.isfinite().all()) and not bool(found.isfinite().all()):
            raise RuntimeError(
                f"The covariance of the outputs in `{self.call}` is not finite, though the outputs are: the "
                "model has a derivative that is not, or variances are too large. Look for roots and "
                "quotients at 0; float64 may help."
            )
        if form == "variance":
            return Component(mean, found, later, None, of_positions if self.names and len(mean) else None)
        covariance = found
        if form == "joint":
            count, size = len(mean), mean.shape[1:].numel()
            blocks = found.unflatten(0, (count, size)).unflatten(-1, (count, size))
            covariance = blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)
        return Component(
            *(mean, covariance.diagonal(dim1=-2, dim2=-1), lambda: covariance),
            found if form == "joint" else None,
        )

    def moments(self) -> tuple[Tensor, Tensor, Form]:
        """Mean of the outputs, and their covariance in the form that is wanted."""
        if not self.names or num_rows(self.x) == 0:  # nothing is uncertain
            with torch.no_grad():
                mean = self.fn(self.center, self.x)
            form = self._form_of(mean)
            _check_size(len(mean), mean, form, self.call, self.max_bytes)
            return mean, gathered(iter(()), mean.reshape(len(mean), mean.shape[1:].numel()), form), form
        means, found, form = [], [], None
        for jacobian in self._jacobians():
            outputs = jacobian.block.outputs[0]
            if form is None:
                form = self._form_of(outputs)
                _check_size(num_rows(self.x) or 0, outputs, form, self.call, self.max_bytes)
            means.append(outputs)
            found.append(gathered(self.terms(jacobian, form), outputs.reshape(len(outputs), -1), form))
        assert form is not None
        return torch.cat(means), found[0] if len(found) == 1 else torch.cat(found), form

    def _jacobians(self) -> Iterator[Jacobian]:
        return jacobians(
            *(self.fn, self.center, self.names, self.x),
            call=self.call,
            whole=self.joint,
            max_bytes=self.max_bytes,
        )

    def _form_of(self, outputs: Tensor) -> Form:
        if self.joint:
            return "joint"
        size = outputs.shape[1:].numel()
        is_small = size <= _FEW and (num_rows(self.x) or 0) * size**2 * outputs.itemsize <= _COVARIANCE_BYTES
        return "covariance" if is_small or self.wants_covariance(outputs) else "variance"


def _of_positions(jacobian: Jacobian, terms: Callable[[Jacobian, Form], Terms], axis: int) -> Tensor:
    """Covariances of the outputs along an axis, by position: ``(N, *positions, C, C)``."""
    outputs = jacobian.block.outputs[0]
    flat = outputs.flatten(1)
    numbers = torch.arange(flat.shape[1]).reshape(outputs.shape[1:]).movedim(axis - 1, -1)
    size = max(min(jacobian.block.num_columns, _OUTPUTS) // max(numbers.shape[-1], 1), 1)
    found = []
    for some in numbers.flatten(0, -2).split(size):
        covered = some.flatten().tolist()
        whole = gathered(
            terms(replace(jacobian, covered=covered), "covariance"), flat[:, covered], "covariance"
        )
        apart = whole.unflatten(2, some.shape).unflatten(1, some.shape)  # (N, p, C, p, C)
        found.append(apart.diagonal(dim1=1, dim2=3).movedim(-1, 1))
    return torch.cat(found, 1).unflatten(1, numbers.shape[:-1])


def _check_size(count: int, outputs: Tensor, form: Form, call: str, max_bytes: int | None) -> None:
    """Refuse covariances that no memory holds, before work is spent on them."""
    size = outputs.shape[1:].numel()
    nbytes = outputs.itemsize * size**2 * (count**2 if form == "joint" else count)
    if form == "variance" or nbytes <= max(_MOST_BYTES, max_bytes or 0):
        return
    what = "all outputs" if form == "joint" else "the outputs of each row"
    raise RuntimeError(
        f"`{call}` would hold the covariance of {what}, {nbytes / 1e9:,.1f} GB for {count} rows of {size:,} "
        "outputs. Ask for `output_variance`, of a call without `joint`, which needs none of it; give fewer "
        f"rows; or allow so much by `max_bytes={nbytes}`."
    )


def _check_fit(values: Params, params: Params) -> None:
    there = named_leaves(params)
    for name, leaf in parameters_of(values).items():
        if name not in there:
            raise ValueError(
                f"`{_CALL}(fn, params, posterior, x)` should have a posterior over leaves of `params`; it "
                f"covers {name!r}, which is not there. If it covers everything, pass `params=None`."
            )
        if there[name].shape != leaf.shape:
            raise ValueError(
                f"`{_CALL}(fn, params, posterior, x)` should have a posterior with leaves like `params`; "
                f"{name!r} has shape {tuple(leaf.shape)}, and {tuple(there[name].shape)} in `params`."
            )
