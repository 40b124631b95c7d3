"""`tvrn compare`: several models in one table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import AsJson, Device, Dtype, TrustRemoteCode, progress, say, writable
from .evaluate import Checkpoints, read_records, with_caches


def compare(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="folders or Hub ids, at least two")],
    data: Annotated[str, typer.Option(help="what load_pairs reads: flickr8k, coco, scenes, a folder, a Hub id")],
    split: Annotated[str | None, typer.Option(help="train, validation, test, ...")] = None,
    protocol: Annotated[
        str, typer.Option(help="validation (any size), flickr8k-1k, flickr30k-1k, coco-5k, coco-1k")
    ] = "validation",
    shortlist_size: Annotated[
        int | None, typer.Option(metavar="K", help="pair scores rerank K candidates a query (default: all)", min=1)
    ] = None,
    data_option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="further keyword of load_pairs; may be repeated")
    ] = None,
    regions: Annotated[
        list[Path] | None,
        typer.Option(metavar="CACHE", help="region cache in place of pictures: one, or one for each model, in order"),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="images, and captions, encoded at a time")] = 64,
    num_workers: Annotated[int, typer.Option(min=0, help="processes that decode pictures")] = 0,
    device: Device = None,
    dtype: Dtype = "float32",
    trust_remote_code: TrustRemoteCode = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="also write the report as JSON")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure several models on the same images and captions, by their embeddings and by their pair scores.

    For each score: recalls and rSum, the gain over the first row with its 95 % interval (paired bootstrap over images;
    of every recall in JSON), milliseconds a query, kilobytes an image, operations a pair.

    \b
    Examples:
      tvrn compare openai/clip-vit-base-patch32 runs/clip --data flickr8k --split test --protocol flickr8k-1k
      tvrn compare runs/flickr8k runs/flickr8k-bigru --data flickr8k --split validation --regions regions/validation
      tvrn compare runs/coco google/siglip2-base-patch16-224 --data coco --split test --shortlist-size 64 --json
    """
    chosen = with_caches(models, regions)
    if output is not None:
        writable(output)  # before the work
    from ..evaluation import check_names
    from ..evaluation import compare as measure
    from ..front_door import check_exists

    check_names(models)
    for name in models:
        check_exists(name)
    checkpoints = Checkpoints(read_records(data, split, data_option or []), device, dtype, trust_remote_code)
    networks, processors, records = zip(*(checkpoints.load(name, cache) for name, cache in chosen), strict=True)
    report = measure(
        networks, processors, records, models, protocol, shortlist_size=shortlist_size, batch_size=batch_size,
        num_workers=num_workers, data=data, progress=progress(),
    )  # fmt: skip
    if output is not None:
        report.to_json(output)
    say(report.as_dict(), report.table(), as_json)
