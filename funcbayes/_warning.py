"""Warnings that name the line which called the package."""

import os
import sys


def levels_to_the_user() -> int:
    """The ``stacklevel`` at which a warning names the line that called the package."""
    package = os.path.dirname(__file__) + os.sep
    frame, levels = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(package):
        frame, levels = frame.f_back, levels + 1
    return levels
