"""The command line: ``funcbayes demo``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments after the name of the program; ``None`` for those of the process.

    Returns:
        Exit status: 0, or 1 after an error that was explained.
    """
    arguments = _parser().parse_args(argv)
    return arguments.run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="funcbayes", description="Bayesian deep learning for PyTorch as pure functions."
    )
    parser.add_argument("--version", action="version", version=f"funcbayes {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    demo = commands.add_parser(
        "demo",
        help="compare the methods on two small real data sets",
        description="Compare the methods on two small real data sets that come with scikit-learn. "
        "Prints two tables and writes three pictures; nothing is downloaded.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument(
        "--output", type=Path, default=Path("demo_output"), metavar="DIR", help="folder for pictures"
    )
    demo.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the networks, not of the data"
    )
    demo.add_argument("--no-pictures", action="store_true", help="print the tables only")
    demo.set_defaults(run=_demo)
    return parser


def _demo(arguments: argparse.Namespace) -> int:
    from . import demo  # here, because it imports everything

    try:
        demo.run(demo.Settings(seed=arguments.seed), None if arguments.no_pictures else arguments.output)
    except ImportError as error:
        print(f"funcbayes demo: {error}", file=sys.stderr)
        return 1
    return 0
