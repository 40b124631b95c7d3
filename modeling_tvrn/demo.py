"""The demo page (extra `demo`): search one's photographs by text or by photograph, and see why something was found.

Works offline: nothing is fetched from elsewhere. The server hands out no file of the disk: what is shown are smaller
copies of indexed photographs, decoded here. Uploads are bounded in bytes and pixels and decoded by `data.images`; one
photograph is in memory at a time, however many people ask.
"""

from __future__ import annotations

import html
import itertools
import logging
import os
import threading
from pathlib import Path
from typing import Any

import PIL.Image

from .data.image_folder import IMAGE_SUFFIXES, image_files, leads_out
from .data.images import ImageError, decode_image
from .data.worded import about_unknown_words
from .explain import explain
from .explain.page import SCRIPT as EXPLANATION_SCRIPT
from .explain.page import STYLE as EXPLANATION_STYLE
from .explain.page import data_url, html_body
from .index import Hit, ImageTextIndex
from .processing_tvrn import check_length, encode

logger = logging.getLogger(__name__)

MAX_UPLOAD_BYTES = 20 * 2**20
MAX_UPLOAD_PIXELS = 25_000_000  # a few hundred kilobytes can hold any number: each takes up to 16 bytes on the way
MAX_QUERY = 300  # characters
MAX_HITS = 48
LIKELY = 0.1  # that something fits
FIRST_SHOWN = 12  # photographs, before anything was asked
THUMBNAIL = 512  # longest side in pixels
# Shown are the first whose words the model knows: a small vocabulary has not all.
EXAMPLES = (
    "two dogs run through the snow",
    "people sit at a table",
    "a child on a swing",
    "a red circle above a blue square",
    "three small green triangles",
)
EXAMPLES_SHOWN = 3
ABOUT = "# Search {count} photographs\nwith **{name}**. Click on a photograph to see why it was found."

