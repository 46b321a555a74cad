"""Measure the claims: `python -m benchmarks [claim ...] [--repeats N] [--json FILE]`."""

import argparse
import dataclasses
import importlib
import json
import pathlib
import sys

from . import _measure


def main() -> int:
    """Measure, print tables, and write JSON if asked."""
    claims = sorted(p.stem for p in pathlib.Path(__file__).parent.glob("[!_]*.py"))
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("claims", nargs="*", metavar="claim", help=f"default all: {', '.join(claims)}")
    parser.add_argument("--repeats", type=int, default=9, help="timings of each pair (default 9)")
    parser.add_argument("--json", type=pathlib.Path, help="write results and environment to this file")
    args = parser.parse_args()
    unknown = set(args.claims) - set(claims)
    if unknown or args.repeats < 2:
        parser.error(f"no claim {sorted(unknown)[0]!r}" if unknown else "--repeats should be at least 2")
    report: dict[str, object] = {"environment": _measure.environment()}
    for name in args.claims or claims:
        module = importlib.import_module(f"{__package__}.{name}")
        print(f"\n{name}: {(module.__doc__ or '').splitlines()[0]}", flush=True)
        results = []
        for result in module.run(args.repeats):
            results.append(result)
            print(".", end="", flush=True)
        print("\n" + _measure.table(results), flush=True)
        report[name] = [dataclasses.asdict(result) for result in results]
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


sys.exit(main())
