"""``predict``: a model, a posterior and inputs in, a prediction out."""

import functools
import inspect
import operator
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ._checks import check_model, positive_int
from ._compiled import refuse_gradients, wants_grad
from ._engine import evaluate, repeated, signature
from ._functional import Model
from ._functorch import has_other_modes
from ._linearize import Linearization
from ._marginal import check_marginal, marginal_model
from ._prediction import Prediction, concatenate_rows
from ._random import Seed, resolve_seed
from ._statistics import Streamed, Summary
from ._tree import (
    Fixed,
    Params,
    as_tree,
    concatenate,
    device_of,
    map_leaves,
    map_named,
    merge,
    missing_path,
    named_leaves,
    parameters_of,
)
from .likelihoods import Likelihood
from .likelihoods._checks import check_is_likelihood
from .posteriors import Draw, Dropout, Posterior, to

DEFAULT_NUM_SAMPLES = 32


def predict(
    fn: Model,
    params: Params,
    posterior: Posterior,
    x: Any,
    *,
    likelihood: Likelihood | None = None,
    num_samples: int | None = None,
    seed: Seed | None = None,
    chunk_size: int | None = None,
    dtype: torch.dtype | None = None,
    keep_samples: bool = True,
    targets: Tensor | None = None,
    compile: bool = False,
    marginal: bool = False,
) -> Prediction:
    """Evaluate a model at draws of a posterior, together.

    That is in one vectorised pass, in several of as many draws as are fastest, or in a loop where nothing is
    faster; so it is learned from the time that the first calls with a model and shape of ``x`` take. Passes
    that take little time, and have no given ``chunk_size``, are recorded: what the model did with its tensors
    is done again without its Python code, for as long as that code, and all that it takes from elsewhere, is
    as it was. A model of which that cannot be told is called every time.

    Parameters that the posterior does not cover are taken from ``params`` and get no draw axis, so in a pass
    the part of the model before the first covered layer is evaluated once, not once a draw.

    Args:
        fn: Pure model ``fn(params, x) -> outputs (N, ...)``, from ``make_functional`` or any function.
        params: Parameters of the model; ``None`` if the posterior covers them all.
        posterior: Any posterior.
        x: Inputs, a tensor or any pytree of tensors, ``N`` rows.
        likelihood: What outputs say of ``y``. Without it the statistics are those of the outputs.
        num_samples: Number of draws ``S``, exactly. ``None`` means 32, and for an ``Ensemble`` each
            member once, with its weight, and for a ``Point`` its one value.
        seed: Draws are a function of it. ``None`` takes one number from torch's global state.
        chunk_size: Draws evaluated at a time. ``None`` lets the engine choose by memory and measured
            time, which changes results by rounding only. On a CPU several draws of a model from
            ``make_functional`` may then run in threads at once, each with a copy of the module: what copies
            share, as hooks and globals, should be safe among threads. With a given size, or after
            ``torch.set_num_threads(1)``, there are no threads. Images may come to the model in
            ``torch.channels_last``, if what it computes was seen not to depend on it; with a given size of
            one they come as they are.
        dtype: Evaluate in this floating-point dtype: parameters, draws and inputs are converted to it. (Under
            ``torch.autocast`` they stay as they are, and each operation of the model has the precision that
            autocast gives it.)
        keep_samples: Keep the outputs of every draw. Otherwise moments, class log-probabilities and
            entropies are accumulated, in memory that does not grow with ``S``
            beyond that of one chunk of draws.
        targets: Targets ``y``, for ``prediction.log_prob()``; needed beforehand only where samples are
            not kept.
        compile: Evaluate by a program that ``torch.compile`` makes of one chunk of draws, once for each shape
            of ``x`` and number of draws, at the first call with it: for many batches of one shape, or a
            server. Results change by rounding only. What ``fn`` refers to beside its arguments stays as it
            was at the first call. Not where gradients are wanted. In a function that is compiled as a whole,
            ``torch.compiler.disable(fb.predict)`` takes the place of this one.
        marginal: Draw what linear layers give, a number a unit, in the place of their weights, where a row
            meets such a layer once. Each row has the same distribution, at a small part of the cost of
            drawing wide layers, but rows of one draw have no weights in common: not for ``samples`` as
            functions. Other leaves are drawn as ever. For a Gaussian with a ``Diagonal`` or ``Kronecker``
            covariance.

    Returns:
        The prediction. It is differentiable in ``params``, ``posterior`` and ``x`` where gradients are
        enabled and one of these requires them; but not in weights of mixtures and ensembles by which draws
        are allocated.

    Raises:
        TypeError: If an argument is of the wrong kind, or the model does not return one tensor.
        ValueError: If a number is out of range, or leaves of the posterior do not fit ``params``.

    Example:
        >>> import torch, funcbayes as fb
        >>> fn, params = fb.make_functional(torch.nn.Linear(3, 2))
        >>> ensemble = fb.Ensemble({k: torch.stack([v, 2 * v]) for k, v in params.items()})
        >>> prediction = fb.predict(fn, params, ensemble, torch.ones(5, 3))
        >>> prediction.samples.shape, prediction.mean.shape
        (torch.Size([2, 5, 2]), torch.Size([5, 2]))
    """
    return _predict(
        fn,
        params,
        posterior,
        x,
        likelihood=likelihood,
        num_samples=num_samples,
        seed=seed,
        chunk_size=chunk_size,
        dtype=dtype,
        keep_samples=keep_samples,
        targets=targets,
        compile=compile,
        marginal=marginal,
    )


