"""Seeing and changing the calls inside a model from outside, without touching the model."""

from ._batching import Batching as Batching, Observed as Observed
from ._call import Call as Call, calling as calling, current_call as current_call
from ._dropout import DropoutMasks as DropoutMasks, with_dropout as with_dropout
from ._folded import Folded as Folded
from ._layout import LayoutWatch as LayoutWatch
from ._prepared import Prepared as Prepared, prepared as prepared, prepared_together as prepared_together
from ._unfused import Unfused as Unfused
