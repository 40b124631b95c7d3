"""Pictures of a run for its folder and its README: the training curve, and what one text query finds.

matplotlib is imported when a picture is drawn, and drawn on a canvas of its own: pyplot's state is never touched.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from math import ceil, isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

__all__ = [
    "new_figure",
    "plot_calibration",
    "plot_search_results",
    "plot_shortlist",
    "plot_training_curve",
    "save_figure",
]

INK, MUTED, GRID = "#1f2933", "#6b7785", "#e4e8ec"
POSITIVE, OTHER = "#1a7f37", "#c3cad2"
LINES = ("#2f6fb5", "#d1782b", "#1a7f37", "#8a4fa8", "#b23a48", "#6b7785")
DPI = 150
MAX_COLUMNS = 5


def plot_training_curve(
    history: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    loss_keys: Sequence[str] | None = None,
    rsum_key: str = "rsum",
    chance: float | None = None,
    title: str = "Training",
) -> Path:
    """Draw the loss parts and the validation rSum against the step.

    Args:
        history: one mapping a logged event; `step` in each, losses and rSum (percent) where they were measured.
        path: the PNG to write; missing folders are made.
        loss_keys: what the left panel shows; by default every key that is `loss` or holds "loss".
        rsum_key: what the right panel shows; it is left out where the history has none.
        chance: rSum of a random ranking, drawn as a dotted line.
        title: written above.

    Returns:
        The path written to.

    Raises:
        ValueError: for an empty history, events without `step`, or no finite value to draw.
    """
    if not history:
        raise ValueError("history is empty; expected one mapping with 'step' for each logged event")
    for number, event in enumerate(history):
        if "step" not in event:
            raise ValueError(f"history[{number}] has no 'step' (keys: {sorted(event)}); add the optimizer step")
    if loss_keys is None:  # the total first
        named = dict.fromkeys(key for event in history for key in event if "loss" in key and "weight" not in key)
        loss_keys = sorted(named, key=lambda key: key != "loss")
    losses = {key: series for key in loss_keys if (series := _series(history, key))[0]}
    rsum = _series(history, rsum_key)
    if not losses and not rsum[0]:
        known = sorted({key for event in history for key in event})
        raise ValueError(
            f"history has no finite loss and no {rsum_key!r} (keys: {known}); name them by loss_keys and rsum_key"
        )
    panels = bool(losses) + bool(rsum[0])
    figure = new_figure(4.8 * panels + 0.4, 3.6, title)
    axes = list(figure.subplots(1, panels, squeeze=False, sharex=True)[0])
    if losses:
        _draw_losses(axes.pop(0), losses)
    if rsum[0]:
        _draw_rsum(axes.pop(0), *rsum, chance=chance)
    return save_figure(figure, path)


def _series(history: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of one key where it is a finite number."""
    points = [(float(event["step"]), float(event[key])) for event in history if event.get(key) is not None]
    finite = [(step, value) for step, value in points if isfinite(value)]
    return [step for step, _ in finite], [value for _, value in finite]