def predictor(
    fn: Model, params: Params, posterior: Posterior, likelihood: Likelihood | None = None, **options: Any
) -> Callable[[Any], Prediction]:
    """Fix everything but the inputs: ``predictor(...)(x)`` is ``predict(..., x)``.

    Args:
        fn: Pure model.
        params: Its parameters.
        posterior: Any posterior.
        likelihood: What outputs say of ``y``.
        **options: Further keyword arguments of :func:`predict`. Without a ``seed`` one is drawn now, so
            that every call uses the same draws.

    Returns:
        A function of ``x``.

    Raises:
        TypeError: If an option is not one of :func:`predict`'s.
    """
    known = set(inspect.signature(predict).parameters) - {"fn", "params", "posterior", "x", "likelihood"}
    unknown = sorted(set(options) - known)
    if unknown:
        raise TypeError(f"`predictor(...)` has no option {unknown[0]!r}; it has {', '.join(sorted(known))}.")
    _check_arguments(fn, posterior, likelihood, options.get("num_samples"), options.get("chunk_size"))
    options = {**options, "seed": resolve_seed(options.get("seed"))}
    return lambda x: predict(fn, params, posterior, x, likelihood=likelihood, **options)


def predict_batches(
    fn: Model,
    params: Params,
    posterior: Posterior,
    batches: Iterable[Any],
    *,
    likelihood: Likelihood | None = None,
    num_samples: int | None = None,
    seed: Seed | None = None,
    chunk_size: int | None = None,
    dtype: torch.dtype | None = None,
    keep_samples: bool = True,
    labelled: bool = True,
    progress: bool = False,
    compile: bool = False,
    marginal: bool = False,
) -> Prediction:
    """Predict over a ``DataLoader``, with the same draws for all batches.

    Args:
        fn: Pure model.
        params: Its parameters.
        posterior: Any posterior.
        batches: Iterable of ``(x, y)``, or of ``x`` if not ``labelled``. The dropout masks of a batch
            depend on the number of its first row, so batches do not repeat each other's.
        likelihood: What outputs say of ``y``; if it is given, labels become the prediction's targets.
        num_samples: As for :func:`predict`.
        seed: As for :func:`predict`.
        chunk_size: As for :func:`predict`.
        dtype: As for :func:`predict`.
        keep_samples: As for :func:`predict`.
        labelled: Whether batches are pairs ``(x, y)``.
        progress: Show a progress bar.
        compile: As for :func:`predict`: one program for batches of one shape.
        marginal: As for :func:`predict`.

    Returns:
        One prediction for all rows, in the order of the batches.

    Raises:
        ValueError: If there are no batches, or a batch is not a pair.
    """
    _check_arguments(fn, posterior, likelihood, num_samples, chunk_size)
    seed, first_row, predictions = resolve_seed(seed), 0, []
    device = device_of(params, posterior)
    for batch in _with_progress(batches, progress):
        if labelled and not (isinstance(batch, tuple | list) and len(batch) == 2):
            raise ValueError(
                "`predict_batches(batches=...)` should yield pairs (x, y), got "
                f"{type(batch).__name__}. For batches without labels: `labelled=False`."
            )
        x, y = batch if labelled else (_only(batch), None)
        x = to(x, device=device) if device is not None else x
        prediction = _predict(
            fn,
            params,
            posterior,
            x,
            likelihood=likelihood,
            num_samples=num_samples,
            seed=seed,
            chunk_size=chunk_size,
            dtype=dtype,
            keep_samples=keep_samples,
            targets=None if likelihood is None else y,
            compile=compile,
            marginal=marginal,
            first_row=first_row,
        )
        predictions.append(prediction)
        first_row += prediction.num_rows
    if not predictions:
        raise ValueError("`predict_batches(batches=...)` should yield at least one batch, got none.")
    return concatenate_rows(predictions)


