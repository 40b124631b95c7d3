"""The demo page (extra `demo`): search one's photographs by text or by photograph, and see why something was found.

Works offline: nothing is fetched from elsewhere. The server hands out no file of the disk: what is shown are smaller
copies of indexed photographs, decoded here. Uploads are bounded in bytes and pixels and decoded by `data.images`; one
photograph is in memory at a time, however many people ask.
"""

from __future__ import annotations

import html
import logging
import os
import threading
from pathlib import Path
from typing import Any

import PIL.Image

from .data.images import IMAGE_SUFFIXES, ImageError, decode_image, leads_out
from .explain import Explanation, explain
from .explain.page import html_body
from .index import Hit, ImageTextIndex
from .processing_tvrn import check_length, encode
from .scoring.models import evaluating

logger = logging.getLogger(__name__)

MAX_UPLOAD_BYTES = 20 * 2**20
MAX_UPLOAD_PIXELS = 25_000_000  # a few hundred kilobytes can hold any number: each takes up to 16 bytes on the way
MAX_QUERY = 300  # characters
MAX_HITS = 48
LIKELY = 0.1  # that something fits
THUMBNAIL = 320  # longest side in pixels
ABOUT = "# {count} photographs\nSearched by text or by photograph. Click on a result to see why it was found."

# Clicks on words, in pages that are replaced after every search: one listener for all of them.
SCRIPT = """
<script>
document.addEventListener('click', event => {
  const button = event.target.closest('.tvrn-words button');
  if (!button) return;
  const root = button.closest('.tvrn-explanation');
  root.querySelectorAll('.tvrn-words button').forEach(other => other.setAttribute('aria-pressed', other === button));
  const opacity = JSON.parse(button.dataset.opacity);
  root.querySelectorAll('rect.region').forEach((rect, region) => {
    rect.setAttribute(rect.dataset.fill ? 'fill-opacity' : 'stroke-opacity', opacity[region]);
  });
});
</script>
"""
STYLE = """
.tvrn-words button {border: 0; border-radius: 4px; margin: 2px; padding: 2px 6px; cursor: pointer}
.tvrn-words button[aria-pressed=true] {outline: 2px solid currentColor}
.tvrn-explanation .views {display: flex; gap: 1.5rem; flex-wrap: wrap}
.tvrn-explanation figure {margin: 0; width: 24rem; max-width: 100%}
.tvrn-explanation svg {width: 100%; height: auto; display: block}
.tvrn-explanation td, .tvrn-explanation th {padding: 2px 8px; text-align: right}
.tvrn-explanation td:first-child, .tvrn-explanation th:first-child {text-align: left}
"""


