"""`tvrn index`, `tvrn search`, `tvrn explain`, `tvrn demo`."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from .caches import verify as verify_folder
from .common import (
    AsJson,
    Device,
    Dtype,
    Model,
    TowerEngine,
    TrustRemoteCode,
    fail,
    load,
    progress,
    say,
    say_unknown,
    table,
    writable,
)

Url = Annotated[
    str | None,
    typer.Option(help="of a Qdrant server, in place of a folder (extra: qdrant-client); its key: QDRANT_API_KEY"),
]
Collection = Annotated[str, typer.Option(help="its name on the server")]


def index(
    model: Model,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="folder of photographs, or data for load_pairs")],
    directory: Annotated[Path, typer.Argument(metavar="INDEX", help="folder of the index")],
    split: Annotated[str | None, typer.Option(help="of data for load_pairs")] = None,
    precision: Annotated[str, typer.Option(help="float32, int8 or binary: of the vectors searched")] = "float32",
    engine: Annotated[str, typer.Option(help="exact, hnsw, or auto: exact up to 50,000 items")] = "auto",
    embeddings_only: Annotated[
        bool, typer.Option("--embeddings-only", help="keep nothing for reranking by the pair score")
    ] = False,
    region_storage: Annotated[
        str | None,
        typer.Option(
            help="float16, int8 or int4: of the regions that reranking reads from disk (default: as the index has "
            "them, float16 for a new one)"
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="items encoded at a time")] = 32,
    num_workers: Annotated[int, typer.Option(min=1, help="threads that read and decode")] = 4,
    verify: Annotated[
        bool, typer.Option("--verify", help="compare INDEX with its checksums, build nothing; exit code 1 if broken")
    ] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="compare, delete what is broken, and make that anew")
    ] = False,
    url: Url = None,
    collection: Collection = "tvrn",
    shard_number: Annotated[int | None, typer.Option(min=1, help="pieces that the server cuts it into")] = None,
    replication_factor: Annotated[int | None, typer.Option(min=1, help="copies of each piece there")] = None,
    write_consistency_factor: Annotated[
        int | None, typer.Option(min=1, help="copies that have to confirm what is sent")
    ] = None,
    device: Device = None,
    dtype: Dtype = "float32",
    tower_engine: TowerEngine = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Index a collection for `tvrn search`, or bring its index up to date: only what is new or changed is encoded.

    A build that was interrupted goes on where it was. Whoever searches meanwhile sees the former index, whole.

    \b
    Examples:
      tvrn index runs/flickr8k ~/photos photos.index
      tvrn index me/my-tvrn flickr8k flickr8k.index --split validation --precision int8
      tvrn index runs/flickr8k ~/photos photos.index --repair
      tvrn index runs/flickr8k ~/photos photos.index --url http://localhost:6333 --replication-factor 2
    """
    if verify:
        return verify_folder(directory, as_json)
    shape: dict[str, Any] = {
        "shard_number": shard_number,
        "replication_factor": replication_factor,
        "write_consistency_factor": write_consistency_factor,
    }
    from ..index import ImageTextIndex

    loaded, processor = load(model, device, dtype, trust_remote_code, tower_engine)
    built = ImageTextIndex.build(
        loaded,
        processor,
        _collection(source, split),
        directory,
        precision=precision,
        engine=engine,
        features=not embeddings_only,
        region_storage=region_storage,
        batch_size=batch_size,
        num_workers=num_workers,
        progress=progress(),
        repair=repair,
        url=url,
        collection=collection,
        **{name: value for name, value in shape.items() if value is not None},
    )
    assert built.report is not None
    say(built.report.as_dict(), str(built.report), as_json)


def _collection(source: str, split: str | None) -> Any:
    """A folder of photographs as it is; what load_pairs reads, as records."""
    if split is None and Path(source).is_dir():
        return Path(source)
    from ..data import load_pairs

    return load_pairs(source, split)


