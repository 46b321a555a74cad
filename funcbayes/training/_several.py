"""Training of several networks: side by side in vectorised steps, or one after another."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .._random import fold
from .._tree import Fixed, Params, Where, concatenate, index, named_leaves, parameters_of
from ..posteriors import Ensemble
from ._data import Source
from ._loop import Watcher, minimize
from ._objective import Objective
from ._options import Options
from ._shared_movers import shared_movers
from ._together import Together

# Bytes of the parameters of one network from which on networks are better trained one after another.
_LARGE = 4 << 20


def member_seeds(seed: int, num_members: int) -> tuple[int, ...]:
    """Seeds of the members of an ensemble: what a member does depends on its own only.

    Args:
        seed: Seed of the ensemble.
        num_members: How many; the first seeds do not depend on it.

    Returns:
        One seed a member.

    Example:
        >>> from funcbayes import ensemble
        >>> ensemble.member_seeds(0, 5)[:2] == ensemble.member_seeds(0, 2)
        True
    """
    return tuple(fold(fold(seed, "member"), k) for k in range(num_members))


def count_members(members: Params, call: str) -> int:
    """Length of the leading axis, on which all leaves agree.

    Args:
        members: Every leaf with a leading axis ``K``.
        call: The public call with its arguments, for messages.
    """
    if isinstance(members, Ensemble):
        raise TypeError(f"`{call}` should be given a tree of parameters, got Ensemble. Write `.members`.")
    leaves = {
        name: leaf.tensor if isinstance(leaf, Fixed) else leaf for name, leaf in named_leaves(members).items()
    }
    if not leaves:
        raise ValueError(f"`{call}` should be given at least one leaf, got an empty tree.")
    sizes = {
        name: leaf.shape[0] if isinstance(leaf, Tensor) and leaf.ndim else 0 for name, leaf in leaves.items()
    }
    first, expected = next(iter(sizes.items()))
    for name, size in sizes.items():
        if not size or size != expected:
            raise ValueError(
                f"`{call}` should be given leaves with one leading axis over the members; {first!r} has "
                f"{expected or 'none'}, {name!r} has {size or 'none'}. "
                "Write `fn, members = ensemble.init(make_module, num_members)`."
            )
    return expected


def minimize_several(
    objective: Objective,
    members: Params,
    source: Source,
    seeds: Sequence[int],
    streams: Sequence[int],
    options: Options,
    *,
    where: Where | None,
    chunk_size: int | None,
    in_step: bool,
    watch: Callable[[slice], Watcher] | None = None,
) -> Params:
    """Train ``K`` networks, each as if it were alone.

    Args:
        objective: Loss of one network.
        members: Where they start; every leaf has a leading axis ``K``.
        source: The data.
        seeds: One a network, for its noise.
        streams: Seeds of the streams of batches: one a network, or one for all.
        options: How to descend.
        where: Which leaves to train.
        chunk_size: Networks evaluated at a time; ``None`` to choose by sizes. Those evaluated one at a
            time are trained one after another, unless ``in_step``.
        in_step: Whether a step of each network has to follow one of the others.
        watch: Makes what looks at the networks with the given numbers, which are trained side by side.

    Returns:
        Trained members, all new tensors without a graph.
    """
    num = len(seeds)
    if in_step or not (chunk_size == 1 or (chunk_size is None and _is_large(members))):
        return minimize(
            objective,
            members,
            source,
            seeds,
            streams,
            options,
            where=where,
            gradients=Together(chunk_size),
            make_movers=shared_movers,
            watcher=watch and watch(slice(0, num)),
        )
    alone = [
        minimize(
            objective,
            index(members, k),
            source,
            seeds[k],
            streams[k],
            replace(options, member=number),
            where=where,
            watcher=watch and watch(k),
        )
        for number, k in enumerate(slice(k, k + 1) for k in range(num))
    ]
    with torch.inference_mode(False):
        return concatenate(alone)


def _is_large(members: Params) -> bool:
    """Whether the parameters of several members do not stay in the cache of a CPU.

    Steps of all members in turn would then fetch the parameters, and the state of the optimizer, from memory
    every time; one member trained to the end leaves them where they are.
    """
    parameters = parameters_of(index(members, 0)).values()
    return all(p.device.type == "cpu" for p in parameters) and sum(p.nbytes for p in parameters) > _LARGE
