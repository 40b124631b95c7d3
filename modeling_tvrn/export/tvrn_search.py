"""Search a folder of photographs by a sentence with an exported TVRN: no torch, transformers or pyarrow.

    python onnx/flickr8k/tvrn_search.py onnx/flickr8k ~/photos "two dogs in snow"
    pip install ./onnx/flickr8k; tvrn-search onnx/flickr8k ~/photos "two dogs in snow" --json

Needs onnxruntime, numpy, pillow and tokenizers. The photographs are indexed first; the next search encodes only what
is new. The hits are those of `tvrn search` with an exact index. `tvrn export --search` copies this file to the export.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from uuid import uuid4

import numpy as np
import PIL.Image

from ..data.image_folder import image_files
from ..pixels_tvrn import rgb_images
from .tvrn_onnx import Arrays, OnnxModel, cat

INDEX, FORMAT, EMBEDS = "index.json", "tvrn-search-1", "images.embeds"
CHUNK = 64  # images encoded before they are on the disk


@dataclass(frozen=True)
class Hit:
    """A photograph that was found.

    Attributes:
        rank: From 1.
        score: A probability, a matching score in (0, 1), or a cosine: see score_kind.
        path: Below the folder.
        cosine: Of the embeddings.
        logit: Of the pair score; None without reranking.
        score_kind: What the score is, as in `tvrn search`.
    """

    rank: int
    score: float
    path: str
    cosine: float
    logit: float | None
    score_kind: str


class PhotoIndex:
    """The photographs of a folder, encoded once: arrays that are mapped, in a folder of their own.

    Args:
        model: An export of `tvrn export`.
        folder: Of the photographs, at any depth; hidden files and links that lead out are left out.
        directory: Of the index, made where it is not there.

    Attributes:
        skipped: Paths that could not be read in the last `update`, and why.

    Raises:
        ValueError: If there is no such folder, the directory holds something else, or the model reads no pictures.
    """

    def __init__(self, model: OnnxModel, folder: str | os.PathLike[str], directory: str | os.PathLike[str]) -> None:
        self.model, self.folder, self.directory = model, Path(folder).resolve(), Path(directory)
        if not self.folder.is_dir():
            raise ValueError(f"{os.fspath(folder)!r} is no folder; expected one of photographs.")
        if model.manifest["pixels"] is None or model.manifest["tokens"] is None:
            raise ValueError(
                f"{model.folder} reads no pictures or no captions; search needs an export that does both."
            )
        if self.directory.is_dir() and any(self.directory.iterdir()) and not (self.directory / INDEX).is_file():
            raise ValueError(f"{self.directory} holds something else than an index; give a new or an empty folder.")
        self.directory.mkdir(parents=True, exist_ok=True)
        self.skipped: dict[str, str] = {}
        self._items: list[tuple[str, int, int, str, int]] = []  # path, size, mtime_ns, chunk, row
        self._chunks: dict[str, dict[str, int]] = {}  # name: {array: CRC-32}
        self._arrays: dict[str, Arrays] = {}

    def __len__(self) -> int:
        return len(self._items)

    def update(self, verify: bool = False) -> int:
        """Bring the index up to date with the folder; an interrupted one goes on where it was.

        Args:
            verify: Read everything, and make anew whatever is not as it was written. Otherwise that is done of the
                embeddings alone, which every search reads.

        Returns:
            How many photographs were encoded.
        """
        with _lock(self.directory):
            self._open(verify)
            known = {item[:3]: item for item in self._items}
            found = [_described(path, self.folder) for path in sorted(image_files(self.folder, onerror=_say_skipped))]
            kept, new = [known[key] for key in found if key in known], [key for key in found if key not in known]
            self._items, self.skipped = kept, {}
            encoded = 0
            for start in range(0, len(new), CHUNK):
                encoded += self._encode(new[start : start + CHUNK])
                self._save()
                _progress(start + len(new[start : start + CHUNK]), len(new))
            self._items.sort()
            self._compact()
            self._save()
            for path in self.directory.glob("*.npy"):
                if path.name.split(".")[0] not in self._chunks:
                    path.unlink(missing_ok=True)
            return encoded

    def search(self, text: str, limit: int = 10, shortlist_size: int = 64, rerank: bool = True) -> list[Hit]:
        """The photographs that fit a sentence best, of those that `update` found.

        Args:
            text: The sentence.
            limit: Hits, at most.
            shortlist_size: Candidates by embeddings that the pair score sees (at least `limit`).
            rerank: False ranks by the embeddings alone.

        Raises:
            ValueError: If a number is below 1, or the sentence has no word.
        """
        if limit < 1 or shortlist_size < 1:
            raise ValueError(f"limit is {limit}, shortlist_size {shortlist_size}; expected 1 or more of each.")
        if not text.strip():
            raise ValueError(f"text is {text!r}; expected a sentence of one word or more.")
        query = self.model.encode_texts([text])
        if not self._items:
            return []
        embeds = np.stack([self._arrays[chunk][EMBEDS][row] for *_, chunk, row in self._items])
        cosines = embeds @ query["texts.embeds"][0]
        order = np.argsort(-cosines, kind="stable")[: max(limit, shortlist_size) if rerank else limit]
        if not rerank:
            return self._hits(order[:limit], cosines, None, cosines[order], "cosine")
        candidates = cat([self._features(self._items[place]) for place in order])
        logits = self.model.match(candidates, query)
        best = np.argsort(-logits[:, 0], kind="stable")[:limit]
        order, logits = order[best], logits[best]
        scores, kind = self.model.fits(logits, len(self), query), "probability"
        if scores is None:
            kind = str(self.model.manifest["score_kind"])
            scores = cosines[order][:, None] if kind == "cosine" else self.model.scores(logits)
        return self._hits(order, cosines, logits[:, 0], scores[:, 0], kind)

    def _hits(
        self, places: np.ndarray, cosines: np.ndarray, logits: np.ndarray | None, scores: np.ndarray, kind: str
    ) -> list[Hit]:
        return [
            Hit(
                rank=k + 1,
                score=float(scores[k]),
                path=self._items[place][0],
                cosine=float(cosines[place]),
                logit=None if logits is None else float(logits[k]),
                score_kind=kind,
            )
            for k, place in enumerate(places)
        ]

    def _open(self, verify: bool) -> None:
        """Read what an earlier update wrote; what is damaged or of another model is encoded again."""
        self._items, self._chunks, self._arrays = [], {}, {}
        if not (self.directory / INDEX).is_file():
            return
        try:
            table = json.loads((self.directory / INDEX).read_text("utf-8"))
            found, model = table["format"], table["model"]
            items = [
                (str(path), int(size), int(time), str(chunk), int(row))
                for path, size, time, chunk, row in table["items"]
            ]
            chunks = {str(name): dict(arrays) for name, arrays in table["chunks"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return _say(f"{self.directory / INDEX} is damaged ({type(error).__name__}): the index is made anew")
        if (found, model) != (FORMAT, self._fingerprint()):
            return _say(f"{self.directory} is of another model or version: the index is made anew")
        for name, arrays in chunks.items():
            try:
                self._arrays[name] = {array: self._mapped(name, array) for array in arrays}
                for array in arrays if verify else [EMBEDS]:
                    if _checksum(self._arrays[name][array]) != arrays[array]:
                        raise ValueError(f"{array} is not as it was written")
            except (OSError, ValueError, KeyError) as error:
                _say(f"chunk {name} is damaged ({error}): its photographs are encoded again")
                self._arrays.pop(name, None)
            else:
                self._chunks[name] = arrays
        lengths = {name: len(arrays[EMBEDS]) for name, arrays in self._arrays.items()}
        self._items = [item for item in items if 0 <= item[4] < lengths.get(item[3], 0)]

    def _fingerprint(self) -> str:
        manifest = self.model.manifest
        return f"{manifest['model_fingerprint']} {self.model.precision} {json.dumps(manifest['pixels'])}"

    def _mapped(self, chunk: str, array: str) -> np.ndarray:
        if not chunk.isalnum():  # of a made-up table: it could lead out of the folder
            raise ValueError(f"its name is {chunk!r}")
        values: np.ndarray = np.load(self._file(chunk, array), mmap_mode="r", allow_pickle=False)
        return values

    def _file(self, chunk: str, array: str) -> Path:
        return self.directory / f"{chunk}.{array.replace(os.sep, '')}.npy"

    def _encode(self, keys: Sequence[tuple[str, int, int]]) -> int:
        pictures, usable = [], []
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for key, picture in zip(keys, pool.map(self._picture, keys), strict=True):
                if isinstance(picture, str):
                    self.skipped[key[0]] = picture
                    _say(f"skipped: {key[0]} {picture}")
                else:
                    pictures.append(picture)
                    usable.append(key)
        if usable:
            name = self._write(self.model.encode_images(pictures))
            self._items += [(*key, name, row) for row, key in enumerate(usable)]
        return len(usable)

    def _picture(self, key: tuple[str, int, int]) -> PIL.Image.Image | str:
        try:
            return rgb_images(self.folder / key[0], files=True)[0]
        except ValueError as error:
            return str(error).removeprefix("images[0] ")

    def _write(self, encoded: Arrays) -> str:
        name = uuid4().hex
        for array, values in encoded.items():
            np.save(self._file(name, array), values, allow_pickle=False)
        self._chunks[name] = {array: _checksum(values) for array, values in encoded.items()}
        self._arrays[name] = {array: self._mapped(name, array) for array in encoded}
        return name

    def _compact(self) -> None:
        """Copy photographs out of chunks of which less than half is in use; drop chunks that are not used."""
        live: dict[str, list[int]] = {}
        for place, item in enumerate(self._items):
            live.setdefault(item[3], []).append(place)
        thin = [
            place
            for name, places in live.items()
            if 2 * len(places) < len(self._arrays[name][EMBEDS])
            for place in places
        ]
        for start in range(0, len(thin), CHUNK):
            places = thin[start : start + CHUNK]
            name = self._write(cat([self._features(self._items[place]) for place in places]))
            for row, place in enumerate(places):
                self._items[place] = (*self._items[place][:3], name, row)
        used = {item[3] for item in self._items}
        self._chunks = {name: arrays for name, arrays in self._chunks.items() if name in used}

    def _features(self, item: tuple[str, int, int, str, int]) -> Arrays:
        return {array: np.array(values[item[4] : item[4] + 1]) for array, values in self._arrays[item[3]].items()}

    def _save(self) -> None:
        """The table, whole or not at all; chunks are on the disk before it names them."""
        table = {"format": FORMAT, "model": self._fingerprint(), "chunks": self._chunks, "items": self._items}
        temporary = self.directory / f"{INDEX}.{os.getpid()}"
        temporary.write_text(json.dumps(table), "utf-8")
        temporary.replace(self.directory / INDEX)


def _described(path: Path, folder: Path) -> tuple[str, int, int]:
    try:
        about = path.stat()
    except OSError:  # gone since the folder was read: decoding says so
        return path.relative_to(folder).as_posix(), -1, -1
    return path.relative_to(folder).as_posix(), about.st_size, about.st_mtime_ns


def _checksum(values: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(values).data.cast("B"))


@contextlib.contextmanager
def _lock(directory: Path) -> Iterator[None]:
    """One update at a time; another waits for it."""
    with (directory / "update.lock").open("w") as file:
        with contextlib.suppress(ImportError):  # Windows has none: there two updates at once encode twice
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done}/{total} photographs", end="\n" if done == total else "", file=sys.stderr, flush=True)


def _say_skipped(error: OSError) -> None:
    _say(f"skipped: {error.filename}: {error.strerror}")


def _say(message: str) -> None:
    print(f"tvrn-search: {message}", file=sys.stderr)


def _cached(model: Path, folder: Path) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.sha256(os.fsencode(f"{model.resolve()}\n{folder.resolve()}")).hexdigest()[:16]
    return cache / "tvrn_search" / f"{folder.resolve().name}-{digest}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; gives its exit code."""
    parser = argparse.ArgumentParser(
        prog="tvrn-search", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", metavar="EXPORT", type=Path, help="folder that tvrn export wrote")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="of photographs")
    parser.add_argument(
        "text", metavar="TEXT", nargs="?", help="what to look for; without it the index is brought up to date"
    )
    parser.add_argument("-n", "--limit", type=int, default=10, help="hits, at most (10)")
    parser.add_argument("--shortlist-size", type=int, default=64, help="candidates that the pair score sees (64)")
    parser.add_argument("--no-rerank", action="store_true", help="rank by the embeddings alone")
    parser.add_argument("--precision", default="float32", help="float32, or int8 of an export with such graphs")
    parser.add_argument("--index", type=Path, help="folder of the index (default: user's cache)")
    parser.add_argument("--verify", action="store_true", help="read the whole index, and make anew what is damaged")
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else")
    given = parser.parse_args(arguments)
    try:
        model = OnnxModel(given.model, given.precision)
        photographs = PhotoIndex(model, given.folder, given.index or _cached(given.model, given.folder))
        encoded = photographs.update(given.verify)
        _say(f"{len(photographs)} photographs, {encoded} of them new; {len(photographs.skipped)} skipped")
        if given.text is None:
            return 0
        hits = photographs.search(given.text, given.limit, given.shortlist_size, not given.no_rerank)
    except (ValueError, OSError, ImportError) as error:
        _say(str(error))
        return 2
    if given.json:
        print(json.dumps([asdict(hit) for hit in hits], indent=2))
        return 0
    print(f"rank  {hits[0].score_kind if hits else 'score'}  found")
    for hit in hits:
        print(f"{hit.rank:4}  {hit.score:.4f}  {hit.path.encode('utf-8', 'backslashreplace').decode()}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
