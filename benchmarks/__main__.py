"""Measure the claims: `python -m benchmarks [claim ...]`.

The exit status is 1 if a claim does not hold, or results differ that should be the same. A claim is measured
on another device than the CPU only if it says that it can be.
"""

import argparse
import dataclasses
import importlib
import json
import math
import pathlib
import sys
from typing import Any

import torch

from . import _measure, _pictures


def main(arguments: list[str] | None = None) -> int:
    """Measure, print tables, and write JSON."""
    claims = sorted(p.stem for p in pathlib.Path(__file__).parent.glob("[!_]*.py"))
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("claims", nargs="*", metavar="claim", help=f"default all: {', '.join(claims)}")
    parser.add_argument(
        "--repeats", type=int, help="timings of each pair at least (default 9, of a quick run 3)"
    )
    parser.add_argument(
        "--json",
        type=pathlib.Path,
        default=pathlib.Path("benchmark_results.json"),
        help="file for results and environment (default %(default)s)",
    )
    parser.add_argument("--quick", action="store_true", help="few cases of each claim")
    parser.add_argument(
        "--minutes",
        type=float,
        default=math.inf,
        help="for so long predict_against_loop begins with further cells (default: all)",
    )
    parser.add_argument("--device", default="cpu", help="where: cpu, cuda, ... (default %(default)s)")
    parser.add_argument("--pictures", type=pathlib.Path, metavar="FOLDER", help="draw them, with matplotlib")
    args = parser.parse_args(arguments)
    unknown, repeats = set(args.claims) - set(claims), args.repeats
    if repeats is None:
        repeats = 3 if args.quick else 9
    if unknown or repeats < 2:
        parser.error(f"no claim {sorted(unknown)[0]!r}" if unknown else "--repeats should be at least 2")
    report: dict[str, Any] = {"environment": _measure.environment(args.device)}
    if torch.device(args.device).type == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # convolutions are compared, and timed, in single precision
    broken = 0
    for name in args.claims or claims:
        module = importlib.import_module(f"{__package__}.{name}")
        print(f"\n{name}: {(module.__doc__ or '').splitlines()[0]}", flush=True)
        results = report[name] = []
        if torch.device(args.device).type != "cpu" and not getattr(module, "ON_ANY_DEVICE", False):
            print("\nNot measured: it is of the CPU.", flush=True)
            continue
        how = _measure.How(repeats, args.quick, args.device, args.minutes)
        try:
            for result in module.run(how):
                results.append(result)
                print(f"  {result.case}: {result.ratio:.2f}", flush=True)
                _write(args.json, report)  # now, for what comes may take an hour
        except _measure.Unavailable as reason:
            print(f"\nNot measured: {reason}", flush=True)
            continue
        except AssertionError as difference:
            broken += 1
            print(f"\nNot measured to the end: results differ. {difference}", flush=True)
            if not results:
                continue
        print("\n" + _measure.table(results), flush=True)
        if args.pictures is not None and (path := _pictures.draw(name, results, args.pictures)):
            print(f"\n{path}", flush=True)
        broken += sum(not result.holds for result in results)
    _write(args.json, report)
    every = "Every claim" if args.minutes == math.inf else "Every claim that was measured in that time"
    found = f"{broken} of the claims do not hold" if broken else f"{every} holds"
    print(f"\n{found}; results are in {args.json}.")
    return int(broken > 0)


def _write(path: pathlib.Path, report: dict[str, Any]) -> None:
    """As JSON, without claims that were not measured."""
    written = {
        name: [_of_numbers(dataclasses.asdict(result)) | {"holds": result.holds} for result in found]
        if isinstance(found, list)
        else found
        for name, found in report.items()
        if found
    }
    path.write_text(json.dumps(written, indent=2) + "\n")


def _of_numbers(result: dict[str, Any]) -> dict[str, Any]:
    """With ``None`` for what is infinite, which JSON does not know."""
    return {key: None if value == math.inf else value for key, value in result.items()}


if __name__ == "__main__":
    sys.exit(main())
