"""Pictures of what was measured: `python -m benchmarks --pictures FOLDER`."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from ._measure import Result


def draw(claim: str, results: Sequence[Result], folder: pathlib.Path) -> pathlib.Path | None:
    """Draw the results of a claim; ``None`` if there is no picture of it, or no matplotlib."""
    if claim not in _PICTURES:
        return None
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(9.0, 3.4), layout="constrained")
    _PICTURES[claim](figure, results)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{claim}.png"
    figure.savefig(path, dpi=150)
    return path


def _against_loop(figure: Any, results: Sequence[Result]) -> None:
    """Ratios over rows, and over draws, of each model."""
    cells: dict[str, dict[tuple[int, int], float]] = {}
    for result in results:
        parts = result.case.split(", ")
        if len(parts) == 4 and parts[0] == "weights":
            rows, draws = (int(part.split()[0]) for part in parts[2:])
            cells.setdefault(parts[1], {})[rows, draws] = result.ratio
    over_rows, over_draws = figure.subplots(1, 2, sharey=True)
    of_draws = sorted({draws for of_model in cells.values() for _, draws in of_model})
    some = of_draws[len(of_draws) // 2]
    for name, of_model in cells.items():
        for axes, fixed, varied in ((over_rows, 1, 0), (over_draws, 0, 1)):
            at = {0: 1, 1: some}[fixed]
            points = sorted((cell[varied], ratio) for cell, ratio in of_model.items() if cell[fixed] == at)
            if points:
                axes.plot(*zip(*points, strict=True), "o-", markersize=3, label=name)
    for axes, xlabel, title in (
        (over_rows, "rows", f"{some} draws of the weights"),
        (over_draws, "draws", "1 row"),
    ):
        axes.axhline(1.0, color="0.6", linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel=xlabel, title=title)
        _plain_ticks(axes, (0.5, 1, 2, 4, 8, 16, 32, 64))
    over_rows.set_ylabel("times faster than the best loop")
    over_rows.legend(fontsize="small", loc="upper right")  # where lines have come down


def _over_sizes(figure: Any, results: Sequence[Result]) -> None:
    """Times over draws, rows and parameters, beside straight growth."""
    kinds = ("draws", "rows", "parameters")
    for axes, kind in zip(figure.subplots(1, 3, sharey=True), kinds, strict=True):
        points = [(int(r.case.split()[0]), r.ours_ms) for r in results if r.case.endswith(f" {kind}")]
        sizes, times = zip(*points, strict=True)
        axes.plot(sizes, times, "o-", markersize=3, label="predict")
        straight = [times[-1] * size / sizes[-1] for size in sizes]
        axes.plot(sizes, straight, ":", color="0.6", label="in proportion")
        axes.set(xscale="log", yscale="log", xlabel=kind)
    figure.axes[0].set_ylabel("milliseconds")
    figure.axes[0].set_ylim(bottom=min(r.ours_ms for r in results) / 2)
    figure.axes[0].legend(fontsize="small")


def _memory(figure: Any, results: Sequence[Result]) -> None:
    """Peaks over draws."""
    axes = figure.subplots()
    curves: dict[str, list[tuple[int, float]]] = {}
    for result in results:
        name, rows, draws = result.case.split(", ")
        curves.setdefault(f"{name}, {rows}", []).append((int(draws.split()[0]), result.ours_mb or 0.0))
    for label, points in curves.items():
        axes.plot(*zip(*points, strict=True), "o-", markersize=3, label=label)
    axes.set(xscale="log", xlabel="draws", ylabel="peak of memory in MB", ylim=(0, None))
    axes.set_xticks([draws for draws, _ in next(iter(curves.values()))])
    _plain_ticks(axes, None)
    axes.legend(fontsize="small", loc="lower right")


def _plain_ticks(axes: Any, levels: Sequence[float] | None) -> None:
    """Numbers as they are, not as powers of ten."""
    if levels is not None:
        axes.set_yticks(levels, [f"{level:g}" for level in levels], minor=False)
        axes.set_yticks([], minor=True)
        return
    axes.set_xticks(ticks := axes.get_xticks(), [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)


_PICTURES: dict[str, Callable[[Any, Sequence[Result]], None]] = {
    "predict_against_loop": _against_loop,
    "predict_cost_over_sizes": _over_sizes,
    "predict_memory_over_draws": _memory,
}
