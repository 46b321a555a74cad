"""A chunk of draws as one compiled program.

The model is traced with its rules and transforms already applied, to the plain operations that they end in;
so nothing of it can break the graph, and ``torch.compile`` sees arithmetic alone.
"""

import warnings
from collections.abc import Callable, Hashable
from typing import Any

import optree
import torch
from torch import Tensor

from ._remember import Remembered
from ._tree import tensors

Evaluate = Callable[[Any], Tensor]
_programs: Remembered[Evaluate] = Remembered()


def compiled(owner: Any, key: Hashable, evaluate: Evaluate, tree: Any) -> Tensor:
    """Evaluate by a program that is compiled at the first call with a key.

    Args:
        owner: What programs are remembered for: the model.
        key: What the operations depend on, beside the tensors of ``tree``.
        evaluate: A function of ``tree``, to tensors only through its tensors.
        tree: Tensors, and whatever else stays the same for a key.

    Returns:
        What ``evaluate(tree)`` gives, to rounding.
    """
    return _programs.get(owner, key, lambda: _compile(evaluate, tree))(tree)


def _compile(evaluate: Evaluate, tree: Any) -> Evaluate:
    from torch.fx.experimental.proxy_tensor import make_fx  # as slow to import as all of us

    leaves, structure = optree.tree_flatten(tree)
    where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def of_tensors(*given: Tensor) -> Tensor:
        own = list(leaves)
        for i, tensor in zip(where, given, strict=True):
            own[i] = tensor
        return evaluate(structure.unflatten(own))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing, to whoever reads the program
        graph = make_fx(of_tensors)(*tensors(tree))
    program = torch.compile(graph, dynamic=False)
    return lambda tree: program(*tensors(tree))
