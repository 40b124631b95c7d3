"""What `false_negatives` finds, as a parquet table and as a page with photographs and captions."""

import base64
import html
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

TABLE, PAGE = "false_negatives.parquet", "false_negatives.html"
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1c1c1c; margin: 2rem auto; max-width: 68rem; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.5rem }
article { display: grid; grid-template-columns: 5.5rem 1fr 1fr; gap: 1rem; padding: .9rem 0 }
article { border-top: 1px solid #ddd }
figure { margin: 0; display: flex; gap: .8rem; align-items: flex-start }
figcaption { overflow-wrap: anywhere } small { color: #666; display: block }
.cosines { font-variant-numeric: tabular-nums }
table { border-collapse: collapse } td, th { padding: .25rem .9rem .25rem 0; text-align: right }
th:first-child, td:first-child { text-align: left }
"""


def write_duplicates(
    folder: str | os.PathLike[str],
    records: Any,
    table: Sequence[Mapping[str, Any]],
    counts: Mapping[str, Mapping[str, Any]],
    *,
    name: str,
    thresholds: Mapping[str, float],
    shown: int = 60,
    thumbnail: int = 168,
) -> tuple[Path, Path]:
    """Write all pairs found as a table, and the first of them as a page that needs no other file.

    Args:
        folder: where; made if need be.
        records: map-style, whose pairs these are; the photographs shown are decoded.
        table, counts: as `false_negatives` gives them.
        name: what the data are called in the title.
        thresholds: by teacher ("image", "text"), as the pairs were looked for.
        shown: pairs for each teacher on the page.
        thumbnail: longest side of a photograph on the page, in pixels.

    Returns:
        Paths of the table and of the page.
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    columns = list(table) or [dict.fromkeys(("first_image_id", "second_image_id", "image_cosine", "text_cosine"))]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(columns).slice(0, len(table)), place / TABLE)
    parts = [_head(name), _counts(counts, thresholds)]
    headings = {"text": "Captions that say the same", "image": "Photographs that look the same"}
    for side, heading in headings.items():
        if side in counts:
            own = [row for row in table if side in row["found_by"].split("+")]
            own.sort(key=lambda row: -row[f"{side}_cosine"])
            parts.append(f"<h2>{heading}</h2><p>The first {min(shown, len(own))} of {len(own)}.</p>")
            parts += [_article(records, row, thumbnail) for row in own[:shown]]
    (place / PAGE).write_text("\n".join(parts) + "\n</html>\n", encoding="utf-8")
    return place / TABLE, place / PAGE


def _head(name: str) -> str:
    title = f"False negatives of {html.escape(name)}"
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>\n"
        f"<h1>{title}</h1><p>Each row shows two photographs and a caption of each. In training every one of them is a "
        "negative for the other&#8217;s, although a teacher calls them near-duplicates; its cosine stands before "
        "them.</p>"
    )


def _counts(counts: Mapping[str, Mapping[str, Any]], thresholds: Mapping[str, float]) -> str:
    """How many pairs each teacher found, and what that means for a batch."""
    lines = [
        "<table><tr><th>teacher<th>threshold<th>near-duplicates<th>of pairs<th>wrong negatives in a batch of 128</tr>"
    ]
    for side, found in counts.items():
        lines.append(
            f"<tr><td>{side}<td>{thresholds[side]:.2f}<td>{found['pairs']:,}<td>{found['compared']:,}"
            f"<td>{found['wrong_negatives']:.2f}</tr>"
        )
    return "\n".join([*lines, "</table>"])


def _article(records: Any, row: Mapping[str, Any], side: int) -> str:
    """Two photographs with their captions and ids."""
    cosines = [
        f"<small>{name}</small>{row[f'{name}_cosine']:.3f}"
        for name in ("text", "image")
        if row[f"{name}_cosine"] is not None
    ]
    figures = [
        f'<figure><img src="{_thumbnail(records[row[f"{which}_row"]]["image"], side)}" alt="">'
        f"<figcaption>{html.escape(row[f'{which}_caption'])}"
        f"<small>{html.escape(str(row[f'{which}_image_id']))}</small></figcaption></figure>"
        for which in ("first", "second")
    ]
    return f"<article><div class=cosines>{''.join(cosines)}</div>{''.join(figures)}</article>"


def _thumbnail(image: Any, side: int) -> str:
    """A small JPEG of a photograph as a data URL."""
    small = image.convert("RGB")
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
