"""The demonstration behind ``funcbayes demo``: every method on two real data sets, no downloads.

``_data`` has the data, ``_methods`` the one table of methods, ``_timing`` the comparison with plain
loops, and ``_report`` tables and pictures.
"""

from ._run import Settings as Settings, run as run
