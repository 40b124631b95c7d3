"""`tvrn train`, `tvrn calibrate`, `tvrn score`."""

from __future__ import annotations

import contextlib
import csv
import itertools
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..redaction import redacted_text
from .common import (
    AsJson,
    Device,
    Dtype,
    Model,
    TrustRemoteCode,
    as_json_text,
    fail,
    load,
    progress,
    say,
    say_cut,
    say_unknown,
    tell_more,
    writable,
)
from .evaluate import Checkpoints

if TYPE_CHECKING:
    from .pairs import ScoredPair

STOPPED = 1


def train(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="keys that replace those of the file")
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            "--config", "-c", metavar="NAME|FILE", help="a shipped recipe, or a YAML file of keys; - is stdin"
        ),
    ] = None,
    keys: Annotated[bool, typer.Option("--keys", help="explain every key, and exit")] = False,
    as_json: AsJson = False,
) -> None:
    """Train a model and write it, with its card and results, into a folder that AutoModel loads.

    Without -c: the recipe `own` for your own data, else the quickstart on generated scenes. Of data without a
    validation split a part is set aside. Several processes: `accelerate launch -m modeling_tvrn.cli train …`.

    \b
    Examples:
      tvrn train -c scenes
      tvrn train data=pairs.csv output_dir=runs/mine
      tvrn train -c flickr8k phases.0.epochs=5 model.hidden_size=128
      tvrn train --keys
    """
    from ..training import TrainingConfig, describe
    from ..training.command import settings_of
    from ..training.interrupt import watching_signals

    if keys:
        return typer.echo(describe(TrainingConfig))
    settings = settings_of(config, overrides or [])
    tell_more()
    with watching_signals(set_up=True):  # from here on: importing takes seconds
        from ..training import TrainingStopped
        from ..training import train as run

    try:
        results = run(settings)
    except TrainingStopped as error:
        typer.echo(f"tvrn: {redacted_text(str(error))}", err=True)
        raise typer.Exit(STOPPED) from error
    if os.environ.get("RANK", "0") != "0":
        return  # of several processes one speaks
    shown = {name: value for name, value in results.items() if name not in ("history", "table")}
    say(shown, f"{results['table']}\n\nmodel, card, results and pictures: {settings.output_dir}", as_json)


