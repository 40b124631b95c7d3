"""`tvrn regions`, `tvrn teachers`, `tvrn duplicates`, `tvrn verify`: what is computed once and kept on disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import AsJson, Device, TowerEngine, TrustRemoteCode, fail, progress, say, tell_more, use_engine

if TYPE_CHECKING:
    from ..teachers import RegionCache, TeacherCache

Data = Annotated[
    str, typer.Argument(metavar="DATA", help="what load_pairs reads: flickr8k, coco, scenes, a folder, a Hub id, ...")
]
Split = Annotated[str | None, typer.Option(help="train, validation, ... (may be left out where there is only one)")]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="folder of the cache")]
Stored = Annotated[str, typer.Option("--dtype", help="float16 or float32: how numbers are stored")]
Computed = Annotated[str, typer.Option(help="float32, bfloat16 or float16: what the network computes in")]
NumWorkers = Annotated[int, typer.Option(min=0, help="processes that decode photographs; 0: this one")]
Streaming = Annotated[bool, typer.Option("--streaming", help="read the data as a stream, without a local copy")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="drop the cache that is in the folder")]
DTYPES = {"--dtype": ("float16", "float32"), "--compute-dtype": ("float32", "bfloat16", "float16")}


def regions(
    data: Data,
    output: Output,
    features: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Hub id or folder of a vision backbone, or of a dual encoder")
    ] = None,
    detector: Annotated[
        str | None,
        typer.Option(
            metavar="ID", help="Hub id or folder of an object detector: its boxes, with its features or --features'"
        ),
    ] = None,
    split: Split = None,
    grid_size: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="pool the map to N x N regions (default: the map as it is)")
    ] = None,
    boxes_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="column with boxes to pool the map in, instead of a grid")
    ] = None,
    max_regions: Annotated[
        int, typer.Option(min=1, help="boxes kept of an image: a column's first, a detector's surest")
    ] = 36,
    image_size: Annotated[
        int | None, typer.Option(metavar="PIXELS", min=1, help="side that photographs are brought to (a backbone's)")
    ] = None,
    dtype: Stored = "float16",
    compute_dtype: Computed = "float32",
    batch_size: Annotated[int, typer.Option(min=1, help="images at once")] = 32,
    num_workers: NumWorkers = 0,
    device: Device = None,
    tower_engine: TowerEngine = "auto",
    streaming: Streaming = False,
    verify: Annotated[str, typer.Option(help="header or full: how corrupt images are found")] = "header",
    overwrite: Overwrite = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="run Python code of a vision backbone's repository")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run a frozen network once over the photographs and keep its regions, so that training does not run it again.

    What MODEL is, is found out: of a dual encoder (CLIP, SigLIP, ...) its embeddings are kept as well. Killed and
    started again, it goes on where it stopped. Train with regions=FOLDER, where {split} stands for the split's name.

    \b
    Examples:
      tvrn regions flickr8k --features google/mobilenet_v2_1.0_224 --grid-size 6 --split train --output regions/train
      tvrn regions flickr30k --features openai/clip-vit-base-patch32 --grid-size 7 --split train -o regions/clip/train
      tvrn regions coco --detector ustc-community/dfine-small-coco --split train --output regions/dfine/train
      tvrn regions boxes.parquet --features microsoft/resnet-50 --boxes-column boxes --output regions/boxes
    """
    _check_choices({"--dtype": dtype, "--compute-dtype": compute_dtype})
    if verify not in ("header", "full"):
        raise fail(f"--verify is {verify!r}; expected header or full")
    if features is None and (detector is None or boxes_column is not None):
        raise fail("give --features MODEL, --detector ID, or both; --boxes-column needs --features")
    ways = {"--grid-size": grid_size, "--boxes-column": boxes_column, "--detector": detector}
    if len(given := [option for option, value in ways.items() if value is not None]) > 1:
        raise fail(f"{' and '.join(given[:2])} are two ways to choose regions; give one of them")
    tell_more()
    from ..data import load_pairs
    from ..front_door import load_region_model
    from ..teachers import RegionCache

    way: dict[str, Any] = {"streaming": True} if streaming else {"verify": verify}
    records = load_pairs(data, split, **way | ({} if boxes_column is None else {"extra_columns": [boxes_column]}))
    model, processor = load_region_model(
        features, grid_size, image_size, device, trust_remote_code, detector, max_regions
    )
    use_engine(model, tower_engine)
    boxes = {} if boxes_column is None else _boxes(str(features), model, processor, boxes_column, max_regions)
    cache = RegionCache.build(
        model,
        processor,
        records,
        output,
        batch_size=batch_size,
        dtype=dtype,
        compute_dtype=compute_dtype,
        num_workers=num_workers,
        overwrite=overwrite,
        info=_origin(data, split) | {"backbone": features, "detector": detector},
        progress=progress(),
        **boxes,
    )
    _say_cache(cache, {"seconds": cache.info["seconds"]}, f"{cache.info['seconds']} s in this run", as_json)


