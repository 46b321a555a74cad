"""What warnings and errors say of where they come from."""

import os
import sys


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its class if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def levels_to_the_user() -> int:
    """The ``stacklevel`` at which a warning names the line that called the package."""
    package = os.path.dirname(__file__) + os.sep
    frame, levels = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(package):
        frame, levels = frame.f_back, levels + 1
    return levels
