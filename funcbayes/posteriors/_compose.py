"""Posteriors from posteriors: tempered, restricted to some leaves, reduced to finitely many draws."""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from .._checks import positive_int
from .._functorch import is_concrete
from .._linearize import Linearization
from .._random import Seed, resolve_seed
from .._tree import Params, Where, index, matcher, named_leaves, parameters_of, select
from ._dropout import Dropout
from ._ensemble import Ensemble
from ._gaussian import Gaussian
from ._interface import Draw, Posterior
from ._join import Join, join
from ._mixture import Mixture, mixture
from ._point import Point


def temper(posterior: Posterior, temperature: float | Tensor) -> Posterior:
    """Sharpen or widen a posterior: its density to the power ``1 / temperature``, normalised.

    All of the posterior is tempered; the ``temperature`` of a Laplace approximation is that of its
    likelihood only.

    Args:
        posterior: A Gaussian, whose covariance is multiplied with the temperature; a join of such;
            or a point, which stays as it is.
        temperature: Positive; below 1 for a cold posterior.

    Returns:
        A posterior of the same kind.

    Raises:
        TypeError: If the posterior has no density of which a power could be drawn from: mixtures,
            ensembles and dropout; or if the temperature is no number.
        ValueError: If the temperature is not positive and finite.

    Example:
        >>> import torch, funcbayes as fb
        >>> gaussian = fb.Gaussian({"w": torch.zeros(2)}, fb.covariances.Diagonal({"w": torch.ones(2)}))
        >>> fb.temper(gaussian, 0.25).variance["w"]
        tensor([0.2500, 0.2500])
    """
    _check_posterior(posterior, "temper(posterior, ...)")
    _check_temperature(temperature)
    if isinstance(posterior, Gaussian):
        return dataclasses.replace(posterior, covariance=posterior.covariance.scaled(temperature))
    if isinstance(posterior, Point):
        return posterior
    if isinstance(posterior, Join):
        return join(*(temper(part, temperature) for part in posterior.parts))
    raise TypeError(
        f"`temper(posterior, temperature)` should be given a Gaussian, got {type(posterior).__name__}, a "
        "power of which is of no family that can be drawn from. Temper Gaussians before mixing them."
    )


def _check_temperature(temperature: float | Tensor) -> None:
    is_number = isinstance(temperature, float | int) and not isinstance(temperature, bool)
    if not is_number and not (isinstance(temperature, Tensor) and not temperature.ndim):
        what = tuple(temperature.shape) if isinstance(temperature, Tensor) else type(temperature).__name__
        raise TypeError(f"`temper(posterior, temperature)` should have one number, got {what}.")
    if isinstance(temperature, Tensor) and not is_concrete(temperature):
        return
    value = float(temperature.detach() if isinstance(temperature, Tensor) else temperature)
    if not 0 < value < math.inf:
        raise ValueError(
            "`temper(posterior, temperature)` should have a temperature that is positive and finite, got "
            f"{value}."
        )


def antithetic(posterior: Posterior) -> Posterior:
    """Take draws in pairs on opposite sides of the mean, which needs half of the random numbers.

    Each draw is one of the posterior, and the two of a pair are correlated as much as can be: an average over
    an even number of draws has no error from the part of the model that is odd around the mean, the linear
    one above all (Hammersley & Morton 1956). What is even around it, such as the variance of predictions, is
    only as precise as half as many independent draws make it. The variance of ``S`` draws, whose
    squares are divided by ``S - 1`` as those of independent ones are, is on average ``S / (S - 1)`` times
    that of a linear model, for the mean of such draws is exact.

    Args:
        posterior: A Gaussian, or a mixture or join, whose Gaussians have such draws then.

    Returns:
        A posterior of the same kind.

    Raises:
        TypeError: If there is no Gaussian in the posterior.

    Example:
        >>> import torch, funcbayes as fb
        >>> gaussian = fb.Gaussian({"w": torch.zeros(2)}, fb.covariances.Diagonal({"w": torch.ones(2)}))
        >>> fb.antithetic(gaussian).sample(4, seed=0)["w"].sum(0)
        tensor([0., 0.])
    """
    return _with_gaussians(
        posterior, lambda gaussian: dataclasses.replace(gaussian, antithetic=True), "antithetic(posterior)"
    )


