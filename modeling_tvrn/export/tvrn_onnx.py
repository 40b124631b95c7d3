"""An exported TVRN in NumPy arrays: onnxruntime runs it, torch and transformers are not needed. Copied to each export.

    import sys; sys.path.insert(0, "onnx/flickr8k")     # the exported folder
    from tvrn_onnx import OnnxModel, select

    model = OnnxModel("onnx/flickr8k")                  # precision="int8": the quantised graphs
    gallery = model.encode_images(["dog.jpg", "cat.jpg"])
    query = model.encode_texts(["a dog in the snow"])
    near = (gallery["images.embeds"] @ query["texts.embeds"].T)[:, 0].argsort()[::-1][:64]
    logits = model.match(select(gallery, near), query)  # (64, 1); model.scores(logits) are between 0 and 1

Needs onnxruntime and numpy; pillow for pictures, tokenizers for captions. What the graphs read and give, and how
pictures and captions become their inputs, is in tvrn_onnx.json.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..pixels_tvrn import PixelTable, rgb_images

Arrays = dict[str, np.ndarray]

MANIFEST = "tvrn_onnx.json"
CAPTIONS_AT_ONCE = 16  # of a block of pairs: sorted by length, so that little of it is padding


class OnnxModel:
    """The three graphs of a folder that `modeling_tvrn.export.export_onnx` wrote.

    Args:
        folder: Of the graphs.
        precision: "float32", or "int8" where the folder holds quantised graphs.
        threads: Of onnxruntime, default: its own choice.
        providers: Of onnxruntime, default: its CPU.

    Attributes:
        manifest: What tvrn_onnx.json says.
        precision: As given.

    Raises:
        ImportError: Without onnxruntime.
        ValueError: If the folder holds no export, or not that precision.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        precision: str = "float32",
        threads: int | None = None,
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ):
        self.folder = Path(folder)
        if not (self.folder / MANIFEST).is_file():
            raise ValueError(f"{self.folder} has no {MANIFEST}; expected a folder that export_onnx wrote.")
        self.manifest: dict[str, Any] = json.loads((self.folder / MANIFEST).read_text("utf-8"))
        if precision not in self.manifest["files"]:
            known = ", ".join(self.manifest["files"])
            raise ValueError(f"precision is {precision!r}; {self.folder} holds {known} (quantize_onnx makes int8).")
        import_onnxruntime()
        self.precision, self._threads, self._providers = precision, threads, list(providers)
        self._graphs: dict[str, Any] = {}
        self._tokenizer: Any = None

    def _graph(self, part: str) -> Any:
        """The session of a graph, opened when it is first run: a search of what is encoded needs no image side."""
        if part not in self._graphs:
            runtime = import_onnxruntime()
            options = runtime.SessionOptions()
            if self._threads is not None:
                options.intra_op_num_threads = self._threads
            path = self.folder / self.manifest["files"][self.precision][part]
            self._graphs[part] = runtime.InferenceSession(str(path), options, providers=self._providers)
        return self._graphs[part]

    def encode_images(self, pictures: Any = None, batch_size: int = 32, **arrays: Any) -> Arrays:
        """Everything a search and the pair score need of images.

        Args:
            pictures: Files, encoded bytes, PIL images or arrays, of a model exported with pixels.
            batch_size: Images at a time.
            **arrays: The graph's inputs instead: `pixel_values`, or `region_features`, `region_boxes`, `region_mask`.
                Pictures that a detector's processor does not bring to one shape go in a call each, unpadded; OWLv2
                also reads `pixel_extents`, ones where the picture is a square.

        Returns:
            Arrays by name, the first dimension of each is the image; "images.embeds" (I, P) has unit norm.

        Raises:
            ValueError: On wrong shapes, values that are not finite, or an image without a region.
        """
        if (pictures is None) == (not arrays):
            raise ValueError("encode_images takes either pictures or the graph's inputs by name.")
        images = self.manifest["graphs"]["image"]["inputs"][0]["shape"][0]
        batch_size = images if isinstance(images, int) else batch_size  # a detector looks at one picture at a time
        if pictures is None:
            return self._run_in_batches("image", arrays, batch_size)
        if isinstance(pictures, str | bytes) or not isinstance(pictures, Sequence):
            pictures = list(pictures) if getattr(pictures, "ndim", 0) == 4 else [pictures]
        batches = (pictures[start : start + batch_size] for start in range(0, len(pictures), batch_size))
        return cat([self._run("image", {"pixel_values": self.pixels(batch)}) for batch in batches])

    def encode_texts(self, captions: str | Sequence[str] | None = None, batch_size: int = 64, **arrays: Any) -> Arrays:
        """Everything a search and the pair score need of captions.

        Args:
            captions: Sentences.
            batch_size: Captions at a time.
            **arrays: The graph's inputs instead: `input_ids`, `attention_mask` (unless captions are padded to one
                length) and, where the score reads words, `word_mask`, each (T, W).

        Returns:
            Arrays by name, the first dimension of each is the caption; "texts.embeds" (T, P) has unit norm.

        Raises:
            ValueError: On wrong shapes, ids outside the vocabulary, or a caption without a word.
        """
        if (captions is None) == (not arrays):
            raise ValueError("encode_texts takes either captions or the graph's inputs by name.")
        if captions is None:
            return self._run_in_batches("text", arrays, batch_size)
        captions = [captions] if isinstance(captions, str) else list(captions)
        batches = (captions[start : start + batch_size] for start in range(0, len(captions), batch_size))
        return cat([self._run("text", self.tokens(batch), extra=True) for batch in batches])

    def scores(self, logits: np.ndarray) -> np.ndarray:
        """Matching scores in (0, 1) of logits, with the model's calibration.

        Those of a model without one (the manifest's "score_kind" is not "matching score") rank and decide nothing: of
        a dual encoder alone nearly all are 1, so look at the cosine of the embeddings.
        """
        scale, shift = self.manifest["calibration"]
        return _sigmoid(scale * logits.astype(np.float64) + shift)

    def fits(self, logits: np.ndarray, gallery_size: int, texts: Arrays) -> np.ndarray | None:
        """Probabilities that images fit the texts, of logits (I, T), where the model has them: as `TVRNModel.fits`."""
        query = self.manifest["calibration_query"]
        if query is None:
            return None
        scale, shift = self.manifest["calibration"]
        found = _sigmoid(scale * logits.astype(np.float64) + shift - np.log(gallery_size))
        return found * _sigmoid(texts["texts.embeds"] @ np.array(query[:-1]) + query[-1])

    def match(self, images: Arrays, texts: Arrays, pairs_at_once: int = 256) -> np.ndarray:
        """Logits (I, T) of every image with every caption; `scores` makes matching scores of them.

        Args:
            images, texts: As `encode_images` and `encode_texts` give them, of the same export.
            pairs_at_once: Bounds memory, does not change scores.

        Raises:
            ValueError: If a side is empty or lacks what the graph reads.
        """
        if not _length(images) or not _length(texts) or pairs_at_once < 1:
            raise ValueError(
                f"match got {_length(images)} images, {_length(texts)} captions, pairs_at_once {pairs_at_once}; "
                "expected at least 1 of each."
            )
        logits = np.empty((_length(images), _length(texts)), np.float32)
        # A dual encoder alone compares embeddings: its captions have no words.
        lengths = texts.get("texts.word_mask", np.ones((_length(texts), 1), np.int64)).sum(axis=1)
        captions = min(CAPTIONS_AT_ONCE, pairs_at_once, len(lengths))
        for columns in _chunks(np.argsort(lengths, kind="stable"), captions):
            block = self._trimmed(select(texts, columns), int(lengths[columns].max()))
            for rows in _chunks(np.arange(len(logits)), max(pairs_at_once // captions, 1)):
                scores = self._run("pair", {**select(images, rows), **block}, extra=True)["logits"]
                logits[np.ix_(rows, columns)] = scores
        return logits

    def pixels(self, pictures: Sequence[Any]) -> np.ndarray:
        """`pixel_values` (n, 3, H, W) of pictures, as the model's own processor makes them.

        Raises:
            ValueError: If the export says nothing on how (its processor has a way of its own): make them yourself.
        """
        recipe = self.manifest["pixels"]
        if recipe is None:
            raise ValueError("This export reads no pictures; give the graph's inputs by name (tvrn_onnx.json).")
        table = PixelTable(
            size=recipe["size"],
            crop=None if recipe["crop"] is None else tuple(recipe["crop"]),
            resample=recipe["resample"],
            values=np.array(recipe["values"], np.float32),
        )
        pixels = table.pixels(rgb_images(pictures, files=True))
        if pixels is None:
            raise ValueError("A picture is smaller than the part that is cut out of it; enlarge or drop it.")
        return pixels

    def tokens(self, captions: Sequence[str]) -> Arrays:
        """`input_ids`, `attention_mask` unless captions are padded to one length, and `word_mask` of captions, each
        (T, W), as the model's own processor makes them.

        Raises:
            ValueError: If the export says nothing on how, or a caption holds no word.
        """
        recipe = self.manifest["tokens"]
        if recipe is None:
            raise ValueError("This export reads no captions; give the graph's inputs by name (tvrn_onnx.json).")
        if self._tokenizer is None:
            self._tokenizer = self._load_tokenizer(recipe)
        encoded = self._tokenizer.encode_batch(list(captions))
        ids = np.array([each.ids for each in encoded], np.int64)
        attended = np.array([each.attention_mask for each in encoded], np.int64)
        word_mask = attended * ~np.isin(ids, recipe["special_ids"])
        if recipe["pad_to"] is not None:  # a text side that reads padding too
            return {"input_ids": ids, "word_mask": word_mask}
        return {"input_ids": ids, "attention_mask": attended, "word_mask": word_mask}

    def _load_tokenizer(self, recipe: Mapping[str, Any]) -> Any:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        tokenizer.enable_truncation(recipe["max_length"])
        tokenizer.enable_padding(pad_id=recipe["pad_id"], pad_token=recipe["pad_token"], length=recipe["pad_to"])
        return tokenizer

    def inputs(self, part: str) -> list[str]:
        """The names of what a graph reads: of "image", "text" or "pair"."""
        return [each["name"] for each in self.manifest["graphs"][part]["inputs"]]

    def _run_in_batches(self, part: str, arrays: Mapping[str, Any], batch_size: int) -> Arrays:
        given = {name: np.asarray(value) for name, value in arrays.items()}
        rows = _chunks(np.arange(_length(given)), batch_size)
        return cat([self._run(part, select(given, each)) for each in rows])

    def _run(self, part: str, arrays: Mapping[str, np.ndarray], extra: bool = False) -> Arrays:
        """One run of a graph; `extra` inputs are passed over rather than refused."""
        about, names = self.manifest["graphs"][part], self.inputs(part)
        unknown = [] if extra else sorted(set(arrays) - set(names))
        missing = sorted(set(names) - set(arrays))
        if missing or unknown:
            raise ValueError(f"The {part} graph reads {names}; missing {missing}, unknown {unknown}.")
        inputs = {each["name"]: _checked(each, arrays[each["name"]]) for each in about["inputs"]}
        outputs = [each["name"] for each in about["outputs"]]
        return dict(zip(outputs, self._graph(part).run(outputs, inputs), strict=True))

    def _trimmed(self, texts: Arrays, width: int) -> Arrays:
        """Without the columns that are padding in every caption."""
        axes = {each["name"]: each["shape"] for each in self.manifest["graphs"]["text"]["outputs"]}
        return {k: v[:, :width] if "words" in axes[k][1:2] else v for k, v in texts.items()}


def select(items: Arrays, rows: Any) -> Arrays:
    """The items at `rows`, in that order."""
    return {name: value[rows] for name, value in items.items()}


def cat(parts: Sequence[Arrays]) -> Arrays:
    """Items joined along the first dimension, regions or words padded to the longest.

    Raises:
        ValueError: If there are no parts.
    """
    if not parts:
        raise ValueError("There are no items; expected at least one.")
    return {name: _cat_padded([part[name] for part in parts]) for name in parts[0]}


def import_onnxruntime() -> Any:
    """The onnxruntime module.

    Raises:
        ImportError: Naming the command that installs it.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError("exported graphs are run by onnxruntime: pip install onnxruntime") from error
    return onnxruntime


def _cat_padded(values: list[np.ndarray]) -> np.ndarray:
    shape = np.max([value.shape[1:] for value in values], axis=0) if values[0].ndim > 1 else ()
    joined = np.zeros((sum(len(value) for value in values), *map(int, shape)), values[0].dtype)
    start = 0
    for value in values:
        joined[(slice(start, start + len(value)), *map(slice, value.shape[1:]))] = value
        start += len(value)
    return joined


def _checked(about: Mapping[str, Any], value: np.ndarray) -> np.ndarray:
    """An input as the graph wants it: a graph itself does not refuse what is wrong."""
    name, shape = about["name"], about["shape"]
    fixed = [got == want for got, want in zip(value.shape, shape, strict=False) if isinstance(want, int)]
    if value.ndim != len(shape) or 0 in value.shape or not all(fixed):
        raise ValueError(f"{name} has shape {value.shape}; expected {tuple(shape)}, none of them 0.")
    if value.dtype.kind == "f" and not np.isfinite(value).all():
        raise ValueError(f"{name} holds NaN or infinity.")
    if name.endswith("mask") and not value.any(axis=1).all():
        row = int((~value.any(axis=1)).argmax())
        raise ValueError(f"{name} keeps nothing of item {row}; drop that item.")
    limit = about.get("below")
    if limit is not None and (value.min() < 0 or value.max() >= limit):
        raise ValueError(f"{name} holds {value.min()} to {value.max()}; expected 0 to {limit - 1}.")
    return np.ascontiguousarray(value, dtype=about["dtype"])


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-values)))


def _length(items: Mapping[str, np.ndarray]) -> int:
    return len(next(iter(items.values()))) if items else 0


def _chunks(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return (rows[start : start + size] for start in range(0, len(rows), size))