def _only(batch: Any) -> Any:
    """What a loader of inputs alone wraps into a sequence of one."""
    return batch[0] if isinstance(batch, list | tuple) and len(batch) == 1 else batch


def _with_progress(batches: Iterable[Any], progress: bool) -> Iterable[Any]:
    if not progress:
        return batches
    from tqdm.auto import tqdm  # here, because a bar costs as much to import as everything else

    return tqdm(batches, desc="predict", unit="batch")


def _predict(
    fn: Model,
    params: Params,
    posterior: Posterior,
    x: Any,
    *,
    likelihood: Likelihood | None,
    num_samples: int | None,
    seed: Seed | None,
    chunk_size: int | None,
    dtype: torch.dtype | None,
    keep_samples: bool,
    targets: Tensor | None,
    compile: bool,
    marginal: bool,
    first_row: int = 0,
) -> Prediction:
    _check_arguments(fn, posterior, likelihood, num_samples, chunk_size)
    if targets is not None and likelihood is None:
        raise ValueError("`predict(targets=...)` needs a likelihood: `predict(..., likelihood=...)`.")
    atoms = posterior.atoms() if num_samples is None else None
    is_plain = chunk_size is None and dtype is None and not (compile or marginal)
    # Whose draws are these and no others, which a call may have had before.
    owner = posterior if is_plain and atoms is not None and len(atoms) == 1 else None
    may_repeat = is_plain and type(x) is Tensor and not has_other_modes()
    if may_repeat and (likelihood is None or not wants_grad(likelihood)):
        if isinstance(posterior, Dropout):
            seed = resolve_seed(seed)
        draws, weights = _at_hand(posterior, atoms, num_samples, seed) or (None, None)
        outputs = None if draws is None else repeated(fn, params, draws, x, owner, first_row)
        if weights is not None and outputs is not None:
            collect = _Collector(weights, likelihood, targets, keep_samples, is_in_order=True)
            collect.add(None, outputs)
            return collect.prediction()
    params, x = as_tree(params), as_tree(x)
    if dtype is not None:
        if not dtype.is_floating_point:
            raise ValueError(f"`predict(dtype=...)` should be a floating-point dtype, got {dtype}.")
        params, x = to(params, dtype=dtype), to(x, dtype=dtype)
    is_settled = atoms is not None and seed is None  # only noise of the model's own wants a seed
    key = 0 if is_settled else resolve_seed(seed)
    weights, groups = _plan(posterior, atoms, num_samples, key)
    collect = _Collector(
        weights, likelihood, targets, keep_samples, is_in_order=atoms is not None or len(groups) == 1
    )
    gradients = wants_grad((params, posterior, x, likelihood))
    if marginal:
        check_marginal(posterior)
    if compile:
        refuse_gradients((params, posterior, x, likelihood), "predict")
    with nullcontext() if gradients else torch.no_grad():
        for number, (positions, make_draws) in enumerate(groups):
            model, given, draws = fn, params, _fitting(make_draws, params, dtype)
            if marginal:
                draws(slice(0, 0))  # for its checks
                model, given, by_number = marginal_model(
                    fn, params, to(posterior, dtype=dtype), x, key, first_row
                )
                draws = _by_number(by_number, positions)
            structure = (number, marginal, *signature(posterior), dtype)
            for part, outputs in evaluate(
                model,
                given,
                x,
                draws,
                positions,
                chunk_size,
                key=structure,
                noise=None if is_settled else key,
                first_row=first_row,
                dtype=dtype,
                compile=compile,
                model=fn,
                owner=owner,
            ):
                collect.add(positions[part], outputs)
        return collect.prediction()


