"""`tvrn evaluate`: every protocol, on one model or several, alone or against others."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import AsJson, Device, Dtype, TowerEngine, TrustRemoteCode, fail, load, progress, say, writable


def evaluate(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="folder or Hub id; several are averaged")],
    data: Annotated[
        str | None, typer.Option(help="what load_pairs reads: flickr8k, coco, scenes, a folder, a Hub id")
    ] = None,
    split: Annotated[str | None, typer.Option(help="train, validation, test, ...")] = None,
    protocol: Annotated[
        str,
        typer.Option(
            help="validation (any size), flickr8k-1k, flickr30k-1k, coco-5k, coco-1k, eccv-caption, cxc, contrast, "
            "unimodal (texts among texts, images among images), graded (human grades of pairs), fits (does anything "
            "fit? of a calibrated model)"
        ),
    ] = "validation",
    compare: Annotated[
        list[str] | None,
        typer.Option(metavar="OTHER", help="a baseline, several are averaged: paired bootstrap over images"),
    ] = None,
    shortlist_size: Annotated[
        int | None, typer.Option(metavar="K", help="search K candidates a query and rerank them", min=1)
    ] = None,
    exhaustive: Annotated[
        bool, typer.Option("--exhaustive", help="beside a shortlist, also score every pair")
    ] = False,
    embeddings: Annotated[
        bool, typer.Option("--embeddings/--no-embeddings", help="beside the pair score, that of the embeddings alone")
    ] = True,
    data_option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="further keyword of load_pairs; may be repeated")
    ] = None,
    regions: Annotated[
        list[Path] | None,
        typer.Option(metavar="CACHE", help="region cache in place of pictures: one, or one for each model, in order"),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="contrast: where the images of a file of rows are")
    ] = None,
    grades: Annotated[
        Path | None, typer.Option(metavar="FILE", help="graded: image, caption id, grades, as Flickr8k-Expert's file")
    ] = None,
    sentence_pairs: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="unimodal: parquet or CSV with sentence1, sentence2, score (STS benchmark)"),
    ] = None,
    image_labels: Annotated[
        Path | None, typer.Option(metavar="FILE", help="unimodal: CSV with image_id, label, or a JSON object")
    ] = None,
    cxc: Annotated[Path | None, typer.Option(metavar="FOLDER", help="cxc: with sis_test.csv and sts_test.csv")] = None,
    blocks: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="keep finished blocks, to go on after a crash")
    ] = None,
    memory_budget: Annotated[float, typer.Option(metavar="GB", help="of blocks beside the gallery")] = 1.0,
    batch_size: Annotated[int, typer.Option(min=1, help="images, and captions, encoded at a time")] = 64,
    chunk_size: Annotated[
        int | None, typer.Option(min=1, help="pairs scored at a time (default: the model's own choice)")
    ] = None,
    num_workers: Annotated[int, typer.Option(min=0, help="processes that decode pictures")] = 0,
    device: Device = None,
    dtype: Dtype = "float32",
    tower_engine: TowerEngine = "torch",  # so that a figure, and the blocks of a killed run, come out the same
    trust_remote_code: TrustRemoteCode = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="also write the report as JSON")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure recall by a named protocol; the report says where every number comes from.

    Several processes share the scoring: `torchrun --nproc-per-node 2 -m modeling_tvrn.cli evaluate …`.

    \b
    Examples:
      tvrn evaluate runs/flickr8k --data flickr8k --split validation
      tvrn evaluate me/my-tvrn --data coco --split test --protocol coco-5k --shortlist-size 128 --json
      tvrn evaluate runs/saf runs/sgr --data flickr30k --split test --protocol flickr30k-1k --compare runs/clip
      tvrn evaluate runs/scenes --data scenes --split validation --protocol contrast
      tvrn evaluate openai/clip-vit-base-patch32 --data swap_obj.json --images val2017 --protocol contrast
      tvrn evaluate runs/cusa --protocol unimodal --sentence-pairs stsb/validation.parquet
      tvrn evaluate runs/coco --data coco --split test --protocol cxc --cxc CxC/data
    """
    from ..data.contrast import READERS
    from ..evaluation import CONTRAST, PROTOCOLS

    protocols = [*PROTOCOLS, CONTRAST, "unimodal", "graded", "fits"]
    if protocol not in protocols:
        raise fail(f"--protocol is {protocol!r}; expected one of {', '.join(protocols)}")
    if exhaustive and shortlist_size is None:
        raise fail("--exhaustive goes with --shortlist-size; without one every pair is scored anyway")
    if data is None and (protocol != "unimodal" or sentence_pairs is None):
        raise fail("--data is needed, except by --protocol unimodal with --sentence-pairs")
    belonging = {
        "unimodal": {"--sentence-pairs": sentence_pairs, "--image-labels": image_labels},
        "graded": {"--grades": grades},
        "cxc": {"--cxc": cxc},
        CONTRAST: {"--images": images},
    }
    for owner, options in belonging.items():
        for option, value in options.items():
            if value is not None and protocol != owner:
                raise fail(f"{option} goes with --protocol {owner}, not {protocol}")
    if protocol == "graded" and grades is None:
        raise fail("--protocol graded and --grades FILE go together")
    if compare and protocol not in PROTOCOLS:
        raise fail(f"--compare goes with protocols of recall, not with {protocol}")
    others = compare or []
    chosen = with_caches([*models, *others], regions)
    from_file = protocol == CONTRAST and Path(str(data)).suffix.lower() in READERS
    if from_file and regions:
        raise fail(f"--regions goes with data of load_pairs, and {data!r} is a file of contrast rows; leave it out")
    if images is not None and not from_file:
        raise fail(f"--images goes with a file of contrast rows ({', '.join(READERS)}), and --data is {data!r}")
    if output is not None:
        writable(output)  # before the work
    with _processes() as speaks:
        records = read_records(data, split, data_option or [], images if from_file else None, from_file)
        checkpoints = Checkpoints(records, device, dtype, trust_remote_code, tower_engine)
        if protocol == "unimodal":
            report, text = _unimodal(checkpoints, chosen, sentence_pairs, image_labels, batch_size)
        elif protocol == "graded":
            report, text = _graded(checkpoints, chosen, grades, batch_size)
        elif protocol == "fits":
            report, text = _fits(checkpoints, chosen, batch_size)
        else:
            settings = {
                "protocol": protocol, "batch_size": batch_size, "chunk_size": chunk_size, "data": data,
                "shortlist_size": shortlist_size, "exhaustive": exhaustive or shortlist_size is None,
                "embeddings": embeddings, "num_workers": num_workers, "memory_budget": memory_budget,
                "cxc_folder": cxc, "folder": blocks, "progress": progress(),
            }  # fmt: skip
            report, text = _ranked(checkpoints, chosen[: len(models)], chosen[len(models) :], settings)
        if output is not None and speaks:
            output.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        say(report, text, as_json)


