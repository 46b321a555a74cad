"""Several posteriors over the same model, each with a probability."""

from collections.abc import Hashable

import torch
from torch import Tensor

from .._functorch import is_concrete
from .._random import Seed, fold
from .._tree import (
    Fixed,
    Params,
    concatenate,
    index,
    map_leaves,
    named_leaves,
    parameters_of,
    pytree_dataclass,
    select,
    static,
    tensors,
    unbind,
)
from ._allocation import allocate_ranked
from ._interface import (
    Draw,
    Posterior,
    covered_leaves,
    in_order,
    labelled,
    moment_of,
    structure_of,
    unlabelled,
)
from ._weights import normalized, probabilities


@pytree_dataclass
class Mixture(Posterior):
    """A posterior that is one of its components with a probability; made by :func:`mixture`.

    Draw ``i`` belongs to the component that a low-discrepancy sequence gives, so the first ``n`` draws are
    shared out in close proportion to the weights, for every ``n``; it is the next draw of that component.

    Attributes:
        components: ``K`` posteriors, at least one.
        weights: Their probabilities ``(K,)``; given ones are divided by their sum. ``None`` makes
            them equal.
        has_equal_weights: Whether all components weigh the same.
        names: Paths of the leaves that are covered, of which the sequence is a function.

    The choice of components is no function of the weights that has a derivative: sampling gives weights no
    gradient, ``log_prob`` and the moments do.
    """

    components: tuple[Posterior, ...]
    weights: Tensor = None  # type: ignore[assignment]  # a tensor once it has been made
    has_equal_weights: bool = static(default=False, init=False)
    names: str = static(default="", init=False)

    def __post_init__(self) -> None:
        seen: dict[str, tuple[int, Tensor | Fixed]] = {}
        for k, component in enumerate(self.components):
            for name, leaf in covered_leaves(component).items():
                first, there = seen.setdefault(name, (k, leaf))
                if _kind(leaf) != _kind(there):
                    raise ValueError(
                        "`mixture(*posteriors)` should be given posteriors over leaves of one kind; "
                        f"{name!r} is {_kind(there)} in component {first} and {_kind(leaf)} in component "
                        f"{k}. `funcbayes.to` converts dtypes and devices."
                    )
        found = tensors(self.components)
        device = found[0].device if found else None
        count = len(self.components)
        weights, is_equal = normalized(
            self.weights, count, "mixture(*posteriors, weights=...)", "components", device
        )
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "has_equal_weights", is_equal)
        object.__setattr__(self, "names", ",".join(sorted(seen)))

    def forms(self) -> list[Draw]:
        """Those of the components."""
        forms = [labelled(form, k) for k, c in enumerate(self.components) for form in c.forms()]
        return list({structure_of(form): form for form in forms}.values())

    def structures(self, indices: Tensor, seed: Seed) -> dict[Hashable, Tensor]:
        """Draws of different components are of one structure if they cover the same leaves alike.

        Draws that are linearised are not: those of one component have one value to be linearised around,
        at which a pass need evaluate the model once only.
        """
        choices, ranks = self._allocated(indices, seed)
        can_choose = is_concrete(choices)
        forms = {structure_of(form if can_choose else unlabelled(form)) for form in self.forms()}
        if len(forms) == 1:
            # By component, so that draws need not be put in order.
            return {forms.pop(): choices.argsort(stable=True) if can_choose else torch.arange(len(indices))}
        if not can_choose:
            raise NotImplementedError(
                "A mixture whose components cover different leaves cannot be drawn from under `vmap` over "
                "seeds: which leaves a draw has depends on the seed. Loop over the seeds."
            )
        found: dict[Hashable, list[Tensor]] = {}
        for k, chosen in _by_choice(choices):
            component = self.components[k]
            structure_here = {
                structure_of(form): structure_of(labelled(form, k)) for form in component.forms()
            }
            own = component.structures(ranks[chosen], _component_seed(seed, k))
            for structure, positions in own.items():
                found.setdefault(structure_here[structure], []).append(chosen[positions])
        return {structure: torch.cat(positions) for structure, positions in found.items()}

    def draws(self, indices: Tensor, seed: Seed) -> Draw:
        """Draws of the components, leaves ``(S, *s)``."""
        choices, ranks = self._allocated(indices, seed)
        if not is_concrete(choices):
            return self._selected(choices, ranks, seed)
        found = []
        for k, at in _by_choice(choices):
            draw = self.components[k].draws(ranks[at], _component_seed(seed, k))
            found.append((at, labelled(draw, k)))
        return in_order(found)

    def _selected(self, choices: Tensor, ranks: Tensor, seed: Seed) -> Draw:
        """Draws where the choices cannot be looked at: of all components, each keeping its own."""
        every = [unlabelled(c.draws(ranks, _component_seed(seed, k))) for k, c in enumerate(self.components)]

        def choose(*leaves: Tensor) -> Tensor:
            stacked = torch.stack(leaves)
            return stacked[choices.to(stacked.device), torch.arange(stacked.shape[1], device=stacked.device)]

        return map_leaves(choose, *every)

    def _allocated(self, indices: Tensor, seed: Seed) -> tuple[Tensor, Tensor]:
        site = fold(fold(seed, "component"), self.names)
        weights = None if self.has_equal_weights else self.probabilities()
        return allocate_ranked(indices, weights, len(self.components), site)

    def atoms(self) -> list[tuple[Draw, Tensor]] | None:
        """Those of the components, if all have finitely many."""
        found: dict[Hashable, list[tuple[Draw, Tensor]]] = {}
        for k, (component, weight) in enumerate(zip(self.components, self.probabilities(), strict=True)):
            of_component = component.atoms()
            if of_component is None:
                return None
            for draw, weights in ((labelled(draw, k), weights) for draw, weights in of_component):
                structure = structure_of(index(draw, 0))
                found.setdefault(structure, []).append((draw, weight * weights.to(weight.device)))
        return [
            (concatenate([draw for draw, _ in same]), torch.cat([weights for _, weights in same]))
            for same in found.values()
        ]

    @property
    def mean(self) -> Params:
        """Mean of the covered parameters: ``sum_k w_k mean_k``.

        ``Fixed`` leaves that all components have are averaged too, integers left out.
        """
        self._check_one_coverage("mean")
        means = [moment_of(c, "mean") for c in self.components]
        common = set.intersection(
            *({k for k, v in named_leaves(m).items() if _is_floating(v)} for m in means)
        )
        return self._average([_part(mean, common) for mean in means])

    @property
    def variance(self) -> Params:
        """Variance of each parameter: ``sum_k w_k (variance_k + (mean_k - mean)^2)``."""
        self._check_one_coverage("variance")
        variances = [moment_of(c, "variance") for c in self.components]
        covered = set(named_leaves(variances[0]))
        means = [_part(moment_of(c, "mean"), covered) for c in self.components]
        mean = self._average(means)
        squares = [map_leaves(lambda a, b: (a - b) ** 2, m, mean) for m in means]
        return self._average([map_leaves(torch.add, v, s) for v, s in zip(variances, squares, strict=True)])

    def log_prob(self, params: Params) -> Tensor:
        """Log density ``log sum_k w_k p_k(params)``, a scalar."""
        self._check_one_coverage("log_prob")
        densities = torch.stack([component.log_prob(params) for component in self.components])
        weights = self.probabilities().to(densities)
        # Not logsumexp of `densities + log weights`: a weight of 0 has a derivative, its logarithm has none.
        largest = torch.where(weights > 0, densities, -torch.inf).amax(0).detach()
        return largest + (weights * (densities - largest).clamp_max(80.0).exp()).sum(0).log()

    def probabilities(self) -> Tensor:
        """Weights of the components in double precision, ``(K,)``."""
        return probabilities(self.weights, self.has_equal_weights)

    def _average(self, trees: list[Params]) -> Params:
        weights = self.probabilities()
        return map_leaves(
            lambda *leaves: torch.tensordot(weights.to(leaves[0]), torch.stack(leaves), dims=1), *trees
        )

    def _check_one_coverage(self, name: str) -> None:
        if len({frozenset(parameters_of(form.leaves)) for form in self.forms()}) > 1:
            raise NotImplementedError(
                f"`{name}` is not defined for a Mixture whose components cover different leaves."
            )