class Searches:
    """What the page does, without the page.

    Args:
        model: Of `load_model`, and its `processor`.
        index: Of photographs.
        folder: Only photographs inside it are shown, whatever an index says.
    """

    def __init__(self, model: Any, processor: Any, index: ImageTextIndex, folder: str | os.PathLike) -> None:
        if index.side != "images":
            raise ValueError(
                f"the demo searches photographs, but this is an index of {index.side}; build one of images"
            )
        self.model, self.processor, self.index = model, processor, index
        self.folder = Path(folder).resolve()
        self._one_photograph = threading.Lock()

    def by_text(
        self, query: str, limit: int = 12
    ) -> tuple[list[tuple[PIL.Image.Image, str]], list[dict[str, Any]], str]:
        """Gallery, its state, and a line of text."""
        note = self._cut_note(query)
        query = (query or "").strip()[:MAX_QUERY]
        if not query:
            return [], [], "Type what the photograph shows."
        try:
            hits = self._ask(text=query, limit=limit)
        except ValueError as error:  # such as a text without a word
            return [], [], str(error)
        gallery, state, said = self._shown(hits, query)
        return gallery, state, said + note

    def by_image(
        self, upload: Any, limit: int = 12
    ) -> tuple[list[tuple[PIL.Image.Image, str]], list[dict[str, Any]], str]:
        """The same, by a photograph's embedding; the file is one that the browser has sent."""
        if upload is None:
            return [], [], "Choose a photograph."
        try:
            with self._one_photograph:
                hits = self._ask(image=read_upload(upload), limit=limit)
        except ImageError as error:
            return [], [], f"{_refusal(error)}."
        return self._shown(hits, None)

    def _ask(self, **query: Any) -> list[Hit]:
        limit = min(max(int(query.pop("limit")), 1), MAX_HITS)
        return list(self.index.search(**query, limit=limit))

    def _shown(
        self, hits: list[Hit], query: str | None
    ) -> tuple[list[tuple[PIL.Image.Image, str]], list[dict[str, Any]], str]:
        gallery, state, missing = [], [], 0
        for hit in hits:
            with self._one_photograph:
                picture = self._photograph(hit.path)
                if picture is None:
                    missing += 1
                    continue
                picture.thumbnail((THUMBNAIL, THUMBNAIL))
            gallery.append((picture, f"{hit.score:.3f}  {hit.id}"))
            state.append({"id": hit.id, "path": hit.path, "query": query})
        said = f"{len(gallery)} found." + (f" {missing} are not there any more." if missing else "")
        if hits and hits[0].score_kind == "probability":
            likely = sum(hit.score >= LIKELY for hit in hits)
            said += f" {likely or 'None'} of them with a probability of at least {LIKELY:g} to fit."
        elif hits and hits[0].score_kind != "matching score":
            said += f" The numbers are: {hits[0].score_kind}."
        return gallery, state, said

    def _photograph(self, path: str | None) -> PIL.Image.Image | None:
        """An indexed photograph; None for what is gone, broken, or outside the folder."""
        if path is None or leads_out(path, self.folder):
            logger.warning("%s is outside %s: not shown", path, self.folder)
            return None
        try:
            return decode_image(Path(path))
        except ImageError as error:
            logger.warning("not shown: %s", error)
            return None

    def why(self, state: list[dict[str, Any]], number: int, query: str | None = None) -> str:
        """HTML that explains a hit; for one found by photograph, with a text typed since then."""
        if not 0 <= number < len(state):
            return ""
        note = self._cut_note(state[number]["query"] or query)
        text = (state[number]["query"] or (query or "")).strip()[:MAX_QUERY]
        if not text:
            return "<p>Found by its likeness to a photograph. Type a text to see how it fits.</p>"
        try:
            with self._one_photograph:
                picture = self._photograph(state[number]["path"])
                if picture is None:
                    return "<p>This photograph is not there any more.</p>"
                return self._part(picture, text, state[number]["id"]) + _paragraph(note)
        except ValueError as error:  # such as a text without a word
            return f"<p>{html.escape(str(error))}</p>"

    def score(self, upload: Any, caption: str) -> str:
        """HTML with the score of an uploaded pair."""
        note = self._cut_note(caption)
        caption = (caption or "").strip()[:MAX_QUERY]
        if upload is None or not caption:
            return "<p>Choose a photograph and type a caption.</p>"
        try:
            with self._one_photograph:
                return self._part(read_upload(upload), caption, "your photograph") + _paragraph(note)
        except ImageError as error:
            return f"<p>{html.escape(_refusal(error))}.</p>"
        except ValueError as error:  # such as a caption without a word
            return f"<p>{html.escape(str(error))}</p>"

    def _part(self, picture: PIL.Image.Image, text: str, name: str) -> str:
        """A pair as a part of the page: taken apart, or of a model without reasoning its score alone."""
        if self.model.config.use_reasoning:
            return page_part(explain(self.model, self.processor, picture, text), name)
        device = next(self.model.parameters()).device
        with evaluating(self.model):
            images = self.model.encode_images(**self.processor(images=[picture]).to(device))
            logits = self.model.match(images, self.model.encode_texts(**self.processor(text=[text]).to(device)))
            score = float(self.model.readable_scores(logits))
        return (
            f'<div class="tvrn-explanation"><h3>{html.escape(name)}: {self.model.score_kind} {score:.3f}</h3>'
            "<p>This model has no reasoning over words and regions that could be shown: train one (tvrn train "
            "dual_encoder=…) to see why.</p></div>"
        )

    def _cut_note(self, text: str | None) -> str:
        """What to say of a text that is longer than what is read of it; else nothing."""
        text = (text or "").strip()
        if not text:
            return ""
        limit = check_length(self.processor.max_text_length, self.processor.tokenizer)
        if len(text) <= MAX_QUERY and int(encode(self.processor.tokenizer, [text], limit)[1][0]) <= limit:
            return ""
        return (
            f" The text is too long: at most {MAX_QUERY} characters and {limit} tokens are read, its end was left out."
        )


def _paragraph(note: str) -> str:
    return f"<p>{html.escape(note.strip())}</p>" if note else ""


def read_upload(path: str | os.PathLike) -> PIL.Image.Image:
    """An uploaded photograph, bounded in bytes and pixels.

    Raises:
        ImageError: If it is too large, corrupt, or no photograph.
    """
    size = Path(path).stat().st_size
    if size > MAX_UPLOAD_BYTES:
        raise ImageError(f"it has {size / 2**20:.0f} MB, at most {MAX_UPLOAD_BYTES // 2**20} are taken", str(path))
    return decode_image(Path(path), max_pixels=MAX_UPLOAD_PIXELS)


