"""An explanation as text, and as one self-contained HTML page that works offline."""

from __future__ import annotations

import base64
import html
import io
import json
from typing import TYPE_CHECKING

import numpy as np

from .picture import bar_rows, relative

if TYPE_CHECKING:
    from .explanation import ExplanationData, WordExplanation

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;color:#1f2933;max-width:60rem;margin:1.5rem auto;padding:0 1rem}
.words button{font:inherit;border:0;border-radius:4px;margin:2px;padding:2px 6px;cursor:pointer}
.words button[aria-pressed=true]{outline:2px solid #1f2933}
.views{display:flex;gap:1.5rem;flex-wrap:wrap}figure{margin:0;position:relative;width:24rem}
figure svg{width:100%;height:auto;display:block;background:#f2f4f6}
table{border-collapse:collapse;font-size:14px}td,th{padding:2px 8px;text-align:right;border-bottom:1px solid #e4e8ec}
td:first-child,th:first-child{text-align:left}.note{color:#6b7785;font-size:14px}
"""
SCRIPT = """
const words=document.querySelectorAll('.words button');
words.forEach(button=>button.addEventListener('click',()=>{
  words.forEach(other=>other.setAttribute('aria-pressed',other===button));
  const opacity=JSON.parse(button.dataset.opacity);
  document.querySelectorAll('rect.region').forEach((rect,region)=>{
    rect.setAttribute(rect.dataset.fill?'fill-opacity':'stroke-opacity',opacity[region])})}));
words[0].click();
"""
SAF_NOTE = (
    "The numbers of the column “adds” add up to the logit. “Without” is"
    " what the logit loses when the word is left out of the caption."
)
SGR_NOTE = (
    "This model reasons over a graph of its words (SGR), whose part of the logit does not come apart word by word."
    " “Without” is what the logit loses when the word is left out of the caption."
)


def text_table(explanation: ExplanationData) -> str:
    """The numbers as lines of text: words, then the parts that add up to the logit."""
    width = max(len(word.text) for word in explanation.words)
    lines = [f"{'word':{width}}  adds    share  saliency  without  looks at"]
    for word in explanation.words:
        numbers = (_signed(word.contribution, 6), _percent(word.weight, 6), f"{word.saliency:8.2f}")
        lines.append(
            f"{word.text:{width}}  {'  '.join(numbers)}  {_signed(word.without, 7)}  {_looks(word, explanation)}"
        )
    lines += [f"{name:24} {value:+8.3f}" for name, value in explanation.parts.items()]
    return "\n".join(
        [*lines, f"{'logit':24} {explanation.logit:+8.3f}   {explanation.score_kind} {explanation.score:.4f}"]
    )


def html_page(explanation: ExplanationData) -> str:
    """The page: picture, caption with its words to click on, and the numbers."""
    caption = html.escape(explanation.caption)
    note = SAF_NOTE if explanation.words[0].contribution is not None else SGR_NOTE
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{caption}</title><style>{STYLE}</style>'
        f"<h1>{explanation.score_kind.capitalize()} {explanation.score:.3f}</h1>{html_body(explanation)}"
        f'<p class="note">{html.escape(note)}</p><script>{SCRIPT}</script></html>\n'
    )


def html_body(explanation: ExplanationData) -> str:
    """The page without its frame."""
    whole = _button("the caption looks", explanation.region_weight, explanation, None)
    if explanation.region_without is not None:
        whole += " " + _button("the score rests on", explanation.region_without.clip(min=0), explanation, None)
    buttons = [_button(word.text, word.attention, explanation, _worth(word)) for word in explanation.words]
    return (
        f'<p class="words">{whole} {" ".join(buttons)}</p>'
        f'<div class="views"><figure>{_svg(explanation)}</figure><div>{_table(explanation)}</div></div>'
    )


def _worth(word: WordExplanation) -> float | None:
    return word.contribution if word.contribution is not None else word.without


def _button(text: str, weights: np.ndarray, explanation: ExplanationData, worth: float | None) -> str:
    """A word, coloured by what it adds (green) or costs (red)."""
    numbers = [abs(_worth(word) or 0.0) for word in explanation.words]
    strength = 0.0 if worth is None else 0.6 * abs(worth) / max(*numbers, 1e-9) if len(numbers) > 1 else 0.6
    colour = "26,127,55" if (worth or 0) >= 0 else "178,58,72"
    factor = 0.75 if explanation.grid is not None else 1.0
    opacity = json.dumps([round(factor * float(value), 3) for value in relative(weights)])
    return (
        f'<button type="button" style="background:rgba({colour},{strength:.2f})" data-opacity="{opacity}"'
        f' aria-pressed="false">{html.escape(text)}</button>'
    )


def _svg(explanation: ExplanationData) -> str:
    picture = explanation.picture
    width, height = (400, 400) if picture is None else (400, round(400 * picture.height / picture.width))
    image = "" if picture is None else f'<image href="{_data_url(explanation)}" width="{width}" height="{height}"/>'
    rects = "".join(_rects(explanation, width, height))
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="regions">{image}{rects}</svg>'


def _rects(explanation: ExplanationData, width: int, height: int) -> list[str]:
    if explanation.grid is not None:
        rows, columns = explanation.grid
        cells = [(x / columns, y / rows, 1 / columns, 1 / rows) for y in range(rows) for x in range(columns)]
        look = 'fill="#d9291a" fill-opacity="0" data-fill="1"'
    elif explanation.boxes is not None:
        cells = [(x1, y1, x2 - x1, y2 - y1) for x1, y1, x2, y2 in explanation.boxes.tolist()]
        look = 'fill="none" stroke="#d9291a" stroke-width="3" stroke-opacity="0"'
    else:
        return []
    return [
        f'<rect class="region" x="{x * width:.1f}" y="{y * height:.1f}" width="{w * width:.1f}"'
        f' height="{h * height:.1f}" {look}/>'
        for x, y, w, h in cells
    ]


def _data_url(explanation: ExplanationData) -> str:
    assert explanation.picture is not None
    buffer = io.BytesIO()
    explanation.picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _table(explanation: ExplanationData) -> str:
    rows = [
        (word.text, _signed(word.contribution), _percent(word.weight), f"{word.saliency:.2f}", _signed(word.without))
        for word in explanation.words
    ]
    rows += [(f"({name})", _signed(value), "", "", "") for name, value in _other_parts(explanation)]
    rows.append(("logit", _signed(explanation.logit), "", "", ""))
    head = "".join(f"<th>{name}</th>" for name in ("word", "adds", "share", "saliency", "without"))
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _other_parts(explanation: ExplanationData) -> list[tuple[str, float]]:
    named = {name for name, _ in bar_rows(explanation)}
    graph = {"graph", "late interaction"} if explanation.words[0].contribution is None else set()
    return [(name, value) for name, value in explanation.parts.items() if name in named | graph]


def _looks(word: WordExplanation, explanation: ExplanationData) -> str:
    """The region that a word looks at most, in words."""
    region = int(word.attention.argmax())
    if explanation.grid is not None:
        row, column = divmod(region, explanation.grid[1])
        where = f"row {row + 1}, column {column + 1}"
    else:
        where = f"region {region}"
    return f"{where} ({100 * word.attention[region]:.0f} %)"


def _signed(value: float | None, width: int = 0) -> str:
    return f"{'–' if value is None else f'{value:+.3f}':>{width}}"


def _percent(value: float | None, width: int = 0) -> str:
    return f"{'–' if value is None else f'{100 * value:.1f} %':>{width}}"
