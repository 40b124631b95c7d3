r"""Find training pairs that count as negatives though a teacher calls them near-duplicates.

    python examples/cache_teachers.py facebook/dinov2-base --modality image --data flickr8k --split train \
        --output teachers/dinov2-train
    python examples/cache_teachers.py sentence-transformers/all-mpnet-base-v2 --modality text --data flickr8k \
        --split train --output teachers/mpnet-train
    python examples/false_negatives.py --data flickr8k --split train --image-teacher teachers/dinov2-train \
        --text-teacher teachers/mpnet-train --output reports/false-negatives

The folder then holds false_negatives.parquet, all pairs found, and false_negatives.html, the first of them with
photographs and captions, in one file that needs nothing else.
"""

import argparse
import base64
import html
import io
import json
import logging
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from modeling_tvrn.data import load_pairs
from modeling_tvrn.teachers import TeacherCache, false_negatives

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


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    about, _, commands = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=commands, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="what load_pairs reads: flickr8k, coco, a folder, a Hub id, ...")
    parser.add_argument("--split", help="train, ... (may be left out where there is only one)")
    parser.add_argument("--image-teacher", help="cache of the photographs' vectors (examples/cache_teachers.py)")
    parser.add_argument("--text-teacher", help="cache of the captions' vectors")
    parser.add_argument("--image-threshold", type=float, default=0.9, help="cosine of near-duplicates (default 0.9)")
    parser.add_argument("--text-threshold", type=float, default=0.9, help="cosine of near-duplicates (default 0.9)")
    parser.add_argument("--limit", type=int, default=1000, help="pairs kept for each teacher (default 1000)")
    parser.add_argument("--shown", type=int, default=60, help="pairs for each teacher on the page (default 60)")
    parser.add_argument("--thumbnail", type=int, default=168, help="longest side of a picture in pixels (default 168)")
    parser.add_argument("--output", type=Path, required=True, help="folder of the table and the page")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Write the report that the command line asks for."""
    options = parse_arguments(arguments)
    records = load_pairs(options.data, options.split)
    caches = {
        side: TeacherCache.load(folder, modality=side) if folder is not None else None
        for side, folder in (("image", options.image_teacher), ("text", options.text_teacher))
    }
    table, counts = false_negatives(
        records, caches["image"], caches["text"], options.image_threshold, options.text_threshold, options.limit
    )
    options.output.mkdir(parents=True, exist_ok=True)
    columns = table or [dict.fromkeys(("first_image_id", "second_image_id", "image_cosine", "text_cosine"))]
    written = pyarrow.Table.from_pylist(columns).slice(0, len(table))
    pyarrow.parquet.write_table(written, options.output / "false_negatives.parquet")
    page = render(options, records, table, counts)
    (options.output / "false_negatives.html").write_text(page, encoding="utf-8")
    for side, found in counts.items():
        print(f"{side} teacher: {json.dumps(found)}")
    print(f"{len(table)} pairs of photographs: {options.output / 'false_negatives.html'}")
    return table


def render(options: argparse.Namespace, records: Any, table: list[dict[str, Any]], counts: dict[str, Any]) -> str:
    """The page: what was counted, then the pairs most alike by each teacher."""
    title = f"False negatives of {html.escape(str(Path(str(options.data)).name))}, {html.escape(options.split or '')}"
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>",
        f"<h1>{title}</h1><p>Each row shows two photographs and a caption of each. In training every one of them is a "
        "negative for the other&#8217;s, although a teacher calls them near-duplicates; its cosine stands before "
        "them.</p>",
        counts_table(options, counts),
    ]
    headings = {"text": "Captions that say the same", "image": "Photographs that look the same"}
    for side, heading in headings.items():
        own = [row for row in table if side in row["found_by"].split("+")]
        own.sort(key=lambda row: -row[f"{side}_cosine"])
        if side in counts:
            shown = own[: options.shown]
            parts.append(f"<h2>{heading}</h2><p>The first {len(shown)} of {len(own)}.</p>")
            parts += [article(records, row, options.thumbnail) for row in shown]
    return "\n".join(parts) + "\n</html>\n"


def counts_table(options: argparse.Namespace, counts: dict[str, Any]) -> str:
    """How many pairs each teacher found, and what that means for a batch."""
    lines = [
        "<table><tr><th>teacher<th>threshold<th>near-duplicates<th>of pairs<th>wrong negatives in a batch of 128</tr>"
    ]
    for side, found in counts.items():
        threshold = getattr(options, f"{side}_threshold")
        lines.append(
            f"<tr><td>{side}<td>{threshold:.2f}<td>{found['pairs']:,}<td>{found['compared']:,}"
            f"<td>{found['wrong_negatives']:.2f}</tr>"
        )
    return "\n".join([*lines, "</table>"])


def article(records: Any, row: dict[str, Any], side: int) -> str:
    """Two photographs with their captions and ids."""
    cosines = [
        f"<small>{name}</small>{row[f'{name}_cosine']:.3f}"
        for name in ("text", "image")
        if row[f"{name}_cosine"] is not None
    ]
    figures = [
        f'<figure><img src="{thumbnail(records[row[f"{which}_row"]]["image"], side)}" alt="">'
        f"<figcaption>{html.escape(row[f'{which}_caption'])}"
        f"<small>{html.escape(str(row[f'{which}_image_id']))}</small></figcaption></figure>"
        for which in ("first", "second")
    ]
    return f"<article><div class=cosines>{''.join(cosines)}</div>{''.join(figures)}</article>"


def thumbnail(image: Any, side: int) -> str:
    """A small JPEG of a photograph as a data URL."""
    small = image.convert("RGB")
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    try:
        main()
    except (ValueError, KeyError, FileNotFoundError) as error:  # the user's to mend, and the message says how
        sys.exit(f"{type(error).__name__}: {error}")