def _refusal(error: ImageError) -> str:
    """Why an upload is not taken, without the server's name for it."""
    return f"This file cannot be used: {error.reason}{f' ({error.why})' if error.why else ''}"


def page_part(explanation: Explanation, name: str) -> str:
    """An explanation as a part of the page."""
    body = html_body(explanation).replace('class="words"', 'class="tvrn-words"')
    return (
        f'<div class="tvrn-explanation"><h3>{html.escape(name)}: {explanation.score_kind} {explanation.score:.3f}</h3>'
        f"{body}<p>Click on a word to see where it looks.</p></div>"
    )


def build_demo(searches: Searches) -> Any:
    """The page as a `gradio.Blocks`, not started yet.

    Raises:
        ImportError: Naming the command that installs gradio.
    """
    gr = _gradio()
    with gr.Blocks(title="Photograph search", analytics_enabled=False) as page:
        gr.Markdown(ABOUT.format(count=len(searches.index)))
        state = gr.State([])
        with gr.Tab("Search"):
            with gr.Row():
                with gr.Column(scale=3):
                    query = gr.Textbox(label="Text", max_length=MAX_QUERY, elem_id="query")
                    limit = gr.Slider(1, MAX_HITS, value=12, step=1, label="Results at most")
                    find = gr.Button("Search", variant="primary", elem_id="find")
                with gr.Column(scale=2):
                    photograph = _upload(gr, "Or a photograph", "photograph")
                    alike = gr.Button("Search by photograph", elem_id="alike")
            said = gr.Markdown(elem_id="said")
            gallery = gr.Gallery(label="Results", columns=4, height=None, allow_preview=False, elem_id="results")
            reason = gr.HTML(elem_id="reason")
            found = [gallery, state, said]
            find.click(searches.by_text, [query, limit], found, api_name="search")
            query.submit(searches.by_text, [query, limit], found, api_visibility="private")
            alike.click(searches.by_image, [photograph, limit], found, api_name="search_by_image")
            gallery.select(_chosen(gr, searches), [state, query], reason, api_visibility="private")
        with gr.Tab("Score a pair"):
            pair = _upload(gr, "Photograph", "pair")
            caption = gr.Textbox(label="Caption", max_length=MAX_QUERY, elem_id="caption")
            score = gr.Button("Score", variant="primary", elem_id="score")
            result = gr.HTML(elem_id="result")
            score.click(searches.score, [pair, caption], result, api_name="score")
    return page


def _upload(gr: Any, label: str, name: str) -> Any:
    """A plain file field: an image field would decode what was sent before this module has looked at it."""
    return gr.File(label=label, file_types=list(IMAGE_SUFFIXES), type="filepath", height=110, elem_id=name)


def _chosen(gr: Any, searches: Searches) -> Any:
    def chosen(state: list[dict[str, Any]], query: str, event: Any) -> str:
        return searches.why(state, int(event.index), query)

    chosen.__annotations__["event"] = gr.SelectData  # gradio passes it by its type
    return chosen


def launch(
    model: Any,
    processor: Any,
    folder: str | os.PathLike,
    index: ImageTextIndex | str | os.PathLike | None = None,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    block: bool = True,
    progress: bool = True,
) -> Any:
    """Index a folder of photographs if need be, and serve the page.

    Args:
        model: Of `load_model` (a TVRN or any dual encoder), and its `processor`.
        folder: Of photographs; nothing outside it is shown.
        index: Of them: opened, or the folder it is kept in; default: a temporary one.
        host: "0.0.0.0" lets other machines in; a Space needs it.
        port: Default: the first free one from 7860.
        block: Whether to return only when the server has ended.
        progress: Show the indexing's progress.

    Returns:
        The started `gradio.Blocks` (`.local_url`, `.close()`).

    Raises:
        ImportError: Naming the command that installs gradio.
    """
    gr = _gradio()
    if not isinstance(index, ImageTextIndex):
        index = ImageTextIndex.build(model, processor, folder, index, progress=progress)
    page = build_demo(Searches(model, processor, index, folder))
    page.queue(max_size=32).launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=not block,
        share=False,
        quiet=True,
        max_file_size=MAX_UPLOAD_BYTES,
        theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]),  # gradio's own are fetched
        css=STYLE,
        head=SCRIPT,
    )
    return page


def _gradio() -> Any:
    try:
        import gradio
    except ImportError as error:
        raise ImportError('the demo needs gradio: pip install "modeling-tvrn[demo]"') from error
    return gradio