# The explanation opens over the page, where the click was; until it comes there is a spinner.
SCRIPT = f"""
<script>
{EXPLANATION_SCRIPT}
const closeReason = () => delete document.querySelector('#why').dataset.state;
// Captured: the gallery may put a new button in the place of the one that was clicked.
document.addEventListener('click', event => {{
  if (event.target.closest('#results button')) {{
    document.querySelector('#why').dataset.state = 'waiting';
    document.querySelector('#close').focus();
  }} else if (event.target.closest('#close') || !event.target.closest('#why')) closeReason();
}}, true);
document.addEventListener('keydown', event => {{ if (event.key === 'Escape') closeReason(); }});
</script>
"""
ARRIVED = "() => { const why = document.querySelector('#why'); if (why.dataset.state) why.dataset.state = 'open'; }"
SHOW_RESULT = "() => document.querySelector('#result').scrollIntoView({behavior: 'smooth', block: 'nearest'})"
STYLE = (
    EXPLANATION_STYLE
    + """
#why {display: none; position: fixed; inset: 3vh 0 auto 0; z-index: 100; width: min(66rem, 96vw); max-height: 94vh;
  margin: 0 auto; padding: 1rem; overflow: auto; border-radius: 10px; background: var(--body-background-fill);
  box-shadow: 0 0 0 100vmax rgb(0 0 0 / 60%)}
#why[data-state] {display: flex}
#why[data-state=waiting] #reason {display: none}
#why[data-state=waiting]::after {content: ''; width: 2.5rem; height: 2.5rem; margin: 4rem auto; border-radius: 50%;
  border: 4px solid #8884; border-top-color: currentColor; animation: tvrn-turn 1s linear infinite}
@keyframes tvrn-turn {to {transform: rotate(1turn)}}
#close {align-self: flex-end; flex: none; width: auto}
#reason img, #preview img, #pair-preview img {max-width: 100%; max-height: 70vh; object-fit: contain}
#examples button {flex: 0 1 auto}
#results .grid-wrap {max-height: none !important; height: auto !important}
@media (max-width: 640px) {
  #results .grid-container {grid-template-columns: repeat(2, minmax(0, 1fr)) !important}
  .gradio-container {padding: .5rem !important}
}
"""
)


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

    @property
    def model_name(self) -> str:
        """A Hub id, or of a folder its name: where it lies is nobody's business."""
        name = str(getattr(self.model.config, "name_or_path", "") or "a model without a name")
        return Path(name).resolve().name if Path(name).is_dir() else name

    def examples(self) -> list[str]:
        """Queries to begin with, of words that the model knows."""
        tokenizer = self.processor.tokenizer
        known = [text for text in EXAMPLES if tokenizer.unk_token_id not in tokenizer(text)["input_ids"]]
        return known[:EXAMPLES_SHOWN]

    def first(self) -> tuple[list[tuple[PIL.Image.Image, str]], list[dict[str, Any]], str]:
        """What the page shows before anything was asked: some of the photographs."""
        paths = sorted(itertools.islice(image_files(self.folder), FIRST_SHOWN))
        gallery, state = [], []
        for path in paths:
            with self._one_photograph:
                picture = self._photograph(str(path))
                if picture is None:
                    continue
                picture.thumbnail((THUMBNAIL, THUMBNAIL))
            name = str(path.relative_to(self.folder))
            gallery.append((picture, name))
            state.append({"id": name, "path": str(path), "query": None})
        said = "Some of the photographs. Type what you look for, or try an example."
        return gallery, state, said if gallery else "There is no photograph in this folder."

    def by_text(
        self, query: str, limit: int = 12
    ) -> tuple[list[tuple[PIL.Image.Image, str]], list[dict[str, Any]], str]:
        """Gallery, its state, and a line of text."""
        note = self._note(query)
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
        """HTML that explains a hit; one found by photograph, or not searched for, with a text typed since then."""
        if not 0 <= number < len(state):
            return ""
        note = self._note(state[number]["query"] or query)
        text = (state[number]["query"] or (query or "")).strip()[:MAX_QUERY]
        try:
            with self._one_photograph:
                picture = self._photograph(state[number]["path"])
                if picture is None:
                    return "<p>This photograph is not there any more.</p>"
                if not text:
                    advice = "<p>Type a text to see how it fits this photograph.</p>"
                    return f'{_heading(state[number]["id"])}{advice}<img alt="" src="{data_url(picture)}">'
                return self._part(picture, text, state[number]["id"]) + _paragraph(note)
        except ValueError as error:  # such as a text without a word
            return f"<p>{html.escape(str(error))}</p>"

    def preview(self, upload: Any) -> tuple[PIL.Image.Image | None, str]:
        """An uploaded photograph, small, or why it cannot be used."""
        if upload is None:
            return None, ""
        try:
            with self._one_photograph:
                picture = read_upload(upload)
                picture.thumbnail((THUMBNAIL, THUMBNAIL))
                return picture, ""
        except ImageError as error:
            return None, f"{_refusal(error)}."

    def score(self, upload: Any, caption: str) -> str:
        """HTML with the score of an uploaded pair."""
        note = self._note(caption)
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
        """A pair taken apart, as a part of the page."""
        found = explain(self.model, self.processor, picture, text)
        about = f"<p>“{html.escape(text)}”: {found.score_kind} {found.score:.3f}</p>"
        return f"{_heading(name)}{about}{html_body(found)}"

    def _note(self, text: str | None) -> str:
        """What to say of a text that is longer than what is read of it or has unknown words; else nothing."""
        text = (text or "").strip()
        if not text:
            return ""
        limit = check_length(self.processor.max_text_length, self.processor.tokenizer)
        unknown = about_unknown_words(self.processor, [text[:MAX_QUERY]])
        note = f" Note: {unknown}." if unknown else ""
        if len(text) <= MAX_QUERY and int(encode(self.processor.tokenizer, [text], limit)[1][0]) <= limit:
            return note
        return (
            f" The text is too long: at most {MAX_QUERY} characters and {limit} tokens are read, its end was left out."
            f"{note}"
        )