@contextlib.contextmanager
def _processes() -> Iterator[bool]:
    """Join the processes that torchrun started, of which the first one speaks."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield True
        return
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        speaks = dist.get_rank() == 0
        with contextlib.nullcontext() if speaks else contextlib.redirect_stdout(io.StringIO()):
            yield speaks
    finally:
        dist.destroy_process_group()


def read_records(
    data: str | None, split: str | None, options: Sequence[str], images: Path | None = None, from_file: bool = False
) -> Any:
    """The data set, or the rows of a contrast file."""
    from ..data import load_pairs, read_contrast_rows

    if data is None:
        return None
    if from_file:
        return read_contrast_rows(data, images)
    if not options:
        return load_pairs(data, split)
    from ..training.settings import read_overrides

    return load_pairs(data, split, **read_overrides(options, {}))


Chosen = list[tuple[str, Path | None]]  # names of checkpoints, each with its region cache
Found = tuple[Any, str]  # a report for scripts, and for people


def with_caches(names: Sequence[str], regions: Sequence[Path] | None) -> Chosen:
    """Each model with its region cache: one for all, one for each, or none."""
    caches = list(regions or [])
    if len(caches) not in (0, 1, len(names)):
        raise fail(f"--regions names {len(caches)} caches for {len(names)} models; one, or one for each")
    by_model: list[Path | None] = [*caches] if len(caches) > 1 else [next(iter(caches), None)] * len(names)
    return list(zip(names, by_model, strict=True))


@dataclass
class Checkpoints:
    """How checkpoints are loaded, and what each of them reads."""

    records: Any
    device: str | None
    dtype: str
    trust_remote_code: bool
    tower_engine: str = "torch"

    def load(self, name: str, cache: Path | None) -> tuple[Any, Any, Any]:
        """Model, processor, and the records, with cached regions if there are; of another tower they are refused."""
        from ..teachers import with_checked_regions

        model, processor = load(name, self.device, self.dtype, self.trust_remote_code, self.tower_engine)
        if cache is None:
            return model, processor, self.records
        # A cache names the weights of its tower as they are in full precision.
        exact = model
        if self.dtype != "float32":
            exact = load(name, "cpu", trust_remote_code=self.trust_remote_code)[0]
        return model, processor, with_checked_regions(self.records, cache, exact, processor)


def _ranked(checkpoints: Checkpoints, chosen: Chosen, baseline: Chosen, settings: dict[str, Any]) -> Found:
    """Models, averaged where there are several; and against others where there are such."""
    report = _measured(checkpoints, chosen, settings)
    written, text = report.as_dict(), report.table()
    if baseline:
        from ..metrics import paired_bootstrap

        other = _measured(checkpoints, baseline, settings)
        rows = report.caption_image_rows
        comparison = paired_bootstrap(report.metrics, other.metrics, caption_image_rows=rows)
        written |= {"baseline": other.as_dict(), "comparison": comparison.as_dict()}
        text += (
            f"\n\nBaseline\n\n{other.table()}\n\nPaired bootstrap over images, percent points\n\n{comparison.table()}"
        )
    return written, text


def _measured(checkpoints: Checkpoints, chosen: Chosen, settings: dict[str, Any]) -> Any:
    from ..evaluation import evaluate as measure
    from ..storage.fingerprints import digest

    names = [name for name, _ in chosen]
    models, processors, inputs = zip(*(checkpoints.load(*each) for each in chosen), strict=True)
    if settings["folder"] is not None:  # models to compare with have blocks of their own
        settings = {**settings, "folder": settings["folder"] / digest(sorted(names))[:12]}
    seeds = [seed for name in names for seed in _trained_seed(name)]
    if len(names) == 1:  # `contrast` takes one model, and no list
        return measure(models[0], processors[0], inputs[0], seeds=seeds, **settings)
    return measure(list(models), list(processors), inputs, seeds=seeds, **settings)


def _trained_seed(name: str) -> list[int]:
    """The seed that training left beside a checkpoint, where it is a folder."""
    results = Path(name) / "results.json"
    found = json.loads(results.read_text(encoding="utf-8")).get("seed") if results.is_file() else None
    return [] if found is None else [found]


def _unimodal(
    checkpoints: Checkpoints, chosen: Chosen, sentence_pairs: Path | None, image_labels: Path | None, batch_size: int
) -> Found:
    from ..evaluation import SentencePairs, evaluate_unimodal, read_image_labels

    pairs = SentencePairs.read(sentence_pairs) if sentence_pairs is not None else None
    labels = read_image_labels(image_labels) if image_labels is not None else None
    reports = {
        name: evaluate_unimodal(*checkpoints.load(name, cache), labels, pairs, batch_size, progress())
        for name, cache in chosen
    }
    return _each(reports)


def _graded(checkpoints: Checkpoints, chosen: Chosen, grades: Path | None, batch_size: int) -> Found:
    from ..evaluation import GradedPairs, evaluate_graded

    pairs = GradedPairs.read(str(grades))
    return _each({name: evaluate_graded(*checkpoints.load(name, cache), pairs, batch_size) for name, cache in chosen})


def _fits(checkpoints: Checkpoints, chosen: Chosen, batch_size: int) -> Found:
    from ..evaluation import evaluate_fits

    return _each({name: evaluate_fits(*checkpoints.load(name, cache), batch_size) for name, cache in chosen})


def _each(reports: dict[str, Any]) -> Found:
    """Reports of models by themselves."""
    written = [report.as_dict() | {"model": name} for name, report in reports.items()]
    return written, "\n\n".join(f"{name}\n{report.table()}" for name, report in reports.items())
