"""Buffers of networks that several draws of their parameters change, each for itself."""

from .._tree import Fixed, Params, map_named, named_leaves, select


def varying(params: Params) -> Params:
    """``Fixed`` leaves that each draw changes for itself; a count of batches is the same for all."""
    if params is None:
        return {}
    return select(params, lambda _, leaf: isinstance(leaf, Fixed) and leaf.tensor.is_floating_point())


def averaged(changed: Params, num_networks: int) -> Params:
    """Buffers ``(K S, ...)`` that each draw changed for itself, as one value a network, ``(K, ...)``."""

    def one(leaf: Fixed) -> Fixed:
        values = leaf.tensor.unflatten(0, (num_networks, -1))
        return Fixed(values.mean(1) if values.is_floating_point() else values[:, 0])

    return map_named(lambda _, leaf: one(leaf), changed) if named_leaves(changed) else {}