def _check_arguments(
    fn: Any, posterior: Any, likelihood: Any, num_samples: Any, chunk_size: int | None
) -> None:
    check_model(fn, "predict")
    if not isinstance(posterior, Posterior):
        raise TypeError(
            "`predict(fn, params, posterior, x)` should be given a posterior, got "
            f"{type(posterior).__name__}. For one value of the parameters use `Point(params)`, for stacked "
            "ones `Ensemble(members)`."
        )
    if likelihood is not None:
        check_is_likelihood(likelihood, "predict(likelihood=...)")
    if num_samples is not None:
        positive_int(num_samples, "predict(num_samples=...)")
    if chunk_size is not None:
        positive_int(chunk_size, "predict(chunk_size=...)")


Group = tuple[Tensor, Callable[[slice], Draw]]


def _at_hand(
    posterior: Posterior, atoms: list[tuple[Draw, Tensor]] | None, num_samples: int | None, seed: Seed | None
) -> tuple[Draw, Tensor] | None:
    """All draws and their weights, where these are there or little has to be done to make them."""
    if atoms is not None:
        return atoms[0] if len(atoms) == 1 else None
    if seed is None or not isinstance(posterior, Dropout):
        return None
    weights, numbers = _all_alike(num_samples)
    return posterior.draws(numbers, seed), weights


def _all_alike(num_samples: int | None) -> tuple[Tensor, Tensor]:
    """Weights of draws that count as much as each other, and their numbers."""
    count = DEFAULT_NUM_SAMPLES if num_samples is None else operator.index(num_samples)
    return torch.full((count,), 1 / count, dtype=torch.float64), torch.arange(count)


def _plan(
    posterior: Posterior, atoms: list[tuple[Draw, Tensor]] | None, num_samples: int | None, seed: Seed
) -> tuple[Tensor, list[Group]]:
    """Weights of the draws, and for each group of one structure its positions and how to make a part."""
    if atoms is not None:
        weights = concatenate([weights for _, weights in atoms])
        positions = torch.arange(len(weights))
        if len(atoms) == 1:
            return weights, [(positions, functools.partial(_take, atoms[0][0], len(positions)))]
        groups = positions.split([len(weights) for _, weights in atoms])
        return weights, [
            (at, functools.partial(_take, draw, len(at))) for at, (draw, _) in zip(groups, atoms, strict=True)
        ]
    weights, indices = _all_alike(num_samples)
    structures = {} if len(posterior.forms()) == 1 else posterior.structures(indices, seed)
    in_order = structures.values() if len(structures) > 1 else [indices]

    def make(numbers: Tensor) -> Draw:
        return posterior.draws(numbers, seed)

    return weights, [(numbers, _by_number(make, numbers)) for numbers in in_order]


def _by_number(draws: Callable[[Tensor], Draw], numbers: Tensor) -> Callable[[slice], Draw]:
    return lambda part: draws(numbers[part])


