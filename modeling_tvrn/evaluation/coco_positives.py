"""COCO's test split judged by more positives than its own: ECCV Caption and Crisscrossed Captions (CxC).

Both come with the package `eccv_caption`, whose own code computes the numbers; here the gallery's ids are matched with
COCO's, and each query's best candidates are handed over. CxC's image–image and text–text judgements are files of its
repository (`sis_test.csv`, `sts_test.csv`).
"""

from __future__ import annotations

import contextlib
import csv
import io
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..metrics import RECALL_AT
from .captions import CaptionTable

LIST_SIZE = 50  # candidates of a query: ECCV Caption has at most 48 positives of one
CXC_THRESHOLD = 3.0  # of CxC's mean grade, 0 to 5: pairs from there on are positives
CXC_FILES = {"image_to_image": "sis_test.csv", "text_to_text": "sts_test.csv"}


@dataclass(frozen=True)
class CocoIds:
    """The gallery in COCO's ids.

    Attributes:
        images: (I,) image ids.
        captions: (T,) annotation ids.
    """

    images: np.ndarray
    captions: np.ndarray


def load_eccv() -> Any:
    """`eccv_caption.Metrics()`.

    Raises:
        ImportError: If the package is missing, with the command that installs it.
    """
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # that a faster JSON reader is not installed
            from eccv_caption import Metrics
        return Metrics()
    except ImportError as error:
        raise ImportError(
            'The protocols eccv-caption and cxc need the package eccv_caption: pip install "modeling-tvrn[eval]".'
        ) from error


def coco_ids(table: CaptionTable, eccv: Any) -> CocoIds:
    """COCO's ids of a gallery of its test split.

    Image ids are COCO's. Caption ids are COCO's annotation ids where the data set has them (Karpathy's `sentids`);
    otherwise the captions of an image are taken to be in COCO's order.

    Raises:
        ValueError: If the gallery is not that split; the first image that differs is named.
    """
    own: dict[int, list[int]] = {}
    for caption in eccv.coco_ids.tolist():
        own.setdefault(eccv.coco_gts["t2i"][caption][0], []).append(caption)
    images = [_coco_image_id(name) for name in table.image_ids]
    wrong = [(row, name) for row, name in enumerate(images) if name not in own]
    if wrong or len(images) != len(own):
        row = wrong[0][0] if wrong else len(images) - 1
        raise ValueError(
            f"The gallery has {len(images)} images, {len(wrong)} of them not in COCO's test split of {len(own)} (for"
            f" example {table.image_ids[row]!r}); expected that split, whole, with COCO's image ids."
        )
    captions: list[int] = []
    for image, ids in zip(images, table.caption_ids, strict=True):
        known = own[int(image or 0)]
        numbers = [_number(each) for each in ids]
        if set(numbers) != set(known) and any(each in eccv.coco_gts["t2i"] for each in numbers):
            raise ValueError(
                f"Image {image} has the caption ids {ids}; COCO's are {known}: they must be the same five."
            )
        if len(ids) != len(known):
            raise ValueError(f"Image {image} has {len(ids)} captions; COCO's test split has {len(known)} of it.")
        captions += [each for each in numbers if each is not None] if set(numbers) == set(known) else known
    return CocoIds(np.array(images, dtype=np.int64), np.array(captions, dtype=np.int64))


def eccv_metrics(ids: CocoIds, captions_of: np.ndarray, images_of: np.ndarray, eccv: Any) -> dict[str, float]:
    """mAP@R, R-Precision and R@1 with ECCV Caption's positives, percent.

    Args:
        ids: The gallery's.
        captions_of: (I, K) caption numbers of the gallery, best first, K at least 48.
        images_of: (T, K) image rows, best first.
        eccv: Of `load_eccv`.
    """
    found = eccv.eccv_metrics(_retrieved(ids, captions_of, images_of), "all")
    names = {"eccv_map_at_r": "mAP@R", "eccv_rprecision": "R-Precision", "eccv_r1": "R@1"}
    return {
        f"{way}_{names[name]}": 100.0 * float(values[short])
        for short, way in (("i2t", "image_to_text"), ("t2i", "text_to_image"))
        for name, values in found.items()
        if name in names
    }


def cxc_metrics(ids: CocoIds, captions_of: np.ndarray, images_of: np.ndarray, eccv: Any) -> dict[str, float]:
    """R@1, R@5 and R@10 across modalities with CxC's positives, percent; arguments as `eccv_metrics`."""
    lists = _retrieved(ids, captions_of, images_of)
    recalls = {k: eccv.cxc_recalls(lists, "all", K=k) for k in RECALL_AT}
    ways = (("i2t", "image_to_text"), ("t2i", "text_to_image"))
    return {f"{way}_R@{k}": 100.0 * float(recalls[k][short]) for short, way in ways for k in RECALL_AT}


