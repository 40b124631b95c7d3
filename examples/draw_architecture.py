"""Draw how an image and a caption get their score: the README's figure.

python examples/draw_architecture.py examples/pictures/architecture.png
"""

import itertools
import sys
from pathlib import Path

from matplotlib.patches import FancyBboxPatch
from PIL import Image

from modeling_tvrn.plots import INK, LINES, MUTED, new_figure, save_figure

IMAGE, TEXT, PAIR = LINES[:3]
SIDES = (  # colour, height, boxes from left to right
    (IMAGE, 27, (("Image", "pixels"), ("Vision tower", "any of the Hub"), ("Regions", "+ an embedding"))),
    (TEXT, 4, (("Caption", "tokens"), ("Text tower", "any, or a BiGRU"), ("Words", "+ an embedding"))),
)
STAGES = (  # from the cheap to the expensive: height, weight, name, what it does
    (30, "× 1", "First stage", "scaled cosine of the embeddings"),
    (15.5, "× w₁", "Late interaction", "words against regions"),
    (1, "× w₂", "Reasoning", "TVRN: both refined by each other"),
)
COLUMNS = ((1, 11), (15, 15.5), (33.5, 14))  # left edge and width
BOX, BUSES, JOIN = 9, {IMAGE: 50, TEXT: 52}, 90


def draw(path: Path) -> Path:
    """Write the figure as a PNG of few colours."""
    figure = new_figure(8.8, 3.6, "")
    figure.set_layout_engine("none")  # the axes are the whole figure
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 101), ylim=(0, 41))
    axes.set_axis_off()

    def box(x: float, y: float, width: float, title: str, about: str, color: str) -> None:
        form = "round,pad=0,rounding_size=1"
        axes.add_patch(
            FancyBboxPatch((x, y), width, BOX, form, facecolor=color + "14", edgecolor=color, linewidth=1.3)
        )
        for rise, text, size, weight in ((6, title, 10, "bold"), (2.6, about, 8.3, "normal")):
            axes.text(x + width / 2, y + rise, text, ha="center", va="center", size=size, color=INK, weight=weight)

    def arrow(x: float, y: float, end: float, color: str) -> None:
        style = {"arrowstyle": "-|>", "color": color, "linewidth": 1.3, "shrinkA": 0, "shrinkB": 1}
        axes.annotate("", (end, y), (x, y), arrowprops=style)

    for color, y, boxes in SIDES:
        for (x, width), (title, about) in zip(COLUMNS, boxes, strict=True):
            box(x, y, width, title, about, color)
        for (x, width), (following, _) in itertools.pairwise(COLUMNS):
            arrow(x + width, y + BOX / 2, following, color)
        shift = 1.6 if color == IMAGE else -1.6
        taps = [stage[0] + BOX / 2 + shift for stage in STAGES]
        bus, last = BUSES[color], COLUMNS[-1]
        axes.plot([sum(last), bus], [y + BOX / 2] * 2, color=color, linewidth=1.3)
        axes.plot([bus, bus], [min(taps), max(taps)], color=color, linewidth=1.3)
        for tap in taps:
            arrow(bus, tap, 55.5, color)
    axes.text(
        22.7, 20, "or both at once: a dual encoder", ha="center", va="center", size=8.3, color=MUTED, style="italic"
    )

    for y, weight, title, about in STAGES:
        box(55.5, y, 28, title, about, PAIR)
        axes.plot([83.5, JOIN], [y + BOX / 2] * 2, color=MUTED, linewidth=1.3)
        axes.text(87, y + BOX / 2 + 1.7, weight, ha="center", va="center", size=9, color=INK)
    heights = [stage[0] + BOX / 2 for stage in STAGES]
    axes.plot([JOIN, JOIN], [min(heights), max(heights)], color=MUTED, linewidth=1.3)
    arrow(JOIN, heights[1], 94, MUTED)
    axes.text(92, heights[1] + 2, "Σ", ha="center", va="center", size=11, color=INK)
    axes.text(97.2, heights[1], "pair\nlogit", ha="center", va="center", size=10, color=INK, weight="bold")
    save_figure(figure, path)
    with Image.open(path) as image:
        few = image.convert("RGB").quantize(64)
    few.save(path, optimize=True)
    return path


if __name__ == "__main__":
    print(draw(Path(sys.argv[1] if len(sys.argv) > 1 else "architecture.png")))