def _heading(name: str) -> str:
    return f"<h3>{html.escape(name)}</h3>"


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


def build_demo(searches: Searches) -> Any:
    """The page as a `gradio.Blocks`, not started yet.

    Raises:
        ImportError: Naming the command that installs gradio.
    """
    gr = _gradio()
    private: dict[str, Any] = {"api_visibility": "private"}
    with gr.Blocks(title="Photograph search", analytics_enabled=False) as page:
        gr.Markdown(ABOUT.format(count=len(searches.index), name=searches.model_name))
        state = gr.State([])
        with gr.Tab("Search"):
            with gr.Row():
                with gr.Column(scale=3):
                    query = gr.Textbox(
                        label="Text", placeholder="What does it show?", max_length=MAX_QUERY, elem_id="query"
                    )
                    with gr.Row(elem_id="examples"):
                        examples = [gr.Button(text, size="sm") for text in searches.examples()]
                    limit = gr.Slider(1, MAX_HITS, value=12, step=1, label="Results at most")
                    find = gr.Button("Search", variant="primary", elem_id="find")
                with gr.Column(scale=2):
                    photograph = _upload(gr, "Or a photograph", "photograph")
                    _preview(gr, searches, photograph, "preview")
                    alike = gr.Button("Search by photograph", elem_id="alike")
            said = gr.Markdown(elem_id="said")
            gallery = gr.Gallery(
                label="Photographs",
                columns=4,
                height="auto",
                object_fit="contain",
                allow_preview=False,
                buttons=[],
                elem_id="results",
            )
            with gr.Column(elem_id="why"):
                gr.Button("Close", size="sm", elem_id="close")
                reason = gr.HTML(elem_id="reason")
            found = [gallery, state, said]
            page.load(searches.first, None, found, **private)
            find.click(searches.by_text, [query, limit], found, api_name="search")
            query.submit(searches.by_text, [query, limit], found, **private)
            for example in examples:
                typed = example.click(lambda text: text, example, query, **private)
                typed.then(searches.by_text, [query, limit], found, **private)
            alike.click(searches.by_image, [photograph, limit], found, api_name="search_by_image")
            clicked = gallery.select(_chosen(gr, searches), [state, query], reason, show_progress="hidden", **private)
            clicked.then(None, js=ARRIVED, **private)
        with gr.Tab("Score a pair"):
            pair = _upload(gr, "Photograph", "pair")
            _preview(gr, searches, pair, "pair-preview")
            caption = gr.Textbox(label="Caption", max_length=MAX_QUERY, elem_id="caption")
            score = gr.Button("Score", variant="primary", elem_id="score")
            result = gr.HTML(elem_id="result")
            scored = score.click(searches.score, [pair, caption], result, api_name="score")
            scored.then(None, js=SHOW_RESULT, **private)
    return page


def _upload(gr: Any, label: str, name: str) -> Any:
    """A plain file field: an image field would decode what was sent before this module has looked at it."""
    return gr.File(label=label, file_types=list(IMAGE_SUFFIXES), type="filepath", height=110, elem_id=name)


def _preview(gr: Any, searches: Searches, upload: Any, name: str) -> None:
    """Shows what was chosen in a file field as soon as it is there, or why it cannot be used."""
    shown = gr.Image(show_label=False, interactive=False, visible=False, height=180, buttons=[], elem_id=name)
    refused = gr.Markdown(visible=False)

    def changed(path: str | None) -> tuple[Any, Any]:
        picture, why_not = searches.preview(path)
        return gr.Image(picture, visible=picture is not None), gr.Markdown(why_not, visible=bool(why_not))

    upload.change(changed, upload, [shown, refused], api_visibility="private")


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