def mixture(
    *posteriors: Posterior, weights: Tensor | list[float] | None = None, stacked: bool = False
) -> Posterior:
    """Mix posteriors: one of them, chosen by chance, and then a draw of it.

    A mixture of SWAG Gaussians around independently trained networks is MultiSWAG (Wilson & Izmailov 2020),
    of Laplace posteriors a mixture of Laplace (Eschenhagen et al. 2021).

    Args:
        *posteriors: Posteriors of any kind, over the same or different leaves of one model. With
            ``stacked`` a single one whose tensors have a leading axis ``K``, as ``vmap`` makes it.
        weights: Probabilities ``(K,)``, divided by their sum; ``None`` for equal ones.
        stacked: Whether one posterior with a leading axis on every tensor is given.

    Returns:
        A :class:`Mixture`; of a single posterior, that one.

    Raises:
        TypeError: If something else than posteriors is given.
        ValueError: If there are none, leaves differ in shape, dtype or device, or the weights are not ``K``
            numbers, negative, not finite, or all zero.

    Example:
        >>> import torch, funcbayes as fb
        >>> gaussian = fb.Gaussian({"w": torch.zeros(2)}, fb.covariances.Diagonal({"w": torch.ones(2)}))
        >>> mixed = fb.mixture(gaussian, fb.Point({"w": torch.ones(2)}), weights=[3, 1])
        >>> mixed.sample(4, seed=0)["w"].eq(1).all(dim=1).sum()  # draws that are the point
        tensor(1)
    """
    for posterior in posteriors:
        if not isinstance(posterior, Posterior):
            raise TypeError(
                f"`mixture(*posteriors)` should be given posteriors, got {type(posterior).__name__}. For one "
                "value of the parameters use `Point(params)`."
            )
    if stacked:
        posteriors = _unstacked(posteriors)
    if not posteriors:
        raise ValueError("`mixture(*posteriors)` should be given at least one posterior, got none.")
    mixed = Mixture(posteriors, weights)  # type: ignore[arg-type]  # a sequence becomes a tensor
    return posteriors[0] if len(posteriors) == 1 else mixed


