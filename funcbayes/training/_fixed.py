"""The values of networks that are not trained but change as networks are evaluated."""

from torch import Tensor

from .._tree import Params, index, merge, named_leaves, select, stack


class FixedValues:
    """What training passes by but evaluating may change, of each network.

    Kept a network each, or stacked for a vmapped pass, whichever was asked for last. In the stacked
    form integers that are equal in all networks stay one tensor, ``common``: BatchNorm reads its
    count of batches as a number, which vmap allows for a tensor it does not map over only.
    """

    def __init__(self, trees: list[Params]) -> None:
        self._trees: list[Params] | None = trees
        self._stacked: tuple[Params, Params] = ({}, {})
        self._num = len(trees)

    def of(self, k: int) -> Params:
        """The values of network ``k``."""
        return self._by_member()[k]

    def put(self, k: int, tree: Params) -> None:
        """Replace the values of network ``k``."""
        self._by_member()[k] = tree

    def stacked(self) -> tuple[Params, Params]:
        """``(varying, common)``: with an axis of networks, and without."""
        if self._trees is not None:
            everything = stack(self._trees)
            equal = {name for name, leaf in named_leaves(everything).items() if _is_common(leaf.tensor)}
            common = index(select(everything, lambda name, _: name in equal), 0)
            self._stacked = select(everything, lambda name, _: name not in equal), common
            self._trees = None
        return self._stacked

    def put_stacked(self, varying: Params, common: Params) -> None:
        """Replace the values of all networks."""
        self._stacked, self._trees = (varying, common), None

    def all(self) -> Params:
        """The values of all networks, every leaf with an axis of networks."""
        return stack(self._by_member())

    def _by_member(self) -> list[Params]:
        if self._trees is None:
            varying, common = self._stacked
            self._trees = [merge(index(varying, k), common) for k in range(self._num)]
        return self._trees


def _is_common(values: Tensor) -> bool:
    return not values.is_floating_point() and bool((values == values[0]).all())