def cxc_within_modalities(
    ids: CocoIds, image_embeds: Tensor, text_embeds: Tensor, rows: np.ndarray, folder: str | os.PathLike[str]
) -> dict[str, float]:
    """R@1, R@5 and R@10 of images among images and captions among captions by cosine, with CxC's positives, percent.

    Positives are pairs with a mean grade of at least 3, and captions of one image; queries are the items that have
    any. Ties count against the query.

    Args:
        ids: The gallery's.
        image_embeds: (I, P).
        text_embeds: (T, P).
        rows: (T,) image row of each caption.
        folder: With CxC's `sis_test.csv` and `sts_test.csv`; one that is missing is left out.

    Raises:
        ValueError: If the folder holds neither, or a file has another form.
    """
    files = {way: Path(folder) / name for way, name in CXC_FILES.items() if (Path(folder) / name).is_file()}
    if not files:
        raise ValueError(
            f"{os.fspath(folder)!r} holds none of {list(CXC_FILES.values())}; expected CxC's data folder."
        )
    found: dict[str, float] = {}
    for way, path in files.items():
        own, embeds = (ids.images, image_embeds) if way == "image_to_image" else (ids.captions, text_embeds)
        place = {int(name): number for number, name in enumerate(own.tolist())}
        pairs = [(place[a], place[b]) for a, b in _read_pairs(path) if a in place and b in place]
        groups = np.arange(len(own)) if way == "image_to_image" else rows
        recalls, count = _pair_recalls(embeds, pairs, groups)
        found |= {f"{way}_R@{k}": value for k, value in recalls.items()} | {f"{way}_queries": float(count)}
    return found


def _read_pairs(path: Path) -> list[tuple[int, int]]:
    with path.open(newline="", encoding="utf-8") as lines:
        rows = list(csv.reader(lines))
    if len(rows) < 2 or "agg_score" not in rows[0]:
        raise ValueError(
            f"{path} starts with {rows[:1]}; expected CxC's columns: two ids, agg_score, sampling_method."
        )
    grade = rows[0].index("agg_score")
    return [(_last_number(row[0]), _last_number(row[1])) for row in rows[1:] if float(row[grade]) >= CXC_THRESHOLD]


def _last_number(name: str) -> int:
    """`COCO_val2014:sentid:411553` or `COCO_val2014_000000391895.jpg` -> its id."""
    digits = "".join(each if each.isdigit() else " " for each in name).split()
    if not digits:
        raise ValueError(f"{name!r} holds no COCO id; expected one such as COCO_val2014:sentid:411553.")
    return int(digits[-1])


def _pair_recalls(
    embeds: Tensor, pairs: Sequence[tuple[int, int]], groups: np.ndarray, block: int = 1024
) -> tuple[dict[int, float], int]:
    """R@K by nearest neighbours, positives by pairs (both ways) and by group; and how many queries there are."""
    vectors = torch.nn.functional.normalize(embeds.detach().float(), dim=1)
    links = np.array([*pairs, *((b, a) for a, b in pairs)], dtype=np.int64).reshape(-1, 2)
    of_group = torch.from_numpy(np.unique(groups, return_inverse=True)[1]).to(vectors.device)
    ranks = []
    for start in range(0, len(vectors), block):
        rows = torch.arange(start, min(start + block, len(vectors)), device=vectors.device)
        cosines = vectors[rows] @ vectors.T
        itself = rows[:, None] == torch.arange(len(vectors), device=vectors.device)
        positive = of_group[rows][:, None] == of_group[None, :]
        near = links[(links[:, 0] >= start) & (links[:, 0] < start + block)]
        positive[torch.from_numpy(near[:, 0] - start), torch.from_numpy(near[:, 1])] = True
        positive &= ~itself
        best = cosines.masked_fill(~positive, -torch.inf).amax(dim=1, keepdim=True)
        before = ((cosines >= best) & ~positive & ~itself).sum(dim=1) + 1
        ranks.append(before[positive.any(dim=1)].cpu().numpy())
    every = np.concatenate(ranks)
    if not len(every):
        raise ValueError("No item of the gallery has a positive among CxC's pairs; expected COCO's test split.")
    return {k: 100.0 * float(np.mean(every <= k)) for k in RECALL_AT}, len(every)


def _retrieved(ids: CocoIds, captions_of: np.ndarray, images_of: np.ndarray) -> Mapping[str, Mapping[int, list[int]]]:
    return {
        "i2t": dict(zip(ids.images.tolist(), ids.captions[captions_of].tolist(), strict=True)),
        "t2i": dict(zip(ids.captions.tolist(), ids.images[images_of].tolist(), strict=True)),
    }


def _coco_image_id(name: Any) -> int | None:
    """COCO's number of an image by its id: a number, or a file name such as COCO_val2014_000000391895.jpg."""
    if isinstance(name, int):
        return name
    digits = "".join(each if each.isdigit() else " " for each in Path(str(name)).stem).split()
    return int(digits[-1]) if digits else None


def _number(name: Any) -> int | None:
    return int(name) if str(name).isdigit() else None
