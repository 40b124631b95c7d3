"""Pictures of a run: readable PNGs that show what was given, drawn without touching pyplot's state."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from modeling_tvrn.plots import plot_search_results, plot_shortlist, plot_training_curve

HISTORY: list[dict[str, Any]] = [
    {"step": 10, "loss": 3.0, "matching_loss": 2.0, "learning_rate": 1e-3},
    {"step": 20, "loss": 2.0, "matching_loss": 1.5, "learning_rate": 1e-3},
    {"step": 20, "rsum": 120.0},
    {"step": 30, "loss": float("nan"), "matching_loss": None},
    {"step": 40, "loss": 1.0, "matching_loss": 0.7},
    {"step": 40, "rsum": 250.0},
]
FRAME = np.array([0x1A, 0x7F, 0x37])


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def photographs(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (40, 31), (200, 10 * number, 60)) for number in range(count)]


def framed_columns(picture: np.ndarray) -> np.ndarray:
    """Columns that hold a long vertical line in the frame's green."""
    return np.flatnonzero((np.abs(picture - FRAME).max(-1) < 4).sum(0) > 100)


@pytest.mark.slow
def test_curve_has_a_panel_for_losses_and_one_for_rsum(tmp_path: Path) -> None:
    both = pixels(plot_training_curve(HISTORY, tmp_path / "new" / "both.png", chance=11.0))
    losses = pixels(plot_training_curve([event for event in HISTORY if "rsum" not in event], tmp_path / "losses.png"))
    rsum = pixels(plot_training_curve([event for event in HISTORY if "rsum" in event], tmp_path / "rsum.png"))
    assert both.shape[1] > 1.5 * losses.shape[1] and losses.shape == rsum.shape
    assert both.std() > 10


def test_curve_draws_the_chosen_keys(tmp_path: Path) -> None:
    """A caller whose history has other names must not get an empty panel."""
    history = [{"step": step, "objective": 1.0 / step, "val_rsum": 10.0 * step} for step in (1, 2, 3)]
    path = plot_training_curve(history, tmp_path / "a.png", loss_keys=["objective"], rsum_key="val_rsum")
    assert pixels(path).shape[1] > 1400
    with pytest.raises(ValueError, match="objective.*loss_keys"):
        plot_training_curve(history, tmp_path / "b.png")


def test_curve_refuses_what_it_cannot_draw(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="empty"):
        plot_training_curve([], tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"history\[1\].*'step'"):
        plot_training_curve([{"step": 1, "loss": 1.0}, {"loss": 0.5}], tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_right_answers_and_only_those_are_framed(tmp_path: Path) -> None:
    """The frame is what a reader looks at first: it must sit on the right column."""
    scores = [0.9, 0.5, 0.25]
    columns = {}
    for right in range(3):
        positives = [number == right for number in range(3)]
        path = plot_search_results("two dogs", photographs(3), scores, tmp_path / f"{right}.png", positives=positives)
        columns[right] = framed_columns(pixels(path))
    width = pixels(tmp_path / "0.png").shape[1]
    assert columns[0].max() < width * 0.335 < columns[1].min() < columns[1].max() < width * 0.665 < columns[2].min()
    assert not framed_columns(pixels(plot_search_results("two dogs", photographs(3), scores, tmp_path / "n.png"))).size


def test_results_keep_their_order_and_wrap_to_rows(tmp_path: Path) -> None:
    one_row = pixels(plot_search_results("dogs", photographs(5), [0.5] * 5, tmp_path / "5.png"))
    two_rows = pixels(plot_search_results("dogs", photographs(7), [0.5] * 7, tmp_path / "7.png"))
    assert one_row.shape[1] == two_rows.shape[1] and two_rows.shape[0] > 1.7 * one_row.shape[0]
    reds = (one_row[..., 0] == 200) & (one_row[..., 2] == 60)
    found = [one_row[:, column, 1][reds[:, column]] for column in np.flatnonzero(reds.sum(0) > 50)]
    greens = [int(np.median(column)) for column in found]
    assert greens == sorted(greens) and set(greens) == {0, 10, 20, 30, 40}


def test_queries_are_text_not_formulas(tmp_path: Path) -> None:
    """Users type dollar signs and backslashes; matplotlib would read them as mathematics and fail."""
    path = plot_search_results(r"a $5 \bad note and $", photographs(1), [1.0], tmp_path / "q.png", labels=[r"$\x$"])
    assert pixels(path).size


def test_results_of_unequal_length_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 scores for 3 images"):
        plot_search_results("dogs", photographs(3), [0.5, 0.4], tmp_path / "q.png")
    with pytest.raises(ValueError, match="1 labels for 3 images"):
        plot_search_results("dogs", photographs(3), [0.5] * 3, tmp_path / "q.png", labels=["one"])
    with pytest.raises(ValueError, match="no images"):
        plot_search_results("dogs", [], [], tmp_path / "q.png")


@pytest.mark.slow
def test_matplotlib_loads_late_and_pyplot_never(tmp_path: Path) -> None:
    """Importing pyplot picks a backend for the whole process: a training server has none, a notebook has its own."""
    code = (
        "import sys\n"
        "from modeling_tvrn.plots import plot_training_curve\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"plot_training_curve([{{'step': 1, 'loss': 1.0}}], {str(tmp_path / 'c.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


@pytest.mark.slow
def test_shortlist_curves_show_every_search_and_what_exhaustive_scoring_takes(tmp_path: Path) -> None:
    """Any order of the points draws the same picture; another value of exhaustive scoring moves its line."""
    points = [{"shortlist_size": 2**n, "rsum": 100.0 + 20 * n, "seconds": 0.5 * 2**n} for n in range(5)]
    exact = {"rsum": 181.0, "seconds": 40.0}
    first = pixels(plot_shortlist(points, tmp_path / "new" / "a.png", exhaustive=exact))
    again = pixels(plot_shortlist(points[::-1], tmp_path / "b.png", exhaustive=exact))
    other = pixels(plot_shortlist(points, tmp_path / "c.png", exhaustive=exact | {"seconds": 400.0}))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    with pytest.raises(ValueError, match=r"point 1 has no \['seconds'\]"):
        plot_shortlist([points[0], {"shortlist_size": 2, "rsum": 3.0}], tmp_path / "d.png", exhaustive=exact)
    with pytest.raises(ValueError, match="no points to draw"):
        plot_shortlist([], tmp_path / "d.png", exhaustive=exact)


def test_the_readmes_figure_is_what_its_script_draws(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[1]
    script = runpy.run_path(str(root / "examples" / "draw_architecture.py"))
    kept = root / "examples" / "pictures" / "architecture.png"
    assert pixels(script["draw"](tmp_path / "drawn.png")).shape == pixels(kept).shape
    assert pixels(kept).shape[1] > 1200 and kept.stat().st_size < 60_000
    assert np.abs(pixels(tmp_path / "drawn.png") - pixels(kept)).mean() < 2  # fonts differ by version
