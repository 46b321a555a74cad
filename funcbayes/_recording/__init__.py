"""What a model does with its tensors, written down to be done again without its Python code."""

from ._recorded import Bound, Recorded, kind_of

__all__ = ["Bound", "Recorded", "kind_of"]
