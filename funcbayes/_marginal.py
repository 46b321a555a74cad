"""Predictions whose rows are drawn each by itself: what layers give is drawn in the place of their weights.

Where a row meets a layer once, what the layer gives is a Gaussian with known moments, and one number a unit
is drawn in the place of a whole matrix. Each row then has the distribution that draws of the weights would
give it (Kingma, Salimans & Welling 2015), but rows that one draw belongs to have no weights in common.
"""

import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._functional import Model
from ._jacobian._gradients import product
from ._layer_noise import LayerNoise, deviation_of, first, leaves_of_layers, names_by_identity, noise
from ._random import Seed, fold, keys_by_name
from ._tree import Params, is_parameter, map_named, merge, named_leaves, parameters_of, select
from .covariances import Diagonal, Kronecker
from .posteriors import Draw, Gaussian, Posterior


def marginal_model(
    fn: Model, params: Params, posterior: Posterior, x: Any, seed: Seed, first_row: int
) -> tuple[Model, Params, Callable[[Tensor], Draw]]:
    """A model whose parameters are what noise is made of, its constant ones, and its draws by their numbers.

    Args:
        fn: Pure model.
        params: What the posterior does not cover.
        posterior: One that :func:`check_marginal` lets pass.
        x: Inputs.
        seed: Of the draws.
        first_row: Number of the first row of ``x`` in a larger data set.
    """
    assert isinstance(posterior, Gaussian)
    gaussian, covariance = posterior, posterior.covariance
    assert isinstance(covariance, Diagonal | Kronecker)
    others = merge(params, select(gaussian.mean, lambda _, leaf: not is_parameter(leaf)))

    def tree(layers: set[str]) -> Params:
        mean = select(gaussian.mean, lambda name, _: name in layers)
        sides = {"variance": covariance.variance}
        if isinstance(covariance, Kronecker):
            sides |= {"outputs": covariance.output_basis, "inputs": covariance.input_basis}
        of_layers = {
            side: {name: leaf for name, leaf in named_leaves(values).items() if name in layers}
            for side, values in sides.items()
        }
        return {"others": others, "mean": mean, **of_layers}

    def draws_of(layers: set[str], indices: Tensor) -> Draw:
        rest = covariance.restricted(lambda name, _: name not in layers)
        drawn: Params = {}
        if named_leaves(rest.like):
            mean, deviations = named_leaves(gaussian.mean), named_leaves(rest.deviations(indices, seed))
            drawn = map_named(lambda name, _: mean[name] + deviations[name], rest.like)
        keys = fold(fold(seed, indices), "layers")
        if first_row:
            keys = fold(fold(keys, "rows"), first_row)
        return Draw({"drawn": drawn, "keys": keys_by_name(keys, sorted(layers))})

    layers = _layers(fn, merge(others, gaussian.mean), gaussian, x)
    while layers:
        # One draw shows whether each of these is called once, for one value a row.
        entry = {**tree(layers), **_first(draws_of(layers, torch.zeros(1, dtype=torch.int64)))}
        with torch.no_grad():
            misused = _evaluated(fn, entry, x)[1].misused()
        if not misused:
            break
        layers -= misused
    # What is learned of the model is remembered for `fn`, which the method belongs to.
    model: Any = types.MethodType(_outputs, fn)
    return model, tree(layers), lambda part: draws_of(layers, part)


def check_marginal(posterior: Posterior) -> None:
    """Refuse a posterior whose layers' outputs are no independent Gaussians in some basis."""
    flags = [name for name in ("linearized", "antithetic", "orthogonal") if getattr(posterior, name, False)]
    covariance = getattr(posterior, "covariance", None)
    if not isinstance(posterior, Gaussian) or not isinstance(covariance, Diagonal | Kronecker) or flags:
        what = type(posterior).__name__ + (f" with {type(covariance).__name__}" if covariance else "")
        raise TypeError(
            "`predict(marginal=True)` should be given a Gaussian with a `Diagonal` or `Kronecker` "
            f"covariance, not linearized, antithetic or orthogonal, got {' '.join([*flags, what])}. Leave "
            "`marginal` out."
        )


def _layers(fn: Model, params: Params, gaussian: Gaussian, x: Any) -> set[str]:
    """Leaves that linear layers may draw for: of a Kronecker covariance their weights only."""
    leaves = parameters_of(gaussian.mean)
    found = leaves_of_layers(fn, params, list(leaves), x, rows_first=True)
    least = 2 if isinstance(gaussian.covariance, Kronecker) else 1
    return {name for name in found if least <= leaves[name].ndim <= 2}


def _first(draw: Draw) -> dict[str, Any]:
    leaves: Any = draw.leaves
    return {
        "drawn": map_named(lambda _, leaf: leaf[0], leaves["drawn"]) if leaves["drawn"] else {},
        "keys": {name: key[0] for name, key in leaves["keys"].items()},
    }


def _outputs(fn: Model, tree: Any, x: Any) -> Tensor:
    return _evaluated(fn, tree, x)[0]


def _evaluated(fn: Model, tree: Any, x: Any) -> tuple[Tensor, "MarginalNoise"]:
    params = merge(merge(tree["others"], tree["mean"]), tree["drawn"])
    names = names_by_identity(params, frozenset(tree["keys"]))
    bases = tree.get("outputs", {}), tree.get("inputs", {})
    mode = MarginalNoise(names, tree["variance"], *bases, tree["keys"])
    with mode:
        return fn(params, x), mode


class MarginalNoise(LayerNoise):
    """What linear layers give is drawn for each row: ``W x + U (sqrt(variance (V^T x)^2) z)``, bases U, V.

    Args:
        names: Of leaves, by the identity of the means that the model is given.
        variance: By name, along pairs of basis vectors.
        outputs: ``U`` by name; a basis that is not there is the identity.
        inputs: ``V`` by name.
        keys: Of the noise, by name.
    """

    def __init__(
        self,
        names: Mapping[int, str],
        variance: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
        inputs: Mapping[str, Tensor],
        keys: Mapping[str, Tensor],
    ) -> None:
        super().__init__(names, keys, _drawn)
        self.variance, self.outputs, self.inputs = variance, outputs, inputs


def _drawn(
    mode: MarginalNoise, func: Any, given: dict[str, Any], leaves: tuple[str | None, str | None]
) -> Tensor:
    mean, value, name = func(**given), given["input"], first(leaves)
    if func is not F.linear or value.ndim != 2:
        mode.refuse(*leaves)
        return mean
    # Bases may be in a wider dtype than the layer.
    if name in mode.inputs:
        value = product(value, mode.inputs[name]).to(value.dtype)
    weight, bias = (mode.variance[leaf] if leaf else None for leaf in leaves)
    std = deviation_of(F.linear, (weight, bias), 0, value, mean)
    deviation = std * noise(mode.keys[name], mean.shape, mean)
    if name in mode.outputs:
        deviation = product(deviation, mode.outputs[name].mT).to(deviation.dtype)
    return mean + deviation
