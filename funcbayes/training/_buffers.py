"""Buffers of one network that several draws of its parameters change, each for itself."""

from .._tree import Fixed, Params, map_named, named_leaves, select


def varying(params: Params) -> Params:
    """``Fixed`` leaves that each draw changes for itself; a count of batches is the same for all."""
    if params is None:
        return {}
    return select(params, lambda _, leaf: isinstance(leaf, Fixed) and leaf.tensor.is_floating_point())


def averaged(changed: Params) -> Params:
    """Buffers that draws changed, ``(S, *s)``, as one value."""
    if not named_leaves(changed):
        return {}

    def one(name: str, leaf: Fixed) -> Fixed:
        return Fixed(leaf.tensor.mean(0) if leaf.tensor.is_floating_point() else leaf.tensor[0])

    return map_named(one, changed)