def orthogonal(posterior: Posterior) -> Posterior:
    """Take draws whose deviations from the mean are orthogonal, in groups of 32 (Yu et al. 2016, section 3).

    Each draw is one of the posterior. Those of a group stand at right angles to each other, as the inverse
    covariance measures angles, so that they do not fall close together by chance. That matters where there
    are few dimensions. Of ``P`` parameters a group has ``P`` draws if that is less. They average a function
    that is quadratic around the mean, and zero on average over all directions, with ``(P + 2) / 2`` times
    less variance than independent ones; how far draws are from the mean is not averaged better, nor is what
    is odd around it: for that ``antithetic(orthogonal(posterior))``.

    It is for posteriors of at most some hundred parameters. Of more, independent draws are nearly orthogonal
    anyway, and a draw takes the time and the memory of its whole group, with a product with the inverse
    covariance in double precision, anew for every chunk of draws; :func:`to_ensemble` makes them once.

    Args:
        posterior: A Gaussian, or a mixture or join, whose Gaussians have such draws then.

    Returns:
        A posterior of the same kind.

    Raises:
        TypeError: If there is no Gaussian in the posterior.
        ValueError: If a covariance has no inverse.

    Example:
        >>> import torch, funcbayes as fb
        >>> gaussian = fb.Gaussian({"w": torch.zeros(2)}, fb.covariances.Diagonal({"w": torch.ones(2)}))
        >>> one, two = fb.orthogonal(gaussian).sample(2, seed=0)["w"]
        >>> bool((one @ two).abs() < 1e-5)
        True
    """

    def changed(gaussian: Gaussian) -> Gaussian:
        if reason := gaussian.covariance.singular():
            raise ValueError(
                f"`orthogonal(posterior)` should be given covariances with an inverse; there is none here: "
                f"{reason}. Leave certain parameters out of the posterior."
            )
        return dataclasses.replace(gaussian, orthogonal=True)

    return _with_gaussians(posterior, changed, "orthogonal(posterior)")


def _with_gaussians(posterior: Posterior, change: Callable[[Gaussian], Gaussian], call: str) -> Posterior:
    """The same posterior with its Gaussians changed."""
    _check_posterior(posterior, call)

    def changed(part: Posterior) -> Posterior:
        if isinstance(part, Gaussian):
            return change(part)
        if isinstance(part, Mixture):
            components = tuple(map(changed, part.components))
            is_new = any(new is not old for new, old in zip(components, part.components, strict=True))
            return dataclasses.replace(part, components=components) if is_new else part
        if isinstance(part, Join):
            parts = tuple(map(changed, part.parts))
            is_new = any(new is not old for new, old in zip(parts, part.parts, strict=True))
            return dataclasses.replace(part, parts=parts) if is_new else part
        return part

    found = changed(posterior)
    if found is posterior:
        raise TypeError(
            f"`{call}` should be given a Gaussian, or a mixture or join of such, got "
            f"{type(posterior).__name__}, which has none."
        )
    return found


def restrict(posterior: Posterior, where: Where) -> Posterior:
    """Take the marginal of a posterior over some of its leaves; the model gets the others from ``params``.

    Give ``predict`` parameters that belong to the posterior, most often its mean: the network that a method
    started from may be far from it. This is not the posterior that a method finds with ``where``, which
    holds the other leaves fixed: for a posterior with correlations that one is narrower.

    Args:
        posterior: Any posterior over leaves.
        where: Leaves to keep: a glob on the path, a sequence of globs, or a predicate ``(path, leaf)``.

    Returns:
        A posterior of the same kind. Where no leaf has correlations with those left out, its draws
        are those of ``posterior``, unless these are orthogonal: then its own are, in the leaves that are
        kept. Of a linearised one the leaves that are kept stay so.

    Raises:
        TypeError: If the posterior is dropout, which covers no leaves, or has it as a part.
        ValueError: If ``where`` chooses no leaf that the posterior covers.

    Example:
        >>> import torch, funcbayes as fb
        >>> mean = {"body.weight": torch.zeros(3, 2), "head.weight": torch.zeros(2, 3)}
        >>> ones = {name: torch.ones_like(leaf) for name, leaf in mean.items()}
        >>> gaussian = fb.Gaussian(mean, fb.covariances.Diagonal(ones))
        >>> sorted(fb.restrict(gaussian, "head.*").mean)
        ['head.weight']
    """
    _check_posterior(posterior, "restrict(posterior, ...)")
    restricted = _restricted(posterior, where)
    if restricted is None:
        raise ValueError(
            f"`restrict(posterior, where={where!r})` should keep a leaf of the {type(posterior).__name__}, "
            "got none that it chooses."
        )
    return restricted