def search(
    model: Model,
    where: Annotated[
        str | None, typer.Argument(metavar="FOLDER", help="folder of photographs, or of an index", show_default=False)
    ],
    text: Annotated[str | None, typer.Argument(metavar="TEXT", help="what to look for", show_default=False)] = None,
    image: Annotated[Path | None, typer.Option(help="look for what fits this picture", exists=True)] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="hits, at most")] = 10,
    keep: Annotated[
        list[str] | None, typer.Option("--where", metavar="COLUMN=VALUE", help="only items with this metadata")
    ] = None,
    shortlist_size: Annotated[int, typer.Option(min=1, help="candidates that the pair score sees")] = 64,
    min_score: Annotated[
        float | None, typer.Option(metavar="P", help="leave out what fits with a lower probability, 0 to 1")
    ] = None,
    no_rerank: Annotated[bool, typer.Option("--no-rerank", help="rank by the embeddings alone")] = False,
    picture: Annotated[Path | None, typer.Option(metavar="FILE.png", help="draw the photographs found")] = None,
    index_folder: Annotated[
        Path | None, typer.Option("--index", help="where a photograph folder's index is kept (default: user's cache)")
    ] = None,
    url: Url = None,
    collection: Collection = "tvrn",
    device: Device = None,
    dtype: Dtype = "float32",
    tower_engine: TowerEngine = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Search photographs by a sentence or by a picture; an index of captions by a picture.

    A folder of photographs is indexed first; the next search encodes only what is new. With --url give "" for FOLDER.

    \b
    Examples:
      tvrn search runs/flickr8k ~/photos "two dogs in snow"
      tvrn search runs/flickr8k ~/photos "an invoice" --min-score 0.1
      tvrn search me/my-tvrn photos.index "a child on a swing" -n 5 --picture found.png
      tvrn search me/my-tvrn photos.index --image dog.jpg --json | jq -r '.[].path'
    """
    if (text is None) == (image is None):
        raise fail("give either a TEXT or --image, exactly one of them")
    if picture is not None and picture.suffix.lower() != ".png":
        raise fail(f"--picture is {str(picture)!r}; expected a name that ends in .png")
    if picture is not None:
        writable(picture)
    wanted = _filters(keep or [])
    loaded, processor = load(model, device, dtype, trust_remote_code, tower_engine)
    opened = _opened(model, loaded, processor, where, index_folder, url, collection)
    hits = opened.search(
        text,
        image,
        limit,
        where=wanted,
        shortlist_size=shortlist_size,
        rerank=not no_rerank,
        min_score=min_score,
    )
    rows = [(hit.rank, hit.score, hit.path or hit.text or hit.id) for hit in hits]
    kind = hits[0].score_kind if hits else "score"
    say([asdict(hit) for hit in hits], f"{table(('rank', kind, 'found'), rows)}\n{hits.ending}".rstrip(), as_json)
    if picture is not None:
        _draw(text or f"{image}", hits, picture)


def _opened(
    name: str,
    model: Any,
    processor: Any,
    where: str | None,
    index_folder: Path | None,
    url: str | None,
    collection: str,
) -> Any:
    """The index to search: of a server, of a folder that holds one, or built of a folder of photographs."""
    from ..index import ImageTextIndex
    from ..index.versions import POINTER, SEGMENTS, current

    if url is not None:
        return ImageTextIndex.load(None, model, processor, url=url, collection=collection)
    folder = Path(where or "")
    if not where or not folder.is_dir():
        raise fail(f"FOLDER is {where!r}; expected a folder of photographs, or of an index")
    if current(folder) is not None:
        return ImageTextIndex.load(folder, model, processor)
    if any((folder / SEGMENTS).glob("*.safetensors")):
        raise fail(
            f"FOLDER is {where!r}, which holds an index without its {POINTER}: it is damaged, or was never finished. "
            "Run `tvrn index MODEL SOURCE` with this folder again, which keeps what was encoded"
        )
    kept = index_folder if index_folder is not None else _cached_index(name, folder)
    built = ImageTextIndex.build(model, processor, folder, kept, progress=progress())
    typer.echo(f"tvrn: {built.report}", err=True)
    return built


def _cached_index(model: str, folder: Path) -> Path:
    """Where the index of a folder of photographs is kept between searches, for each model."""
    from ..storage.files import cache_folder

    local = Path(model).resolve() if Path(model).exists() else model
    digest = hashlib.sha256(os.fsencode(f"{local}\n{folder.resolve()}")).hexdigest()[:16]
    return cache_folder("indexes") / f"{folder.resolve().name}-{digest}"


def _filters(keep: list[str]) -> dict[str, Any] | None:
    """{"column": [values]} of COLUMN=VALUE; a column named twice has either value, and 2023 is text or a number."""
    found: dict[str, Any] = {}
    for item in keep:
        column, equals, value = item.partition("=")
        if not equals:
            raise fail(f"--where is {item!r}; expected COLUMN=VALUE")
        found.setdefault(column, []).append(value)
        with contextlib.suppress(ValueError, RecursionError):
            if not isinstance(read := json.loads(value), str | list | dict):
                found[column].append(read)
    return found or None


def _draw(query: str, hits: Any, path: Path) -> None:
    from ..data.images import ImageError, decode_image
    from ..plots import plot_search_results

    shown, pictures = [], []
    for hit in hits:
        if hit.path is None:
            continue
        try:
            pictures.append(decode_image(hit.path))
        except ImageError as error:  # gone or changed since it was indexed
            typer.echo(f"tvrn: not drawn: {error}", err=True)
        else:
            shown.append(hit)
    if not shown:
        raise fail("--picture needs hits with files that can be read; there is none among what was found")
    names = [Path(hit.path).name for hit in shown]
    plot_search_results(query, pictures, [hit.score for hit in shown], path, labels=names)


def explain(
    model: Model,
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="a picture", exists=True, dir_okay=False)],
    caption: Annotated[str, typer.Argument(metavar="CAPTION", help="a sentence")],
    picture: Annotated[Path | None, typer.Option(metavar="FILE.png", help="write where each word looks")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE.html", help="write a page: click on a word")] = None,
    device: Device = None,
    dtype: Dtype = "float32",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Show why a caption fits an image: what every word adds to the score, and where in the picture it looks.

    \b
    Examples:
      tvrn explain runs/flickr8k dog.jpg "a dog runs through the snow"
      tvrn explain me/my-tvrn dog.jpg "a dog in the snow" --picture why.png --html why.html
    """
    for option, path, suffix in (("--picture", picture, ".png"), ("--html", html, ".html")):
        if path is not None and path.suffix.lower() != suffix:
            raise fail(f"{option} is {str(path)!r}; expected a name that ends in {suffix}")
        if path is not None:
            writable(path)
    from ..explain import explain as take_apart

    loaded, processor = load(model, device, dtype, trust_remote_code)
    explanation = take_apart(loaded, processor, image, caption)
    say_unknown(processor, [caption])
    written = []
    if picture is not None:
        written.append(str(explanation.save_picture(picture)))
    if html is not None:
        written.append(str(explanation.save_html(html)))
    text = "\n".join([explanation.table(), *(f"written: {path}" for path in written)])
    say({**explanation.as_dict(), "written": written}, text, as_json)


def demo(
    model: Model,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="of photographs", exists=True, file_okay=False)],
    index_folder: Annotated[
        Path | None, typer.Option("--index", help="where its index is kept (default: cache)")
    ] = None,
    host: Annotated[str, typer.Option(help="0.0.0.0 lets other machines in")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="default: the first free one from 7860")] = None,
    device: Device = None,
    dtype: Dtype = "float32",
    tower_engine: TowerEngine = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Serve a page to search a folder of photographs with, and to see why something was found (extra: demo).

    It works offline, and shows nothing outside the folder. Ctrl-C ends it.

    \b
    Examples:
      tvrn demo runs/flickr8k ~/photos
      tvrn demo me/my-tvrn ~/photos --host 0.0.0.0 --port 7860
    """
    from ..demo import launch

    loaded, processor = load(model, device, dtype, trust_remote_code, tower_engine)
    kept = index_folder if index_folder is not None else _cached_index(model, folder)
    page = launch(loaded, processor, folder, kept, host=host, port=port, block=False, progress=progress())
    typer.echo(f"open {page.local_url} (Ctrl-C ends it)", err=True)
    page.block_thread()