def new_figure(width: float, height: float, title: str) -> Figure:
    """A figure on a canvas of its own, sizes in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(title, color=INK, fontsize=12, fontweight="bold", parse_math=False)  # a "$" in a query is a "$"
    return figure


def _style(axes: Axes, title: str, ylabel: str) -> None:
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.set_xlabel("step", color=MUTED, fontsize=9)
    axes.set_ylabel(ylabel, color=MUTED, fontsize=9)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GRID)


def _draw_losses(axes: Axes, losses: Mapping[str, tuple[list[float], list[float]]]) -> None:
    _style(axes, "Loss", "loss")
    for number, (key, (steps, values)) in enumerate(losses.items()):
        name = key.rsplit("/", 1)[-1].replace("_", " ")
        label = name if name == "loss" else name.removesuffix(" loss").removeprefix("loss ")
        axes.plot(
            steps, values, color=LINES[number % len(LINES)], label="total" if label == "loss" else label,
            linewidth=2.0 if label == "loss" else 1.3, marker="o" if len(steps) == 1 else None,
        )  # fmt: skip
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)


def _draw_rsum(axes: Axes, steps: list[float], values: list[float], chance: float | None) -> None:
    _style(axes, "Validation rSum (six recalls, of 600)", "rSum, percent")
    axes.plot(steps, values, color=LINES[0], linewidth=2.0, marker="o", markersize=3.5)
    best = max(range(len(values)), key=values.__getitem__)
    axes.plot(steps[best], values[best], marker="o", markersize=7, color=POSITIVE)
    axes.annotate(
        f"{values[best]:.1f}", (steps[best], values[best]), textcoords="offset points", xytext=(0, 7),
        ha="center", fontsize=9, color=POSITIVE, fontweight="bold",
    )  # fmt: skip
    if chance is not None:
        axes.axhline(chance, color=MUTED, linestyle=":", linewidth=1.2)
        axes.annotate(
            f"chance {chance:.1f}", (steps[-1], chance), textcoords="offset points", xytext=(0, 4), ha="right",
            fontsize=8, color=MUTED,
        )  # fmt: skip
    axes.set_ylim(0, max(values[best], chance or 0.0) * 1.12 + 1)


def plot_shortlist(
    points: Sequence[Mapping[str, float]],
    path: str | Path,
    *,
    exhaustive: Mapping[str, float],
    title: str = "Search and rerank",
) -> Path:
    """Draw recall and time of a two-stage search against its shortlist, beside exhaustive scoring.

    Args:
        points: one mapping a search, with `shortlist_size`, `rsum` (percent) and `seconds`.
        path: the PNG to write; missing folders are made.
        exhaustive: `rsum` and `seconds` of scoring every pair, drawn as dotted lines.
        title: written above.

    Returns:
        The path written to.

    Raises:
        ValueError: for no points, or one without those values.
    """
    for number, point in enumerate([*points, exhaustive]):
        if missing := {"rsum", "seconds", *(["shortlist_size"] if number < len(points) else [])} - set(point):
            raise ValueError(f"point {number} has no {sorted(missing)} (keys: {sorted(point)}); add them")
    if not points:
        raise ValueError("no points to draw; give the metrics of at least one shortlist_size")
    points = sorted(points, key=lambda point: point["shortlist_size"])
    sizes = [point["shortlist_size"] for point in points]
    figure = new_figure(10.0, 3.6, title)
    panels = (("rsum", "rSum (six recalls, of 600)", "rSum, percent"), ("seconds", "Time", "seconds"))
    for axes, color, (key, heading, label) in zip(figure.subplots(1, 2), LINES, panels, strict=False):
        _style(axes, heading, label)
        axes.set_xlabel("shortlist size, candidates a query", color=MUTED, fontsize=9)
        axes.plot(sizes, [point[key] for point in points], color=color, linewidth=2.0, marker="o", markersize=3.5)
        axes.axhline(exhaustive[key], color=MUTED, linestyle=":", linewidth=1.2)
        axes.annotate(
            f"every pair {exhaustive[key]:.1f}", (sizes[0], exhaustive[key]), textcoords="offset points",
            xytext=(0, 4), ha="left", fontsize=8, color=MUTED,
        )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [f"{size:g}" for size in sizes], minor=False)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.tick_params(colors=MUTED, labelsize=8, which="both")
    return save_figure(figure, path)


def plot_calibration(
    bins: Sequence[tuple[float, float, int]], path: str | Path, *, title: str = "Does the best hit fit?"
) -> Path:
    """Draw how often best hits are right against their probability, and how many there are.

    Args:
        bins: mean probability, share that is right, and number of hits, of each range of probabilities.
        path: the PNG to write; missing folders are made.
        title: written above.

    Returns:
        The path written to.

    Raises:
        ValueError: for no bins.
    """
    if not bins:
        raise ValueError("no bins to draw; give the probabilities of at least one best hit")
    means, shares, counts = zip(*bins, strict=True)
    figure = new_figure(10.0, 3.6, title)
    curve, numbers = figure.subplots(1, 2)
    _style(curve, "Calibration (dotted: perfect)", "share of best hits that are right")
    curve.plot((0, 1), (0, 1), color=MUTED, linestyle=":", linewidth=1.2)
    curve.plot(means, shares, color=LINES[0], linewidth=2.0, marker="o", markersize=3.5)
    curve.set_ylim(-0.02, 1.02)
    _style(numbers, "Queries, half of them without their image", "best hits")
    numbers.bar(means, counts, width=0.06, color=LINES[1])
    for axes in (curve, numbers):
        axes.set_xlabel("probability of the best hit", color=MUTED, fontsize=9)
        axes.set_xlim(-0.02, 1.02)
    return save_figure(figure, path)


def plot_search_results(
    query: str,
    images: Sequence[Image],
    scores: Sequence[float],
    path: str | Path,
    *,
    positives: Sequence[bool] | None = None,
    labels: Sequence[str] | None = None,
) -> Path:
    """Draw the images a text query found, best first, each with its score; the right answers are framed in green.

    Args:
        query: the text.
        images: the k images found, in the order found.
        scores: their k scores.
        path: the PNG to write; missing folders are made.
        positives: whether each image is a right answer; None where that is unknown.
        labels: a line under each image, such as its file name or one of its captions.

    Returns:
        The path written to.

    Raises:
        ValueError: for no images, or lists of different lengths.
    """
    if not images:
        raise ValueError("no images to show; give at least one search result")
    for name, values in (("scores", scores), ("positives", positives), ("labels", labels)):
        if values is not None and len(values) != len(images):
            raise ValueError(f"{len(values)} {name} for {len(images)} images; give one an image")
    columns = min(len(images), MAX_COLUMNS)
    rows = ceil(len(images) / columns)
    width = max(1.9 * columns, 5.0)
    heading = textwrap.fill(f"“{query}”", width=max(30, int(width * 8.5)))
    height = rows * (2.55 if labels else 2.2) + 0.25 * (heading.count("\n") + 1) + 0.15
    figure = new_figure(width, height, heading)
    cells = figure.subplots(rows, columns, squeeze=False).ravel()
    for number, axes in enumerate(cells):
        if number >= len(images):
            axes.set_axis_off()
            continue
        right = positives is not None and bool(positives[number])
        _draw_result(axes, images[number], f"{number + 1}.   {scores[number]:.3f}", right)
        if labels:
            label = "\n".join(textwrap.wrap(labels[number], 28, max_lines=3, placeholder=" …"))
            axes.set_xlabel(label, fontsize=7, color=MUTED, parse_math=False)
    return save_figure(figure, path)


def _draw_result(axes: Axes, image: Image, heading: str, right: bool) -> None:
    axes.imshow(image.convert("RGB"), interpolation="nearest" if max(image.size) < 150 else "antialiased")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(heading, fontsize=9, color=POSITIVE if right else INK, fontweight="bold" if right else "normal")
    for spine in axes.spines.values():
        spine.set_color(POSITIVE if right else OTHER)
        spine.set_linewidth(3.5 if right else 1.0)


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure as a PNG; missing folders are made."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, format="png")
    return target
