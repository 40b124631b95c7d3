"""The command line itself: its verbs, what it answers to mistakes, and with which exit code."""

from __future__ import annotations

import logging
import os
import select
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from ..redaction import guard_logs, redacted_text
from . import caches, compare, evaluate, find, measure, share
from .common import prepare_terminal

__all__ = ["app", "main"]

MISTAKE, INTERRUPTED = 2, 130
ABOUT = """Image-text matching with TVRN: train, measure, share, search and explain.

\b
Exit codes: 0 done; 1 the doctor found faults, or a run was stopped; 2 wrong input; 130 interrupted.
`tvrn VERB --help` shows examples. Progress goes to a terminal's stderr only, results go to stdout.
"""


class Verbs(typer.core.TyperGroup):
    """The verbs; a mistake of the user's is one line, not a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run a verb."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except BrokenPipeError:
            if not hasattr(select, "poll") or not reader_left():  # Windows ends such a program by itself
                raise
            raise typer.Exit from None  # whoever reads, such as `head`, has seen enough
        except (ValueError, OSError, ImportError) as error:
            # An extra that is missing, a file that is not there, a value that is wrong: all say what to do.
            if logging.getLogger(__package__).isEnabledFor(logging.DEBUG):
                raise
            typer.echo(f"tvrn: {redacted_text(str(error))}", err=True)
            raise typer.Exit(MISTAKE) from error
        except KeyboardInterrupt as error:
            typer.echo("tvrn: interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from error


def reader_left() -> bool:
    """Whether nobody reads stdout any more; what is left to be written then goes nowhere."""
    watched = select.poll()
    watched.register(sys.stdout, select.POLLERR)
    if not watched.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


app = typer.Typer(
    cls=Verbs,
    help=ABOUT,
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from .. import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _start(
    verbose: Annotated[
        int, typer.Option("--verbose", "-v", count=True, help="tell more; twice: debug, tracebacks")
    ] = 0,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="and exit")] = False,
) -> None:
    if verbose:
        logging.getLogger("modeling_tvrn").setLevel(logging.INFO if verbose == 1 else logging.DEBUG)


VERBS: dict[str, tuple[Callable[..., None], str]] = {
    "train": (measure.train, "train a model"),
    "evaluate": (evaluate.evaluate, "measure recall by a named protocol"),
    "compare": (compare.compare, "measure several models in one table, with what they cost"),
    "calibrate": (measure.calibrate, "make probabilities of a model's scores"),
    "regions": (caches.regions, "keep a frozen network's regions of photographs for training"),
    "teachers": (caches.teachers, "keep a frozen teacher's vectors for training with CUSA"),
    "duplicates": (caches.duplicates, "find near-duplicates among the negatives of training"),
    "verify": (caches.verify, "compare stored files with their checksums"),
    "score": (measure.score, "score the image-caption pairs of a table, and filter them"),
    "index": (find.index, "index a collection, or bring its index up to date"),
    "search": (find.search, "search photographs by a sentence or a picture"),
    "explain": (find.explain, "show which words and regions make a pair's score"),
    "demo": (find.demo, "serve a page that searches a folder of photographs"),
    "doctor": (share.doctor, "examine a checkpoint: does it load and score for others?"),
    "export": (share.export, "write ONNX files that run without torch"),
    "push": (share.push, "publish a model on the Hub"),
    "card": (share.card, "render a run's model card again"),
    "space": (share.space, "write a Hugging Face Space that searches your photographs"),
}
for verb, (function, summary) in VERBS.items():
    # Of a key written as an option the verb itself says how it is written.
    settings = {"ignore_unknown_options": True} if verb == "train" else None
    app.command(verb, short_help=summary, context_settings=settings)(function)


def main() -> None:
    """The entry point `tvrn`."""
    prepare_terminal()
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s", stream=sys.stderr)
    guard_logs()
    app(prog_name="tvrn")
