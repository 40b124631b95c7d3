"""An explanation as text, and as one self-contained HTML page that works offline."""

from __future__ import annotations

import base64
import html
import io
import json
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image

from ..plots import POSITIVE
from .picture import BOX, COST, VEIL, VEIL_COLOUR, unseen

if TYPE_CHECKING:
    from .explanation import ExplanationData

LONGEST_SIDE = 1024  # pixels of the picture in a page
STYLE = """
.tvrn-explanation{display:flex;gap:1.5rem;flex-wrap:wrap;align-items:flex-start}
.tvrn-explanation figure{margin:0;flex:1 1 20rem;max-width:40rem;min-width:0}
.tvrn-explanation svg{width:100%;max-height:70vh;display:block}
.tvrn-explanation figcaption,.tvrn-note{font-size:.85rem;opacity:.75;margin:.3rem 0}
.tvrn-words{flex:1 1 17rem;min-width:0}
.tvrn-words table{border-collapse:collapse;width:100%;font-size:.95rem}
.tvrn-words td,.tvrn-words th{padding:1px 4px;border:0!important;text-align:left;font-weight:400}
.tvrn-words tr{border:0!important}
.tvrn-words td:last-child{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.tvrn-words tr.total>*{border-top:1px solid currentColor!important;font-weight:600}
.tvrn-words button{font:inherit;color:inherit;background:none;border:0;border-radius:4px;padding:2px 6px;
cursor:pointer;text-align:left;text-decoration:underline dotted}
.tvrn-words button[aria-pressed=true]{outline:2px solid currentColor;text-decoration:none}
.tvrn-bar{width:45%}.tvrn-bar i{display:block;height:.7em;border-radius:2px}
"""
# One listener for all explanations of a page, those that come later too.
SCRIPT = """
document.addEventListener('click', event => {
  const button = event.target.closest('.tvrn-words button');
  if (!button) return;
  const root = button.closest('.tvrn-explanation');
  root.querySelectorAll('.tvrn-words button').forEach(other => other.setAttribute('aria-pressed', other === button));
  const opacity = JSON.parse(button.dataset.opacity);
  root.querySelectorAll('rect.region').forEach((rect, region) => rect.setAttribute('opacity', opacity[region]));
  root.querySelector('figcaption').textContent = button.dataset.says;
});
"""
FRAME = "body{font:16px/1.5 system-ui,sans-serif;color:#1f2933;max-width:64rem;margin:1.5rem auto;padding:0 1rem}"
NOTE = (
    "A word's number is what the logit loses without it; “together” is what no single word has. Clear in the picture: "
    "the regions without which that number falls most."
)


def text_table(explanation: ExplanationData) -> str:
    """The numbers as lines of text: the words and what they have together, which add up to the logit."""
    rows = explanation.summands
    width = max(len(name) for name, _ in rows)
    lines = [f"{'word':{width}}    adds  most by"]
    for (name, number), word in zip(rows, [*explanation.words, None], strict=True):
        place = "" if word is None else _most(explanation, word.by_region)
        lines.append(f"{name:{width}}  {number:+6.2f}  {place}".rstrip())
    lines.append(f"{'logit':{width}}  {explanation.total:+6.2f}  {explanation.score_kind} {explanation.score:.4f}")
    parts = ", ".join(f"{name.replace('_', ' ')} {number:+.2f}" for name, number in explanation.components.items())
    return "\n".join([*lines, f"The logit's components: {parts}"])


def html_page(explanation: ExplanationData) -> str:
    """The page: picture, the caption's words with their numbers, to click on."""
    caption = html.escape(explanation.caption)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{caption}</title><style>{FRAME}{STYLE}</style><h1>{caption}</h1>"
        f"<p>{explanation.score_kind.capitalize()} {explanation.score:.3f}</p>{html_body(explanation)}"
        f"<script>{SCRIPT}</script></html>\n"
    )


