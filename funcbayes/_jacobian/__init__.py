"""The rows of a model's Jacobian, seen through its layers: the matrix itself is hardly ever formed."""

from ._blocks import Block as Block, blocks as blocks
from ._gradients import RowGradients as RowGradients
from ._taped import UnmappableError as UnmappableError
