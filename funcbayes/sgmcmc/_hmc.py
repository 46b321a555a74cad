"""Hamiltonian Monte Carlo on all data."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .._checks import check_model, int_from_zero, positive_int
from .._functional import Model
from .._random import fold, normal, uniform
from .._tree import Params, Where, index
from ..covariances._flat import at_least_single
from ..likelihoods import Likelihood
from ..likelihoods._checks import check_is_likelihood
from ..likelihoods._layout import wide
from ..priors._given import HasLogProb, checked_prior
from ..training._batch import Batch
from ..training._data import Data, open_data
from ._adaptation import DualAveraging, Variances, windows
from ._chains import Chains
from ._passes import Passes
from ._potential import Potential
from ._scalars import positive_number
from ._start import Start, as_seeds, check_chunk

_CALL = "sgmcmc.hmc"

# A proposal whose energy is higher by this much has diverged, as in Stan.
_DIVERGENT = 1000.0


def hmc(
    fn: Model,
    params: Params,
    data: Data,
    likelihood: Likelihood,
    *,
    num_samples: int,
    num_burn_in: int,
    step_size: float,
    num_leapfrog_steps: int,
    prior_precision: Any = 1.0,
    prior: HasLogProb | None = None,
    where: Where | None = None,
    num_chains: int = 1,
    stacked: bool = False,
    target_acceptance: float = 0.8,
    adapt: bool = True,
    adapt_masses: bool = True,
    chunk_size: int | None = None,
    compile: bool = False,
    seed: int | None = None,
) -> Chains:
    """Sample the posterior of a small model by Hamiltonian Monte Carlo, exact but for Monte Carlo error.

    A proposal follows Hamilton's equations for ``U(theta) + 1/2 p^T M^-1 p``, with momenta ``p ~ N(0, M)``,
    by leapfrog steps, and is accepted with the probability of Metropolis et al. (Neal 2011, "MCMC using
    Hamiltonian dynamics", section 3). ``U`` is the potential energy on all data, summed over rows. How many
    steps a proposal takes is drawn anew for each, from half of ``num_leapfrog_steps``, rounded up, to all
    of them, so that no trajectory comes back to where it began every time (section 4.2 there).

    All chains advance at once, in vectorised passes. Each has noise, a step size and masses of its own: chain
    ``k`` does, to rounding, what it would do alone with ``seed=member_seeds(seed, M)[k]``.

    During the burn-in step sizes are adapted by dual averaging so that proposals are accepted with the
    probability ``target_acceptance`` (Hoffman & Gelman 2014, "The No-U-Turn sampler", algorithm 5, but that
    the number of steps stays what it is), and the diagonal of ``M`` to the inverse variances of the chain, in
    windows that grow. Afterwards both are fixed. The average that the step sizes end at is on the safe side:
    the rate of acceptance is then somewhat above the target.

    Args:
        fn: Pure model, ``fn(params, x) -> outputs``, evaluated as it is: without dropout, and with the
            running statistics of BatchNorm.
        params: Where chains start, not changed. Leaves that are not of floating point, and ``Fixed`` ones,
            are held.
        data: ``(x, y)`` in tensors, or a re-iterable of batches, all of which are kept in memory.
        likelihood: ``p(y|f)``.
        num_samples: States kept of each chain, ``T``: every one after the burn-in.
        num_burn_in: Proposals before states are kept.
        step_size: Of the leapfrog steps, or what its adaptation starts from.
        num_leapfrog_steps: The most of a proposal; each is a gradient of all data.
        prior_precision: Precision (1 / variance) of a Gaussian prior of mean zero: one number, or a tree with
            one for each leaf.
        prior: Another prior, as in :func:`fit`.
        where: Which leaves to move; ``None`` for all. The others are held.
        num_chains: ``M``, all from the same start.
        stacked: Whether ``params`` are starts of several chains, every leaf with a leading axis ``M``,
            instead.
        target_acceptance: Mean probability of acceptance that step sizes are adapted to.
        adapt: Whether anything is adapted.
        adapt_masses: Whether ``M`` is, too; it is the identity otherwise.
        chunk_size: How many chains are evaluated at a time; ``None`` to choose by sizes.
        compile: As for :func:`fit`.
        seed: Of the noise; ``None`` draws one.

    Returns:
        Kept states, leaves ``(M, T, *s)``, where a rejected proposal repeats a state. Its statistics:
        ``"potential"`` ``(M, T)``, the potential energy of each; ``"acceptance_rate"`` ``(M,)``, the mean
        probability of acceptance after the burn-in; ``"num_divergent"`` ``(M,)``, how many of these proposals
        were rejected because their energy was not finite or 1000 nats higher; ``"step_size"`` ``(M,)``.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range, or data are empty.
        RuntimeError: If the potential energy of a start, or its gradient, is not finite.

    Example:
        >>> import torch, funcbayes as fb
        >>> from funcbayes import sgmcmc
        >>> x = torch.linspace(-1, 1, 20)[:, None]
        >>> fn, params = fb.make_functional(torch.nn.Linear(1, 1))
        >>> chains = sgmcmc.hmc(
        ...     *(fn, params, (x, 3 * x), fb.likelihoods.Normal(1.0)),
        ...     num_samples=100,
        ...     num_burn_in=100,
        ...     step_size=0.1,
        ...     num_leapfrog_steps=5,
        ...     num_chains=4,
        ...     seed=0,
        ... )
        >>> chains.params["weight"].shape, chains.statistics["acceptance_rate"].shape
        (torch.Size([4, 100, 1, 1]), torch.Size([4]))
    """
    check_model(fn, _CALL)
    check_is_likelihood(likelihood, f"{_CALL}(likelihood=...)")
    num_samples = positive_int(num_samples, f"{_CALL}(num_samples=...)")
    burn_in = int_from_zero(num_burn_in, f"{_CALL}(num_burn_in=...)")
    num_leapfrog_steps = positive_int(num_leapfrog_steps, f"{_CALL}(num_leapfrog_steps=...)")
    step_size = positive_number(step_size, f"{_CALL}(step_size=...)")
    target_acceptance = positive_number(target_acceptance, f"{_CALL}(target_acceptance=...)")
    if target_acceptance >= 1:
        raise ValueError(
            f"`{_CALL}(target_acceptance=...)` should be above 0 and below 1, got {target_acceptance}."
        )
    chunk_size = check_chunk(chunk_size, _CALL)
    start = Start.of(params, where, num_chains, stacked, _CALL)
    prior = checked_prior(prior, prior_precision, index(start.covered, 0), _CALL)
    source = open_data(data, batch_size=None, num_streams=1, call=_CALL)
    seeds = as_seeds(start.seeds(seed))
    with torch.inference_mode(False):
        batches = [*source.plain_batches(start.leaves[0].device)]
        rows = sum(batch.rows for batch in batches)
        passes = Passes(Potential(fn, likelihood, prior, rows), start, _CALL, chunk_size, compile)
        passes.check_likelihood(batches[0])
        energy = _Energy(passes, batches)
        place = energy.at(energy.flat(start.leaves))
        _check_start(place)
        moves = _Moves(energy, seeds, num_leapfrog_steps)
        tuning = _Tuning.begin(place.position, step_size, burn_in if adapt else 0, adapt_masses)
        for i in range(burn_in):
            place, acceptance, _ = moves(place, tuning.size, tuning.inverse_masses, i)
            tuning = tuning.updated(i, place.position, acceptance, target_acceptance)
        size, inverse_masses = tuning.final_size, tuning.inverse_masses
        kept = place.position.new_empty(len(seeds), num_samples, place.position.shape[1])
        potentials, acceptances, divergent = [], [], []
        for t in range(num_samples):
            place, acceptance, has_diverged = moves(place, size, inverse_masses, burn_in + t)
            kept[:, t] = place.position
            potentials.append(place.potential)
            acceptances.append(acceptance)
            divergent.append(has_diverged)
        drawn = start.structure.unflatten([leaf.clone() for leaf in energy.leaves(kept)])
        statistics = {
            "potential": torch.stack(potentials, 1),
            "acceptance_rate": torch.stack(acceptances).mean(0),
            "num_divergent": torch.stack(divergent).sum(0),
            "step_size": size,
        }
        return Chains(start.with_held(drawn, num_samples), statistics)


@dataclass(frozen=True)
class _Place:
    """Where chains are: positions ``(M, D)``, potentials ``(M,)``, and gradients ``(M, D)``."""

    position: Tensor
    potential: Tensor
    gradient: Tensor

    def moved_where(self, accepted: Tensor, other: "_Place") -> "_Place":
        """``other`` for the chains that accept it."""
        rows = accepted.unsqueeze(-1)
        return _Place(
            torch.where(rows, other.position, self.position),
            torch.where(accepted, other.potential, self.potential),
            torch.where(rows, other.gradient, self.gradient),
        )


class _Energy:
    """The potential on all data, as a function of the parameters of each chain in one row."""

    def __init__(self, passes: Passes, batches: Sequence[Batch]) -> None:
        self.passes, self.batches = passes, batches
        self.like = passes.start.leaves
        self.sizes = [leaf[0].numel() for leaf in self.like]
        self.rows = passes.potential.num_data

    def flat(self, leaves: Sequence[Tensor]) -> Tensor:
        """Leaves ``(M, *s)`` as ``(M, D)``, in the dtype they promote to, at least float32."""
        rows = torch.cat([leaf.flatten(1) if leaf.ndim > 1 else leaf.unsqueeze(1) for leaf in leaves], 1)
        return rows.to(at_least_single(rows.dtype))

    def leaves(self, flat: Tensor) -> list[Tensor]:
        """Rows ``(*k, D)`` as leaves ``(*k, *s)``."""
        parts = flat.split(self.sizes, -1)
        return [
            part.reshape(*flat.shape[:-1], *leaf.shape[1:]).to(leaf.dtype)
            for part, leaf in zip(parts, self.like, strict=True)
        ]

    def at(self, position: Tensor) -> _Place:
        """Evaluate the potential and its gradient."""
        leaves, potentials, gradients = self.leaves(position), [], []
        for batch in self.batches:
            # What a batch says of the whole potential, in proportion to its rows, sums to the potential.
            share = batch.rows / self.rows
            values, grads = self.passes(leaves, batch)
            potentials.append(share * values)
            gradients.append(share * self.flat(grads))
        return _Place(position, torch.stack(potentials).sum(0), torch.stack(gradients).sum(0))


def _check_start(place: _Place) -> None:
    fine = place.potential.isfinite() & place.gradient.isfinite().all(1)
    if not bool(fine.all()):
        k = int((~fine).nonzero()[0])
        of_chain = f" of chain {k}" if len(fine) > 1 else ""
        raise RuntimeError(
            f"The potential energy{of_chain} in `{_CALL}` is {place.potential[k].item()} where it starts, or "
            "its gradient is not finite. Start from trained parameters, say."
        )


class _Moves:
    """Proposals and their acceptance, functions of the seed of each chain and the number of the proposal."""

    def __init__(self, energy: _Energy, seeds: Tensor, num_leapfrog_steps: int) -> None:
        self.energy, self.most = energy, num_leapfrog_steps
        self.keys = {name: fold(seeds, name) for name in ("momentum", "steps", "acceptance")}

    def __call__(
        self, place: _Place, size: Tensor, inverse_masses: Tensor, i: int
    ) -> tuple[_Place, Tensor, Tensor]:
        """Propose and accept or reject; also probabilities of acceptance and what diverged, ``(M,)``."""
        keys = {name: fold(key, i) for name, key in self.keys.items()}
        shape, like = place.position.shape[1:], place.position
        noise = normal(keys["momentum"], shape, dtype=like.dtype, device=like.device)
        momentum = noise / inverse_masses.sqrt()
        least = (self.most + 1) // 2
        counts = least + (uniform(keys["steps"], ()) * (self.most - least + 1)).long()
        proposal, end = self._followed(place, momentum, size, inverse_masses, counts)
        before, after = (
            at.potential + _kinetic(p, inverse_masses) for at, p in ((place, momentum), (proposal, end))
        )
        gain = torch.where(after.isfinite(), before - after, -torch.inf)  # so NaN is never accepted
        acceptance = gain.clamp_max(0).exp()
        draw = uniform(keys["acceptance"], (), dtype=gain.dtype).to(gain.device)
        return place.moved_where(draw < acceptance, proposal), acceptance, gain < -_DIVERGENT

    def _followed(
        self, place: _Place, momentum: Tensor, size: Tensor, inverse_masses: Tensor, counts: Tensor
    ) -> tuple[_Place, Tensor]:
        """The end of the trajectory of each chain, after its own number of leapfrog steps."""
        for step in range(int(counts.max())):
            # A chain that has arrived takes steps of size 0, which leave it where it is.
            left = (step < counts).to(size.device)
            eps = (size * left).to(momentum.dtype).unsqueeze(-1)
            momentum = momentum - eps / 2 * place.gradient
            place = self.energy.at(place.position + eps * inverse_masses * momentum)
            momentum = momentum - eps / 2 * place.gradient
        return place, momentum


def _kinetic(momentum: Tensor, inverse_masses: Tensor) -> Tensor:
    return 0.5 * (wide(momentum).square() * inverse_masses).sum(1)


@dataclass(frozen=True)
class _Tuning:
    """Step sizes and masses, and how they are found.

    Attributes:
        inverse_masses: Diagonals of ``M^-1``, ``(M, D)``.
        averaging: Of step sizes.
        variances: Of the positions in the present window.
        num: Proposals of the burn-in; 0 if nothing is adapted.
        adapts_masses: Whether masses are.
    """

    inverse_masses: Tensor
    averaging: DualAveraging
    variances: Variances
    num: int
    adapts_masses: bool

    @classmethod
    def begin(cls, position: Tensor, size: float, num: int, adapts_masses: bool) -> "_Tuning":
        sizes = torch.full_like(wide(position[:, 0]), size)
        ones = torch.ones_like(position)
        return cls(ones, DualAveraging.from_size(sizes), Variances.like(position), num, adapts_masses)

    @property
    def size(self) -> Tensor:
        """Step sizes for the next proposal of the burn-in."""
        return self.averaging.log_size.exp()

    @property
    def final_size(self) -> Tensor:
        """Step sizes after the burn-in."""
        return self.averaging.log_average.exp()

    def updated(self, i: int, position: Tensor, acceptance: Tensor, target: float) -> "_Tuning":
        """Learn from proposal ``i``."""
        if not self.num:
            return self
        averaging = self.averaging.updated(acceptance.to(self.size), target)
        collecting, ends = windows(self.num)
        if not self.adapts_masses or i not in collecting:
            return replace(self, averaging=averaging)
        variances = self.variances.updated(position)
        if i not in ends:
            return replace(self, averaging=averaging, variances=variances)
        after = variances.inverse_masses(self.inverse_masses)
        # Steps in space stay about as long as they were, until it is known better.
        change = 0.5 * (self.inverse_masses / after).log().mean(1)
        size = (averaging.log_average + change).exp()
        return replace(
            self,
            inverse_masses=after,
            averaging=DualAveraging.from_size(size),
            variances=Variances.like(position),
        )
