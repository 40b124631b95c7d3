"""mteb's retrieval tasks between images and texts, by any model of the front door."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from .data.worded import unusable_captions
from .encoded_tvrn import EncodedImages, EncodedTexts
from .front_door import load_model
from .scoring import EmbeddingScore, RaggedTexts, score_matrix
from .scoring.gathered import ChosenPairs, score_pairs
from .scoring.models import evaluating
from .scoring.processes import Processes
from .storage.fingerprints import weights_digest

logger = logging.getLogger(__name__)

__all__ = ["MTEBModel"]

QUERIES_AT_ONCE = 512  # whose scores with the whole corpus are held at once
CATEGORIES = {"t2i": ("text", "image"), "i2t": ("image", "text")}  # of queries, and of the corpus


class MTEBModel:
    """A TVRN or dual encoder as a `SearchProtocol` of mteb: `mteb.evaluate(MTEBModel(id_or_path), tasks)`.

    Args:
        id_or_path: What `load_model` takes.
        rerank: Of each query that many nearest candidates by the embeddings are ranked by the pair score; the others
            keep their order behind them. None: the embeddings alone. `hit_rate_at_k` is this field's R@K.
        **options: Others of `load_model`, such as `device`.

    Raises:
        ImportError: If mteb is not installed.
        ValueError: As `load_model`; or `rerank` is below 1, or asked of a model whose score is its embeddings'.
    """

    def __init__(self, id_or_path: str | os.PathLike[str], rerank: int | None = None, **options: Any):
        try:
            from mteb.models.model_meta import ModelMeta, ScoringFunction
        except ModuleNotFoundError as error:
            raise ImportError('MTEBModel needs mteb: pip install "modeling-tvrn[mteb]"') from error
        if rerank is not None and rerank < 1:
            raise ValueError(f"rerank is {rerank}; expected at least 1 candidate a query, or None.")
        self.model, self.processor = load_model(id_or_path, **options)
        if rerank is not None and self.model.config.components == ["first_stage"]:
            raise ValueError(
                f"rerank is {rerank}, but the score of {os.fspath(id_or_path)!r} is that of its embeddings alone; "
                "leave it out."
            )
        self.rerank = rerank
        path = Path(id_or_path)
        about = {
            # mteb keeps results by name and revision: of a folder that is trained again these must be others.
            "name": f"local/{path.resolve().name}" if path.is_dir() else str(id_or_path),
            "revision": getattr(self.model.config, "_commit_hash", None) or weights_digest(self.model)[:40],
            "experiment_kwargs": None if rerank is None else {"rerank": rerank},
            "modalities": ["text", "image"],
            "embed_dim": self.model.config.projection_size,
            "max_tokens": self.processor.max_text_length,
            "n_parameters": self.model.num_parameters(),
            "similarity_fn_name": ScoringFunction.COSINE,
            "framework": ["PyTorch"],
            "use_instructions": False,
        }
        self.mteb_model_meta = ModelMeta.create_empty(overwrites=about)
        self._corpus: Any = None
        self._ids: list[str] = []

    def index(self, corpus: Any, *, task_metadata: Any, encode_kwargs: Mapping[str, Any], **others: Any) -> None:
        """Encode what is searched: rows with `id`, and `image` or `text` (and perhaps `title`).

        A text without a word is left out, which is logged: nothing finds it.

        Raises:
            ValueError: If the task is none of images by texts or texts by images, or nothing can be read.
        """
        self._ids, self._corpus = self._encode(corpus, task_metadata, "corpus", encode_kwargs)

    def search(
        self,
        queries: Any,
        *,
        task_metadata: Any,
        top_k: int,
        encode_kwargs: Mapping[str, Any],
        top_ranked: Any = None,
        **others: Any,
    ) -> dict[str, dict[str, float]]:
        """The `top_k` best documents of each query, with their scores.

        A query without a word finds nothing, which is logged: it counts as a miss.

        Raises:
            ValueError: As `index`, or if the task brings candidates of its own.
        """
        if top_ranked is not None:
            raise ValueError(
                f"{task_metadata.name} brings candidates to rerank; expected a task that searches its whole corpus."
            )
        ids, encoded = self._encode(queries, task_metadata, "queries", encode_kwargs)
        found: dict[str, dict[str, float]] = {str(query): {} for query in queries["id"]}
        with evaluating(self.model), tqdm(total=len(ids), desc="queries", delay=2.0, leave=False) as bar:
            for start in range(0, len(ids), QUERIES_AT_ONCE):
                some = ids[start : start + QUERIES_AT_ONCE]
                part = encoded.select(slice(start, start + len(some)))
                by_image = isinstance(part, EncodedImages)
                images, texts = (part, self._corpus) if by_image else (self._corpus, part)
                for query, scores, places in zip(some, *self._best(images, texts, by_image, top_k), strict=True):
                    found[query] = {self._ids[place]: score for place, score in zip(places, scores, strict=True)}
                bar.update(len(some))
        return found

    def _best(self, images: Any, texts: Any, by_image: bool, top_k: int) -> tuple[list[list[float]], list[list[int]]]:
        """Scores and rows of each query's best documents, best first."""
        cosines = score_matrix(EmbeddingScore(), images, texts, progress=False).cpu()
        cosines = cosines if by_image else cosines.T  # (queries, documents)
        size = min(self.rerank or 0, cosines.shape[1])
        scores, documents = cosines.topk(min(max(top_k, size), cosines.shape[1]), dim=1)
        if size:
            own = np.arange(len(cosines)).repeat(size)
            pairs = own, documents[:, :size].numpy().ravel()
            rows, columns = pairs if by_image else pairs[::-1]
            order = np.argsort(rows, kind="stable")  # image by image, as `score_pairs` wants them
            logits = torch.empty(len(order), dtype=scores.dtype)
            chosen, bar = ChosenPairs(rows[order], columns[order]), tqdm(disable=True)
            scored = score_pairs(self.model, images, texts, chosen, None, None, Processes(False), bar)
            logits[torch.from_numpy(order)] = scored.to(scores.dtype)
            better, places = logits.view(-1, size).sort(dim=1, descending=True)
            # mteb sorts by the scores alone, so the others' have to stay below.
            behind = scores[:, size:] - scores[:, size - 1 : size] + better[:, -1:] - 1
            scores = torch.cat([better, behind], dim=1)
            documents = torch.cat([documents[:, :size].gather(1, places), documents[:, size:]], dim=1)
        return scores[:, :top_k].tolist(), documents[:, :top_k].tolist()

    def _encode(self, rows: Any, task: Any, what: str, encode_kwargs: Mapping[str, Any]) -> tuple[list[str], Any]:
        """Ids and encoded items of a task's "corpus" or "queries"."""
        if task.category not in CATEGORIES:
            raise ValueError(
                f"{task.name} is of the category {task.category!r}; expected 't2i' (texts search images) or 'i2t'."
            )
        side = CATEGORIES[task.category][what == "corpus"]
        ids = [str(each) for each in rows["id"]]
        texts: list[str] = []
        if side == "text":
            titles = rows["title"] if "title" in rows.column_names else [""] * len(ids)
            texts = [f"{title or ''} {text or ''}".strip() for title, text in zip(titles, rows["text"], strict=True)]
            wrong = unusable_captions([self.processor], texts)
            if wrong:
                place, reason = next(iter(wrong.items()))
                logger.warning(
                    "%d of %d %s of %s can't be read and are not found: %r: %s",
                    *(len(wrong), len(ids), what, task.name, ids[place], reason),
                )
            ids, texts = ([each for k, each in enumerate(items) if k not in wrong] for items in (ids, texts))
        if not ids:
            raise ValueError(f"the {what} of {task.name} hold nothing that can be read; expected {side}s.")
        level, batch_size = "embeddings" if self.rerank is None else "full", encode_kwargs.get("batch_size", 32)
        device, parts = self.model.device, list[Any]()
        with evaluating(self.model), tqdm(total=len(ids), desc=what, delay=2.0, leave=False) as bar:
            for start in range(0, len(ids), batch_size):
                if side == "image":
                    inputs = self.processor(images=rows[start : start + batch_size]["image"])
                    part: Any = self.model.encode_images(**inputs.to(device), level=level)
                else:
                    inputs = self.processor(text=texts[start : start + batch_size])
                    part = self.model.encode_texts(**inputs.to(device), level=level)
                parts.append(part.to("cpu"))  # a corpus may be larger than a GPU
                bar.update(len(part))
        if side == "image":
            return ids, EncodedImages.cat(parts)
        if level == "embeddings":
            return ids, EncodedTexts.cat(parts)
        starts = range(0, len(ids), batch_size)
        return ids, RaggedTexts.collect((part, range(k, k + len(part))) for k, part in zip(starts, parts, strict=True))