def _unstacked(posteriors: tuple[Posterior, ...]) -> tuple[Posterior, ...]:
    if len(posteriors) != 1:
        raise ValueError(
            f"`mixture(posterior, stacked=True)` should be given one posterior, got {len(posteriors)}."
        )
    sizes = {tuple(leaf.shape[:1]) for leaf in tensors(posteriors[0])}
    if len(sizes) != 1 or sizes == {()} or sizes == {(0,)}:
        raise ValueError(
            "`mixture(posterior, stacked=True)` should be given a posterior whose tensors have one leading "
            f"axis over the components, got lengths {sorted(s[0] if s else 0 for s in sizes)}."
        )
    return tuple(unbind(posteriors[0]))


def _component_seed(seed: Seed, k: int) -> Seed:
    return fold(fold(seed, "of component"), k)


def _by_choice(choices: Tensor) -> list[tuple[int, Tensor]]:
    """Positions of each alternative that occurs."""
    return [(k, (choices == k).nonzero()[:, 0]) for k in sorted(set(choices.tolist()))]


def _is_floating(leaf: Tensor | Fixed) -> bool:
    return (leaf.tensor if isinstance(leaf, Fixed) else leaf).is_floating_point()


def _part(tree: Params, names: set[str]) -> Params:
    return select(tree, lambda name, leaf: name in names)


def _kind(leaf: Tensor | Fixed) -> str:
    tensor = leaf.tensor if isinstance(leaf, Fixed) else leaf
    fixed = "fixed " if isinstance(leaf, Fixed) else ""
    return f"{fixed}{str(tensor.dtype).removeprefix('torch.')}{tuple(tensor.shape)} on {tensor.device}"
