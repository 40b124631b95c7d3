"""An explanation drawn with matplotlib: what each word adds as bars, and what in the picture the words rest on."""

from __future__ import annotations

import textwrap
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np

from ..plots import GRID, INK, MUTED, OTHER, POSITIVE, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .explanation import ExplanationData

COST = "#b23a48"
BOX = "#d9291a"
VEIL = 0.7  # opacity of the grey over what matters least: what matters stays in its own colours
VEIL_COLOUR = "#7b8794"  # neither a white object nor a black one looks like it
CELL = 1.9  # inches of one picture
MOST_WORDS = 8  # that get a picture: those with the largest numbers,
LEAST_NUMBER = 0.05  # and none below this part of the largest
LEAST_SIDE = 0.005  # of a strip beside the grid that is drawn
BOXES = 3  # a detector's boxes that are drawn for a word


def draw(explanation: ExplanationData, columns: int = 5) -> Figure:
    """The figure of an explanation.

    Args:
        explanation: Of `explain`.
        columns: Pictures a row.

    Raises:
        ValueError: If `columns` is below 1.
    """
    if columns < 1:
        raise ValueError(f"columns is {columns}; expected at least 1 picture a row")
    views = [] if explanation.cells is None else _views(explanation)
    columns = max(min(columns, len(views)), 3)
    rows = ceil(len(views) / columns)
    shape = 0.75 if explanation.picture is None else explanation.picture.height / explanation.picture.width
    cell = CELL * min(max(shape, 0.4), 1.5)
    heights = [0.22 * (len(explanation.summands) + 1) + 0.7, *[cell + 0.45] * rows]
    heading = textwrap.fill(f"“{explanation.caption}”", width=14 * columns)
    title = f"{heading}\n{explanation.score_kind} {explanation.score:.3f}"
    figure = new_figure(CELL * columns, sum(heights) + 0.3 * (title.count("\n") + 1), title)
    layout = figure.add_gridspec(rows + 1, columns, height_ratios=heights)
    _draw_bars(figure.add_subplot(layout[0, :]), explanation)
    for number in range(rows * columns):
        axes = figure.add_subplot(layout[1 + number // columns, number % columns])
        if number < len(views):
            _draw_regions(axes, explanation, *views[number])
        else:
            axes.set_axis_off()
    return figure


def _views(explanation: ExplanationData) -> list[tuple[np.ndarray | None, str, str]]:
    """Each small picture: strength of its regions (None: nothing is laid over it), title and its colour."""
    views: list[tuple[np.ndarray | None, str, str]] = []
    if explanation.picture is not None:
        views.append((None, "", INK))
    if (whole := explanation.strength(explanation.by_region)) is not None:
        views.append((whole, "the score rests on", INK))
    numbers = [abs(word.contribution) for word in explanation.words]
    largest = sorted(numbers, reverse=True)[:MOST_WORDS]
    least = max(largest[-1], LEAST_NUMBER * largest[0])
    for word, number in zip(explanation.words, numbers, strict=True):
        strength = explanation.strength(word.by_region)
        if number >= least and strength is not None:
            title = f"{textwrap.shorten(word.text, 20, placeholder='…')}  {word.contribution:+.2f}"
            views.append((strength, title, POSITIVE if word.contribution >= 0 else COST))
    return views


def _draw_bars(axes: Axes, explanation: ExplanationData) -> None:
    """A bar a word; the last two lines have numbers alone, which would dwarf the words."""
    rows = [*explanation.summands, ("logit", explanation.total)]
    words = np.array([value for _, value in rows[:-2]])
    places = np.arange(len(rows))[::-1]
    axes.barh(places[:-2], words, height=0.7, color=[POSITIVE if value >= 0 else COST for value in words])
    span = max(float(words.max(initial=0) - words.min(initial=0)), 1e-6)
    for place, (_, value) in zip(places, rows, strict=True):
        at = value if place > 1 else 0.0
        side = "left" if at >= 0 else "right"
        axes.annotate(f"{value:+.2f}", (at, place), xytext=(3 if at >= 0 else -3, 0), ha=side, va="center",
                      textcoords="offset points", fontsize=7, color=MUTED if place else INK)  # fmt: skip
    axes.set_yticks(places, [label for label, _ in rows], fontsize=8, color=INK, parse_math=False)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set_xlim(words.min(initial=0) - 0.14 * span, words.max(initial=0) + 0.14 * span)
    axes.set_title(
        "what the logit loses without each word; it all adds up to the logit", fontsize=9, color=INK, loc="left"
    )
    axes.axvline(0, color=MUTED, linewidth=0.8)
    axes.axhline(0.5, color=GRID, linewidth=0.8)
    axes.tick_params(axis="x", labelsize=7, colors=MUTED)
    axes.grid(axis="x", color=GRID)
    axes.set_axisbelow(True)
    for name in ("top", "right", "left"):
        axes.spines[name].set_visible(False)


def _draw_regions(
    axes: Axes, explanation: ExplanationData, strength: np.ndarray | None, title: str, colour: str
) -> None:
    """The picture, veiled where it matters less (grids), or with the boxes that matter most (detectors)."""
    from matplotlib.patches import Rectangle

    def add(box: np.ndarray, **look: Any) -> None:
        left, top, right, bottom = box
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, **look))

    if explanation.picture is not None:
        axes.imshow(explanation.picture, extent=(0, 1, 1, 0), aspect="auto")
    else:
        axes.set_facecolor("#d5dae0")
    veil = {"facecolor": VEIL_COLOUR, "linewidth": 0, "antialiased": False}
    if strength is not None and explanation.cells is not None and explanation.grid is not None:
        for box, each in zip(explanation.cells, strength, strict=True):
            add(box, alpha=VEIL * (1 - each), **veil)
        for box in unseen(explanation):
            add(box, alpha=VEIL, **veil)
    elif strength is not None and explanation.cells is not None:
        for region in np.argsort(-strength, kind="stable")[:BOXES][::-1]:
            if strength[region] > 0:
                add(explanation.cells[region], fill=False, edgecolor=BOX, linewidth=1 + 2 * strength[region],
                    alpha=0.35 + 0.65 * strength[region])  # fmt: skip
    axes.set_xlim(0, 1)
    axes.set_ylim(1, 0)
    axes.set_box_aspect(
        0.75 if explanation.picture is None else explanation.picture.height / explanation.picture.width
    )
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=8, color=colour, parse_math=False)
    for spine in axes.spines.values():
        spine.set_color(OTHER)


def unseen(explanation: ExplanationData) -> list[np.ndarray]:
    """Boxes of the picture that the model's grid leaves out, as a centre crop does."""
    if explanation.grid is None or explanation.cells is None:
        return []
    left, top = explanation.cells[:, :2].min(axis=0)
    right, bottom = explanation.cells[:, 2:].max(axis=0)
    sides = [(0, 0, left, 1), (right, 0, 1, 1), (left, 0, right, top), (left, bottom, right, 1)]
    return [np.array(side) for side in sides if side[2] - side[0] > LEAST_SIDE and side[3] - side[1] > LEAST_SIDE]