def _boxes(name: str, model: Any, processor: Any, column: str, max_regions: int) -> dict[str, Any]:
    """How boxes become regions: the whole photograph is squeezed into the tower's pixels, and its map pooled."""
    from ..front_door import box_feature_map
    from ..teachers import resize_only

    before = processor.image_processor.to_dict()
    resize_only(processor.image_processor)
    if model.dual_encoder is not None and processor.image_processor.to_dict() != before:
        raise ValueError(
            f"{name!r} crops or pads photographs, so its embeddings and the boxes of --boxes-column would see "
            "different pixels; take a dual encoder that only resizes (SigLIP), or a vision backbone"
        )
    return {"boxes_column": column, "max_regions": max_regions, "feature_map": box_feature_map(model)}


def teachers(
    data: Data,
    modality: Annotated[str, typer.Option(metavar="image|text", help="what it judges")],
    output: Output,
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="Hub id or folder of any model that AutoModel loads", show_default=False),
    ] = None,
    split: Split = None,
    regions: Annotated[
        Path | None, typer.Option(metavar="CACHE", help="in place of MODEL: the mean of each image's cached regions")
    ] = None,
    pooling: Annotated[
        str | None,
        typer.Option(
            help="features, pooler, cls, mean, max or last: how the output becomes one vector (default: as trained)"
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit of MODEL on the Hub")] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="tokens at which captions are cut (default: the teacher's)")
    ] = None,
    dtype: Stored = "float16",
    compute_dtype: Computed = "float32",
    batch_size: Annotated[int, typer.Option(min=1, help="items at once")] = 64,
    num_workers: NumWorkers = 0,
    device: Device = None,
    tower_engine: TowerEngine = "auto",
    streaming: Streaming = False,
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Run a frozen teacher once over a data set and keep its vectors, for training with CUSA.

    Several processes share the work, and one joins the parts: `torchrun --nproc-per-node 4 -m modeling_tvrn.cli
    teachers …`. Killed and started again, it goes on where it stopped. Train with cusa=true
    cusa_image_teacher=FOLDER cusa_text_teacher=FOLDER.

    \b
    Examples:
      tvrn teachers flickr8k facebook/dinov2-base --modality image --split train --output teachers/dinov2
      tvrn teachers flickr8k sentence-transformers/all-mpnet-base-v2 --modality text --split train -o teachers/mpnet
      tvrn teachers flickr8k --regions regions/train --modality image --split train --output teachers/regions
    """
    if modality not in ("image", "text"):
        raise fail(f"--modality is {modality!r}; expected image or text")
    if (model is None) == (regions is None):
        raise fail("give either a MODEL, by Hub id or folder, or --regions, exactly one of them")
    if regions is not None and modality != "image":
        raise fail("--regions holds what was seen in photographs; give it with --modality image")
    _check_choices({"--dtype": dtype, "--compute-dtype": compute_dtype})
    tell_more()
    from accelerate import PartialState
    from torch.cuda import is_available

    from ..data import load_pairs
    from ..teachers import Teacher, TeacherCache

    if regions is not None:
        return _teachers_of_regions(data, split, regions, output, dtype, overwrite, as_json)
    state = PartialState(cpu=device == "cpu" or not is_available())
    assert model is not None  # checked above
    teacher = Teacher.from_pretrained(
        model,
        modality,
        pooling=pooling,
        dtype=compute_dtype,
        device=device or state.device,
        max_length=max_length,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    if modality == "image":
        use_engine(teacher.model, tower_engine)
    way: dict[str, Any] = {"streaming": streaming}
    cache = TeacherCache.build(
        teacher,
        load_pairs(data, split, **way),
        output,
        batch_size=batch_size,
        dtype=dtype,
        num_workers=num_workers,
        process=state.process_index,
        processes=state.num_processes,
        overwrite=overwrite,
        info=_origin(data, split),
        progress=progress() and state.is_local_main_process,
    )
    state.wait_for_everyone()
    if not state.is_main_process:
        return  # of several processes one joins and speaks
    if state.num_processes > 1:
        cache = TeacherCache.join(output)
    _say_cache(cache, {"pooling": teacher.pooling}, f"pooling {teacher.pooling!r}", as_json)


def _teachers_of_regions(
    data: str, split: str | None, regions: Path, output: Path, dtype: str, overwrite: bool, as_json: bool
) -> None:
    """Vectors from a region cache, in one process: there is next to nothing to compute."""
    from ..data import load_pairs
    from ..teachers import RegionCache, TeacherCache

    records, source = load_pairs(data, split), RegionCache.load(regions)
    try:
        cache = TeacherCache.from_regions(
            source, records, output, dtype=dtype, overwrite=overwrite, progress=progress()
        )
    except KeyError as error:
        raise fail(f"--regions is of other data: {error.args[0]}") from error
    _say_cache(cache, {"regions": str(regions)}, f"means of {source}", as_json)


def duplicates(
    data: Data,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="folder of the table and the page")],
    split: Split = None,
    image_teacher: Annotated[
        Path | None, typer.Option(metavar="CACHE", help="of the photographs' vectors (tvrn teachers)")
    ] = None,
    text_teacher: Annotated[Path | None, typer.Option(metavar="CACHE", help="of the captions' vectors")] = None,
    image_threshold: Annotated[float, typer.Option(help="cosine of near-duplicates, above -1 and up to 1")] = 0.9,
    text_threshold: Annotated[float, typer.Option(help="cosine of near-duplicates, above -1 and up to 1")] = 0.9,
    limit: Annotated[int, typer.Option(min=1, help="pairs kept for each teacher")] = 1000,
    shown: Annotated[int, typer.Option(min=0, help="pairs for each teacher on the page")] = 60,
    thumbnail: Annotated[
        int, typer.Option(metavar="PIXELS", min=1, help="longest side of a photograph on the page")
    ] = 168,
    as_json: AsJson = False,
) -> None:
    """Find training pairs that count as negatives though a teacher calls them near-duplicates.

    The folder then holds false_negatives.parquet, all pairs found, and false_negatives.html, the first of them with
    photographs and captions, in one file that needs nothing else.

    \b
    Examples:
      tvrn duplicates flickr8k --split train --image-teacher teachers/dinov2 --text-teacher teachers/mpnet -o reports
      tvrn duplicates pairs.csv --text-teacher teachers/mpnet --text-threshold 0.95 --output reports
    """
    if image_teacher is None and text_teacher is None:
        raise fail("no teacher: give --image-teacher, --text-teacher, or both")
    from ..data import load_pairs
    from ..teachers import TeacherCache, false_negatives, write_duplicates

    folders = {"image": image_teacher, "text": text_teacher}
    caches = {side: TeacherCache.load(path, modality=side) for side, path in folders.items() if path is not None}
    records, thresholds = load_pairs(data, split), {"image": image_threshold, "text": text_threshold}
    try:
        table, counts = false_negatives(
            records, caches.get("image"), caches.get("text"), image_threshold, text_threshold, limit
        )
    except KeyError as error:
        raise fail(f"a teacher's cache is of other data: {error.args[0]}") from error
    name = ", ".join(filter(None, [Path(data).name, split]))
    written, page = write_duplicates(
        output, records, table, counts, name=name, thresholds=thresholds, shown=shown, thumbnail=thumbnail
    )
    lines = [f"{side} teacher: {found['pairs']:,} of {found['compared']:,} pairs" for side, found in counts.items()]
    text = "\n".join([*lines, f"{len(table)} pairs of photographs: {page}"])
    say({"pairs": len(table), "teachers": counts, "table": str(written), "page": str(page)}, text, as_json)


def verify(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="of a cache, an index, a run, finished blocks")],
    as_json: AsJson = False,
) -> None:
    """Compare every file with its checksum: of caches, indexes, checkpoints, trained models and finished blocks.

    Opening them compares what is read whole; this also reads what is mapped into memory, such as the features of a
    cache. Exit code 1 if a file is damaged; each is named with what to do.

    \b
    Examples:
      tvrn verify regions/train
      tvrn verify photos.index --json | jq .broken
    """
    from ..storage.verify import verify as compare

    read, broken = compare(folder)
    text = "\n".join([*map(str, broken), f"{len(read)} files compared, {len(broken)} broken"])
    say(
        {
            "files": len(read),
            "broken": [{"file": str(error.path), "problem": error.problem, "fix": error.fix} for error in broken],
        },
        text,
        as_json,
    )
    raise typer.Exit(1 if broken else 0)


def _check_choices(given: dict[str, str]) -> None:
    for option, value in given.items():
        if value not in DTYPES[option]:
            raise fail(f"{option} is {value!r}; expected one of {', '.join(DTYPES[option])}")


def _origin(data: str, split: str | None) -> dict[str, Any]:
    from ..evaluation.provenance import command

    return {"command": command(), "data": data, "split": split}


def _say_cache(cache: RegionCache | TeacherCache, facts: dict[str, Any], text: str, as_json: bool) -> None:
    found = {"cache": str(cache.store.directory), "items": len(cache), "bytes": cache.store.bytes, **facts}
    say(found, f"{cache}, {text}, {cache.store.bytes / 1e6:.1f} MB", as_json)