def _take(draw: Draw, count: int, part: slice) -> Draw:
    # A slice is a view, where indexing would copy the members.
    return draw if part == slice(0, count) else map_leaves(lambda leaf: leaf[part], draw)


def _fitting(
    make_draws: Callable[[slice], Draw], params: Params, dtype: torch.dtype | None
) -> Callable[[slice], Draw]:
    """``make_draws`` in ``dtype``, its first draws checked against ``params``."""
    is_checked = False

    def make(part: slice) -> Draw:
        nonlocal is_checked
        draw = make_draws(part)
        if not is_checked:
            if params is not None:
                _check_fit(draw.leaves, params)
            _check_complete(draw.leaves, params)
            is_checked = True
        return draw if dtype is None else _converted(draw, dtype)

    return make


def _converted(draw: Draw, dtype: torch.dtype) -> Draw:
    """``draw`` in ``dtype``, but for leaves whose deviations from a center are still to be found."""
    later = {name for e in draw.effects if isinstance(e, Linearization) for name in parameters_of(e.center)}
    leaves = map_named(lambda name, leaf: leaf if name in later else to(leaf, dtype=dtype), draw.leaves)
    return Draw(leaves, draw.effects)


def _check_fit(leaves: Params, params: Params) -> None:
    base = named_leaves(params)
    for name, leaf in named_leaves(leaves).items():
        if isinstance(leaf, Fixed):
            continue
        if name not in base:
            raise ValueError(
                "`predict(fn, params, posterior, x)` should have a posterior over leaves of `params`; it "
                f"covers {name!r}, and `params` has {_some(base)}. If it covers everything, pass "
                "`params=None`."
            )
        here, there = tuple(leaf.shape[1:]), tuple(base[name].shape)
        if here != there:
            raise ValueError(
                f"`predict(fn, params, posterior, x)` should have draws shaped like `params`; {name!r} has "
                f"draws of shape {here}, and {there} in `params`."
            )


def _check_complete(leaves: Params, params: Params) -> None:
    missing = missing_path(merge(params, leaves))
    if missing is not None:
        raise ValueError(
            f"`predict(fn, params, posterior, x)` should find every leaf in the posterior or in `params`; "
            f"{missing!r} is in neither."
        )


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")


class _Collector:
    """Puts the outputs of chunks where they belong, or feeds them to the streamed statistics."""

    def __init__(
        self,
        weights: Tensor,
        likelihood: Likelihood | None,
        targets: Tensor | None,
        keep_samples: bool,
        *,
        is_in_order: bool,
    ) -> None:
        self.weights, self.likelihood, self.targets = weights, likelihood, targets
        self.streamed = None if keep_samples else Streamed(Summary(likelihood, targets))
        self.parts: list[Tensor] = []
        self.positions: list[Tensor | None] = []
        self.dtype = torch.float32
        self.is_first, self.is_in_order = True, is_in_order

    def add(self, positions: Tensor | None, outputs: Tensor) -> None:
        """Add the outputs of draws at some positions, or of all of them."""
        if self.is_first:
            self.is_first, self.dtype = False, outputs.dtype
            if outputs.device.type != "mps":  # which has no float64
                self.weights = self.weights.to(device=outputs.device)
            if self.likelihood is not None:
                self.likelihood.check(outputs[0], self.targets, call="predict(..., likelihood=...)")
        if self.streamed is not None:
            self.streamed.update(outputs, self.weights if positions is None else self.weights[positions])
        else:
            self.parts.append(outputs)
            self.positions.append(positions)

    def prediction(self) -> Prediction:
        samples = None
        if self.streamed is None:
            samples = concatenate(self.parts)
            if not self.is_in_order:
                samples = samples[torch.cat([at for at in self.positions if at is not None]).argsort()]
        return Prediction(
            weights=self.weights,
            likelihood=self.likelihood,
            targets=self.targets,
            samples=samples,
            streamed=None if self.streamed is None else self.streamed.results(),
            dtype=self.dtype,
        )