def _restricted(posterior: Posterior, where: Where) -> Posterior | None:
    """The marginal; ``None`` if nothing is left."""
    chosen = matcher(where)
    if isinstance(posterior, Join):
        parts = [part for p in posterior.parts if (part := _restricted(p, where)) is not None]
        return join(*parts) if parts else None
    if isinstance(posterior, Mixture):
        found = [_restricted(component, where) for component in posterior.components]
        components = [component for component in found if component is not None]
        if not components:
            return None
        if len(components) < len(found):
            raise ValueError(
                f"`restrict(posterior, where={where!r})` should keep a leaf of every component of a mixture, "
                f"got none of component {found.index(None)}."
            )
        return mixture(*components, weights=None if posterior.has_equal_weights else posterior.weights)
    if isinstance(posterior, Point):
        kept = select(posterior.params, chosen)
        return Point(kept) if named_leaves(kept) else None
    if isinstance(posterior, Ensemble):
        if not all(isinstance(effect, Linearization) for effect in posterior.effects):
            raise _without_leaves("an Ensemble with dropout masks")
        names = _names(index(posterior.members, 0), where)
        members = select(posterior.members, lambda name, _: name in names)
        kept = [effect.restricted(lambda name, _: name in names) for effect in posterior.effects]
        effects = tuple(effect for effect in kept if named_leaves(effect.center))
        return dataclasses.replace(posterior, members=members, effects=effects) if names else None
    if isinstance(posterior, Gaussian):
        mean = select(posterior.mean, chosen)
        if not named_leaves(mean):
            return None
        names = set(parameters_of(mean))
        if not names:  # but values that every draw has
            return Point(mean)
        covariance = posterior.covariance.restricted(lambda name, _: name in names)
        return dataclasses.replace(posterior, mean=mean, covariance=covariance)
    if isinstance(posterior, Dropout):
        raise _without_leaves("Dropout")
    raise NotImplementedError(f"`restrict` is not defined for {type(posterior).__name__}.")


def _without_leaves(what: str) -> TypeError:
    return TypeError(
        f"`restrict(posterior, where)` should be given a posterior over leaves; {what} changes how the model "
        "is called. Restrict the other parts, then join; for some layers only: `Dropout(where=...)`."
    )


def to_ensemble(posterior: Posterior, num_samples: int, seed: Seed | None = None) -> Posterior:
    """Fix the draws of a posterior: pay for them once, and use them for many batches.

    ``predict`` with the ensemble gives what it gives for the posterior with the same number of samples
    and seed.

    Args:
        posterior: Any posterior.
        num_samples: Number of draws ``S``, at least 1.
        seed: Draws are a function of it; ``None`` takes one number from torch's global state.

    Returns:
        An :class:`~funcbayes.Ensemble` of ``S`` equally weighted members, with the effects of the draws, such
        as dropout masks. Of a mixture whose components cover different leaves, or are linearised around
        different values, a mixture of such ensembles: then samples come in another order.

    Raises:
        ValueError: If ``num_samples`` is below 1.

    Example:
        >>> import torch, funcbayes as fb
        >>> gaussian = fb.Gaussian({"w": torch.zeros(2)}, fb.covariances.Diagonal({"w": torch.ones(2)}))
        >>> fb.to_ensemble(gaussian, 8, seed=0)
        Ensemble(members={'w': float32(8, 2)}, weights=float64(8,), effects=(), has_equal_weights=True)
    """
    _check_posterior(posterior, "to_ensemble(posterior, ...)")
    count = positive_int(num_samples, "to_ensemble(posterior, num_samples)")
    indices, seed = torch.arange(count), resolve_seed(seed)
    groups = [at.sort().values for at in posterior.structures(indices, seed).values()]
    ensembles = [_ensemble(posterior.draws(indices[at], seed)) for at in groups]
    return mixture(*ensembles, weights=[float(len(at)) for at in groups])


def _ensemble(draw: Draw) -> Ensemble:
    return Ensemble(draw.leaves, effects=draw.effects)


def _check_posterior(posterior: Posterior, call: str) -> None:
    if not isinstance(posterior, Posterior):
        raise TypeError(f"`{call}` should be given a posterior, got {type(posterior).__name__}.")


def _names(tree: Params, where: Where) -> set[str]:
    chosen = matcher(where)
    return {name for name, leaf in named_leaves(tree).items() if chosen(name, leaf)}