def calibrate(
    model: Model,
    data: Annotated[str, typer.Option(help="what load_pairs reads: flickr8k, coco, scenes, a folder, a Hub id")],
    split: Annotated[str | None, typer.Option(help="validation, ...: none that was trained on")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FOLDER", help="where to (default: MODEL itself)")
    ] = None,
    regions: Annotated[
        Path | None, typer.Option(metavar="CACHE", help="region cache of the split in place of pictures")
    ] = None,
    picture: Annotated[Path | None, typer.Option(metavar="FILE.png", help="draw the calibration")] = None,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Make probabilities of a model's scores, for `tvrn search --min-score` and `tvrn score --threshold`.

    Training does it by itself; this is for dual encoders (CLIP, SigLIP, …), older models and other data. The first 100
    images are calibrated on, up to 200 others measured on. Rankings stay, and so do indexes built before.

    \b
    Examples:
      tvrn calibrate openai/clip-vit-base-patch32 --data flickr8k --split validation -o clip
      tvrn calibrate runs/flickr8k --data holidays.csv --picture calibration.png
    """
    from ..hub.files import read_json

    folder = output or Path(model)
    if output is None and read_json(folder / "config.json").get("model_type") != "tvrn":
        raise fail(f"--output is needed: {model!r} is no folder of a TVRN, which could be calibrated in its place")
    if picture is not None:
        writable(picture)
    from ..data import load_pairs, with_words
    from ..training.best_model import save_model
    from ..training.calibration import calibrate_and_measure

    checkpoints = Checkpoints(load_pairs(data, split), device, "float32", trust_remote_code)
    loaded, processor, records = checkpoints.load(model, regions)
    records = with_words(records, processor)
    report = calibrate_and_measure(loaded, processor, records, progress())
    save_model(folder, loaded, processor)
    if report is not None and picture is not None:
        from ..plots import plot_calibration

        plot_calibration(report.bins, picture)
    measured = {} if report is None else report.as_dict()
    text = "" if report is None else f"{report.table()}\n\n"
    say({"written": str(folder), **measured}, f"{text}written: {folder}", as_json)


def score(
    model: Model,
    pairs: Annotated[
        Path, typer.Argument(metavar="CSV", help="table with a header: columns image and caption; - is stdin")
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="CSV to write (default: stdout)")] = None,
    images: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="where image paths begin, and absolute ones lie (default: the table's)"),
    ] = None,
    threshold: Annotated[float | None, typer.Option(min=0, max=1, help="only rows that score at least this")] = None,
    below: Annotated[bool, typer.Option("--below", help="with --threshold: only rows that score less")] = False,
    image_column: Annotated[str, typer.Option(help="name of the column of image paths")] = "image",
    caption_column: Annotated[str, typer.Option(help="name of the column of captions")] = "caption",
    batch_size: Annotated[int, typer.Option(min=1, help="rows at a time")] = 64,
    device: Device = None,
    dtype: Dtype = "float32",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Score how well each caption of a table fits its image, and filter the rows by that.

    The table comes out with the columns `score` and `score_kind`: "matching score", between 0 and 1, or "cosine" for a
    dual encoder (CLIP, …) that nobody has calibrated, with which a threshold is refused. Columns of these names that
    it had are kept as `score_1`, `score_kind_1`. A row whose image cannot be read or whose caption has no word has no
    score, is reported on stderr, and is left out where there is a threshold. --json: one object a line.

    \b
    Examples:
      tvrn score runs/flickr8k pairs.csv -o scored.csv
      tvrn score me/my-tvrn pairs.csv --threshold 0.5 > clean.csv
      tvrn score me/my-tvrn pairs.csv --threshold 0.2 --below --json | jq -r .image
    """
    if below and threshold is None:
        raise fail("--below goes with --threshold")
    output = None if str(output) == "-" else output
    if output is not None:
        writable(output)
    from .pairs import read_pairs, score_pairs

    with _file(pairs) as table:
        rows = list(read_pairs(table, image_column, caption_column))
    loaded, processor = load(model, device, dtype, trust_remote_code)
    if threshold is not None and not loaded.is_calibrated:
        raise fail(
            f"--threshold is {threshold:g}, but {model!r} is not calibrated: its scores rank pairs and have no value "
            "from which on a caption fits. Leave it out and look at the ranking, or calibrate the model (tvrn "
            "calibrate MODEL --data … --split …)"
        )
    from tqdm import tqdm

    scored = score_pairs(loaded, processor, rows, pairs.parent, image_column, caption_column, batch_size, images)
    watched = tqdm(scored, total=len(rows), desc="pairs", disable=not progress())
    kept = _filtered(watched, threshold, below, image_column)
    columns = list(rows[0])
    if output is None:
        with contextlib.suppress(AttributeError):  # a stream that is no file
            # Bytes as they came, whatever the terminal's encoding.
            sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")  # type: ignore[union-attr]
        _write_rows(kept, columns, loaded.score_kind, sys.stdout, as_json)
    else:
        with output.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            _write_rows(kept, columns, loaded.score_kind, file, as_json)
    say_cut(processor)
    say_unknown(processor, dict.fromkeys(row[caption_column] for row in rows))


@contextlib.contextmanager
def _file(path: Path) -> Iterator[Path]:
    """A file that may be read more than once; `-` is a copy of stdin."""
    if str(path) != "-":
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="tvrn-score-") as folder:
        copy = Path(folder) / "stdin.csv"
        with copy.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        try:
            yield copy
        except ValueError as error:
            raise ValueError(str(error).replace(str(copy), "standard input")) from error


def _filtered(
    scored: Iterable[ScoredPair], threshold: float | None, below: bool, image_column: str
) -> Iterator[ScoredPair]:
    unscored = 0
    for number, pair in enumerate(scored, start=1):
        if pair.score is None:
            unscored += 1
            typer.echo(f"tvrn: row {number}: no score for {pair.row[image_column]!r}: {pair.problem}", err=True)
        if threshold is None or (pair.score is not None and (pair.score < threshold) is below):
            yield pair
    if unscored:
        typer.echo(f"tvrn: {unscored} rows without a score", err=True)


def _write_rows(kept: Iterable[ScoredPair], columns: list[str], kind: str, file: Any, as_json: bool) -> None:
    names = list(columns)
    for taken in {"score", "score_kind"} & {*columns}:  # of another model; kept under new names
        free = (f"{taken}_{number}" for number in itertools.count(1))
        names[columns.index(taken)] = next(name for name in free if name not in columns)
    writer = csv.DictWriter(file, [*names, "score", "score_kind"], lineterminator="\n")
    if not as_json:
        writer.writeheader()
    for pair in kept:
        row = dict(zip(names, pair.row.values(), strict=True))
        if as_json:
            file.write(as_json_text({**row, "score": pair.score, "score_kind": kind}) + "\n")
        else:
            score = "" if pair.score is None else f"{pair.score:.6f}"
            writer.writerow({**row, "score": score, "score_kind": kind})
