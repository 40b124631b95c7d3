"""An explanation drawn with matplotlib: the score's parts as bars, and for every word where it looks."""

from __future__ import annotations

import textwrap
from math import ceil
from typing import TYPE_CHECKING

import numpy as np

from ..plots import GRID, INK, MUTED, OTHER, POSITIVE, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .explanation import ExplanationData, WordExplanation

COST = "#b23a48"
HEAT = (0.85, 0.16, 0.10)  # a heatmap's colour; its opacity is the attention
CELL = 1.9  # inches of one picture
WORD_PARTS = ("words", "late interaction")  # of the logit, which the words' own numbers add up to
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
    views = [] if explanation.boxes is None else _views(explanation)
    columns = max(min(columns, len(views)), 3)
    rows = ceil(len(views) / columns)
    bars = bar_rows(explanation)
    heights = [0.22 * len(bars) + 0.7, *[CELL + 0.3] * rows]
    heading = textwrap.fill(f"“{explanation.caption}”", width=14 * columns)
    title = f"{heading}\nlogit {explanation.logit:.2f}, {explanation.score_kind} {explanation.score:.3f}"
    figure = new_figure(CELL * columns, sum(heights) + 0.3 * (title.count("\n") + 1), title)
    layout = figure.add_gridspec(rows + 1, columns, height_ratios=heights)
    _draw_bars(figure.add_subplot(layout[0, :]), bars, _bar_title(explanation))
    for number in range(rows * columns):
        axes = figure.add_subplot(layout[1 + number // columns, number % columns])
        if number < len(views):
            _draw_regions(axes, explanation, *views[number])
        else:
            axes.set_axis_off()
    return figure


def _views(explanation: ExplanationData) -> list[tuple[np.ndarray, str, str, str]]:
    """Each small picture: numbers of the regions, title, its colour, what is written below."""
    weight = explanation.region_weight
    views = [(weight, "the caption looks", INK, _most(weight))]
    if explanation.region_without is not None:
        rests = explanation.region_without.clip(min=0)
        views.append((rests, "the score rests on", INK, f"a region at most {rests.max():+.2f}"))
    return views + [(word.attention, *_word_title(word), _most(word.attention)) for word in explanation.words]


def _most(weights: np.ndarray) -> str:
    return f"at most {100 * weights.max():.0f} % in a region"


def bar_rows(explanation: ExplanationData) -> list[tuple[str, float]]:
    """(label, number) of each bar: the parts that add up to the logit; for an SGR head what each word matters."""
    words = [(word.text, word.contribution) for word in explanation.words if word.contribution is not None]
    if words:
        return words + [(name, value) for name, value in explanation.parts.items() if name not in WORD_PARTS]
    left_out = [(word.text, word.without) for word in explanation.words if word.without is not None]
    return left_out or list(explanation.parts.items())


def _bar_title(explanation: ExplanationData) -> str:
    if explanation.words[0].contribution is not None:
        return "what adds up to the logit (below: where each word looks, and what the logit loses without it)"
    return "logit lost without the word" if explanation.words[0].without is not None else "what adds up to the logit"


def _draw_bars(axes: Axes, bars: list[tuple[str, float]], title: str) -> None:
    values = np.array([value for _, value in bars])
    places = np.arange(len(bars))[::-1]
    axes.barh(places, values, height=0.7, color=[POSITIVE if value >= 0 else COST for value in values])
    span = max(float(values.max(initial=0) - values.min(initial=0)), 1e-6)
    for place, value in zip(places, values, strict=True):
        side = "left" if value >= 0 else "right"
        axes.annotate(f"{value:+.2f}", (value, place), xytext=(3 if value >= 0 else -3, 0), ha=side, va="center",
                      textcoords="offset points", fontsize=7, color=MUTED)  # fmt: skip
    axes.set_yticks(places, [label for label, _ in bars], fontsize=8, color=INK, parse_math=False)
    axes.set_xlim(values.min(initial=0) - 0.14 * span, values.max(initial=0) + 0.14 * span)
    axes.set_title(title, fontsize=9, color=INK, loc="left")
    axes.axvline(0, color=MUTED, linewidth=0.8)
    axes.tick_params(axis="x", labelsize=7, colors=MUTED)
    axes.grid(axis="x", color=GRID)
    axes.set_axisbelow(True)
    for name in ("top", "right", "left"):
        axes.spines[name].set_visible(False)


def _word_title(word: WordExplanation) -> tuple[str, str]:
    value = word.without if word.without is not None else word.contribution
    label = textwrap.shorten(word.text, 20, placeholder="…")
    colour = INK if value is None else POSITIVE if value >= 0 else COST
    return (label if value is None else f"{label}  {value:+.2f}"), colour


def _draw_regions(
    axes: Axes, explanation: ExplanationData, weights: np.ndarray, title: str, colour: str, below: str
) -> None:
    """The picture under a heatmap (grids) or with the boxes of the most weight (detectors)."""
    if explanation.picture is not None:
        axes.imshow(explanation.picture, extent=(0, 1, 1, 0), aspect="auto")
    else:
        axes.set_facecolor("#f2f4f6")
    if explanation.grid is not None:
        heat = np.zeros((*explanation.grid, 4))
        heat[..., :3] = HEAT
        heat[..., 3] = 0.75 * relative(weights).reshape(explanation.grid)
        axes.imshow(heat, extent=(0, 1, 1, 0), aspect="auto", interpolation="nearest")
    elif explanation.boxes is not None:
        _draw_boxes(axes, explanation.boxes, weights)
    axes.set_xlim(0, 1)
    axes.set_ylim(1, 0)
    axes.set_box_aspect(1 if explanation.picture is None else explanation.picture.height / explanation.picture.width)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=8, color=colour, parse_math=False)
    axes.set_xlabel(below, fontsize=6, color=MUTED, labelpad=2)
    for spine in axes.spines.values():
        spine.set_color(OTHER)


def _draw_boxes(axes: Axes, boxes: np.ndarray, weights: np.ndarray) -> None:
    from matplotlib.patches import Rectangle

    for region in np.argsort(-weights, kind="stable")[:BOXES][::-1]:
        left, top, right, bottom = boxes[region]
        strength = float(relative(weights)[region])
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=HEAT,
                                 linewidth=1 + 2 * strength, alpha=0.35 + 0.65 * strength))  # fmt: skip
        axes.annotate(f"{100 * weights[region]:.0f} %", (left, top), xytext=(2, -2), textcoords="offset points",
                      va="top", fontsize=6, color="white",
                      bbox={"facecolor": HEAT, "edgecolor": "none", "pad": 1})  # fmt: skip


def relative(weights: np.ndarray) -> np.ndarray:
    """0 for the region looked at least, 1 for the one most: an even attention shows as nothing special."""
    spread = float(weights.max() - weights.min())
    return (weights - weights.min()) / spread if spread > 1e-9 else np.zeros_like(weights)
