"""What a model does with its tensors, written down to be done again without its Python code."""

from ._recorded import Bound as Bound, Recorded as Recorded, kind_of as kind_of
