"""Nodes of the package as plain containers, which ``torch.load(weights_only=True)`` takes, and back."""

import dataclasses
from typing import Any

from .._tree import NODE_TYPES

_NODE = "funcbayes"  # key of the name of a node's type


def to_plain(value: Any) -> Any:
    """Dicts, lists and tuples of tensors and numbers in place of nodes."""
    if type(value).__name__ in NODE_TYPES and NODE_TYPES[type(value).__name__] is type(value):
        fields = {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {_NODE: type(value).__name__, "fields": fields}
    if isinstance(value, dict):
        return {key: to_plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_plain(entry) for entry in value)
    return value


def from_plain(value: Any) -> Any:
    """Undo :func:`to_plain`."""
    if isinstance(value, dict):
        if _NODE in value:
            fields = {name: from_plain(entry) for name, entry in value["fields"].items()}
            return NODE_TYPES[value[_NODE]](**fields)
        return {key: from_plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(from_plain(entry) for entry in value)
    return value
