"""What the verbs share: options, loading a checkpoint, and printing for people or for scripts."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = [
    *("AsJson", "Device", "Dtype", "Model", "TowerEngine", "TrustRemoteCode"),
    *("fail", "load", "prepare_terminal", "progress", "say", "say_cut", "say_unknown", "table", "tell_more"),
    *("use_engine", "writable"),
]

Model = Annotated[str, typer.Argument(metavar="MODEL", help="folder of a saved model, or Hub id", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON for scripts, and nothing else")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ... (default: cuda where there is one)")]
Dtype = Annotated[str, typer.Option(help="float32 or bfloat16, of model and scores")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="run Python code that MODEL's tokenizer or image processor brings")
]
TowerEngine = Annotated[
    str,
    typer.Option(
        help="auto, torch, folded or onnxruntime: what runs a vision tower on a CPU; auto: onnxruntime where it is "
        "installed, once it pays"
    ),
]
DTYPES = ("float32", "bfloat16")


def progress() -> bool:
    """Whether somebody watches: progress bars go to a terminal alone."""
    return sys.stderr.isatty()


def tell_more() -> None:
    """Let the package say how it goes: of work of hours one wants to see that."""
    log = logging.getLogger("modeling_tvrn")
    log.setLevel(min(logging.INFO, log.getEffectiveLevel()))


def prepare_terminal() -> None:
    """What a program begins with: no bars of libraries where nobody watches, no character that ends it at its end."""
    if not progress():
        for name in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(name, "1")
        # What a script has imported already does not look there again.
        if "transformers" in sys.modules:
            sys.modules["transformers"].logging.disable_progress_bar()
        if "datasets" in sys.modules:
            sys.modules["datasets"].disable_progress_bars()
        if "huggingface_hub" in sys.modules:
            sys.modules["huggingface_hub"].utils.disable_progress_bars()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with contextlib.suppress(AttributeError):  # a stream that is no file
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def say(value: Any, text: str, as_json: bool) -> None:
    """Print the value as JSON, or the text."""
    typer.echo(as_json_text(value, indent=2) if as_json else text.encode("utf-8", "backslashreplace").decode())


def say_cut(processor: Any) -> None:
    """How many captions were longer than the model reads, where there were any."""
    if processor.truncated_captions:
        typer.echo(f"tvrn: {processor.truncated_captions} captions were cut to what the model reads", err=True)


def say_unknown(processor: Any, captions: Iterable[str]) -> None:
    """The words that the model reads as its unknown token, the most frequent first, where there are any."""
    from ..data.file_kinds import is_unicode
    from ..data.worded import about_unknown_words

    if said := about_unknown_words(processor, filter(is_unicode, captions)):
        typer.echo(f"tvrn: {said}", err=True)


def as_json_text(value: Any, indent: int | None = None) -> str:
    """JSON in its own letters; with escapes throughout where some cannot be printed, such as lone surrogates."""
    text = json.dumps(value, indent=indent, ensure_ascii=False, default=str)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent, default=str)
    return text


def fail(message: str) -> typer.Exit:
    """The end of a verb that was asked for something impossible; to be raised."""
    typer.echo(f"tvrn: {message}", err=True)
    return typer.Exit(2)


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Aligned columns; numbers with four digits behind the point."""
    cells = [[f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(heads), *cells]) for i in range(len(heads))]
    lines = [list(heads), ["-" * width for width in widths], *cells]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def load(
    name: str,
    device: str | None = None,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    tower_engine: str = "torch",
) -> tuple[Any, Any]:
    """`load_model` for a verb: a TVRN checkpoint or any dual encoder, by this package's and transformers' classes."""
    if dtype not in DTYPES:
        raise fail(f"--dtype is {dtype!r}; expected {' or '.join(DTYPES)}")
    import torch
    from transformers.utils.logging import disable_progress_bar

    from ..front_door import load_model

    if not progress():
        disable_progress_bar()
    model, processor = load_model(
        name, dtype=getattr(torch, dtype), device=device, trust_remote_code=trust_remote_code
    )
    use_engine(model, tower_engine)
    return model, processor


def use_engine(model: Any, tower_engine: str) -> None:
    """`engines.enable`, and let it say what runs the tower from when on."""
    from .. import engines

    logging.getLogger(engines.__name__).setLevel(logging.INFO)
    engines.enable(model, tower_engine)


def writable(path: Path) -> Path:
    """A file to be written, asked for before the work: its folder exists, and may be written to."""
    from ..storage.files import make_folder

    make_folder(path.parent)
    if path.is_dir():
        raise fail(f"{str(path)!r} is a folder; expected the name of a file to write")
    return path