def html_body(explanation: ExplanationData) -> str:
    """The page without its frame, its style and its script."""
    numbers = [abs(number) for _, number in explanation.summands[:-1]]
    rows = [_row(_button("whole caption", explanation.by_region, explanation, "whole caption"), "", "")]
    for (name, number), word in zip(explanation.summands, [*explanation.words, None], strict=True):
        first, bar = html.escape(name), ""
        if word is not None:
            first = _button(name, word.by_region, explanation, f"{name} {number:+.2f}")
            colour = POSITIVE if number >= 0 else COST
            bar = f'<i style="width:{100 * abs(number) / max(*numbers, 0.01):.0f}%;background:{colour}"></i>'
        rows.append(_row(first, bar, f"{number:+.2f}"))
    rows.append(_row("logit", "", f"{explanation.total:+.2f}", "total"))
    return (
        f'<div class="tvrn-explanation"><figure>{_svg(explanation)}<figcaption></figcaption></figure>'
        f'<div class="tvrn-words"><table>{"".join(rows)}</table><p class="tvrn-note">{NOTE}</p></div></div>'
    )


def _row(first: str, bar: str, number: str, kind: str = "") -> str:
    return f'<tr class="{kind}"><th>{first}</th><td class="tvrn-bar">{bar}</td><td>{number}</td></tr>'


def _button(text: str, by_region: np.ndarray | None, explanation: ExplanationData, what: str) -> str:
    """A word, or the whole, which shows what in the picture speaks for it."""
    strength = explanation.strength(by_region)
    if strength is None:
        opacity, says = (
            [0.0] * (0 if explanation.cells is None else len(explanation.cells)),
            "no one region speaks for it",
        )
    else:
        opacity = (VEIL * (1 - strength) if explanation.grid is not None else strength).round(3).tolist()
        says = f"most by {_most(explanation, by_region)}"
    return (
        f'<button type="button" data-opacity="{json.dumps(opacity)}" data-says="{html.escape(f"{what}: {says}")}"'
        f' aria-pressed="false">{html.escape(text)}</button>'
    )


def _svg(explanation: ExplanationData) -> str:
    picture = explanation.picture
    width, height = (400, 300) if picture is None else (400, round(400 * picture.height / picture.width))
    image = "" if picture is None else f'<image href="{data_url(picture)}" width="{width}" height="{height}"/>'

    def rect(box: np.ndarray, look: str) -> str:
        left, top, right, bottom = (box * [width, height, width, height]).tolist()
        size = f'width="{right - left:.1f}" height="{bottom - top:.1f}"'
        return f'<rect x="{left:.1f}" y="{top:.1f}" {size} {look}/>'

    look = f'class="region" opacity="0" fill="{VEIL_COLOUR}" shape-rendering="crispEdges"'
    if explanation.grid is None:
        look = f'class="region" opacity="0" fill="none" stroke="{BOX}" stroke-width="3"'
    cells = [] if explanation.cells is None else [rect(box, look) for box in explanation.cells]
    outside = [rect(box, f'fill="{VEIL_COLOUR}" opacity="{VEIL}"') for box in unseen(explanation)]
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(explanation.caption)}">'
        f"{image}{''.join(outside + cells)}</svg>"
    )


def data_url(picture: PIL.Image.Image) -> str:
    """A picture to stand in a page, smaller where it is large."""
    picture = picture.convert("RGB")
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _most(explanation: ExplanationData, by_region: np.ndarray | None) -> str:
    """The region that speaks most for a word, with its number; a dash where none does."""
    if by_region is None or explanation.strength(by_region) is None:
        return "–"
    region = int(by_region.argmax())
    where = f"region {region + 1}"
    if explanation.grid is not None:
        row, column = divmod(region, explanation.grid[1])
        where = f"row {row + 1}, column {column + 1}"
    return f"{where} ({by_region[region]:+.2f})"
