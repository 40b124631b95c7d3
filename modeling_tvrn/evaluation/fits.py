"""Does anything fit? How far a search's probabilities can be trusted, and what junk gets of them."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..data import with_words
from .encoding import encode_captions, encode_dataset
from .report import JsonReport

__all__ = ["FOREIGN_WORDS", "FitsReport", "evaluate_fits", "gibberish", "phrases"]

THRESHOLD = 0.1
BINS = 10
JUNK = 200
SMALLEST = 3  # images: a gallery of two, and one that is taken out of it
CONSONANTS, VOWELS = "bcdfghjklmnpqrstvwxyz", "aeiou"
FOREIGN_WORDS = (  # what no everyday photograph shows
    *("invoice", "tax return", "spreadsheet", "quarterly report", "constitution", "mitochondria", "algebra"),
    *("interest rate", "democracy", "inflation", "software license", "quantum physics", "the", "of", "however"),
    *("therefore", "email password", "insurance policy", "supreme court", "philosophy", "voltage regulator"),
    *("x-ray of a lung", "circuit diagram", "a map of europe", "satellite image", "periodic table", "sheet music"),
    *("receipt from a restaurant", "screenshot of a website", "bar chart", "microscope image of bacteria"),
    *("blood test", "passport scan", "stock market", "crossword puzzle", "galaxy", "nuclear reactor", "submarine"),
    *("oil refinery", "wind turbine", "a submarine under the arctic ice", "an astronaut on the moon"),
    *("a dinosaur skeleton", "a volcano erupting lava", "the planet saturn", "a printed circuit board"),
    *("an mri scan of a brain", "a contract signed in 1998", "a qr code", "a page of source code"),
)


def phrases(captions: Sequence[str], seed: int = 0) -> list[str]:
    """One to three words in a row of each caption: what people type who don't write captions."""
    dice = random.Random(seed)
    found = []
    for words in filter(None, (re.findall(r"\w+", caption) for caption in captions)):
        start = dice.randrange(len(words))
        found.append(" ".join(words[start : start + dice.randint(1, 3)]))
    return found


def gibberish(queries: Sequence[str], seed: int = 0) -> list[str]:
    """Random letters in words as many and as long as those of the queries; every other string can be pronounced."""
    dice = random.Random(seed)
    letters = (CONSONANTS + VOWELS,), (CONSONANTS, VOWELS)
    return [
        " ".join(
            "".join(dice.choice(kinds[place % len(kinds)]) for place in range(len(word))) for word in query.split()
        )
        for query, kinds in zip(queries, letters * len(queries), strict=False)
    ]


@dataclass(frozen=True)
class FitsReport(JsonReport):
    """What `evaluate_fits` found; shares are fractions.

    Attributes:
        gallery_size: Images searched, half of those given.
        queries: Captions asked for, of which about half have their image in the gallery.
        threshold: From which probability of the best hit on the answer is that something fits.
        expected_calibration_error: Of the best hits: |mean probability − share that is right|, weighed over bins.
        precision: Of the queries answered with yes, those whose image is there.
        recall: Of the queries whose image is there, those answered with yes.
        hit_recall: The same, of those whose image is ranked first.
        gibberish_below: Of strings of random letters, those answered with no.
        foreign_below: Of words for what no everyday photograph shows, those answered with no.
        bins: Mean probability, share that is right, and number of best hits, by tenths of the probability.
    """

    gallery_size: int
    queries: int
    threshold: float
    expected_calibration_error: float
    precision: float
    recall: float
    hit_recall: float
    gibberish_below: float
    foreign_below: float
    bins: list[tuple[float, float, int]]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def table(self) -> str:
        """In words."""
        rows = {
            "expected calibration error of the best hit": f"{self.expected_calibration_error:.3f}",
            "is there any? precision": f"{self.precision:.3f}",
            "is there any? recall": f"{self.recall:.3f}",
            "recall where the right image ranks first": f"{self.hit_recall:.3f}",
            "gibberish below": f"{self.gibberish_below:.3f}",
            "foreign words below": f"{self.foreign_below:.3f}",
        }
        lines = [f"| {name} | {value} |" for name, value in rows.items()]
        head = f"| {self.queries} queries among {self.gallery_size} images, threshold {self.threshold:g} | |"
        return "\n".join([head, "|---|---|", *lines])


def check_size(records: Any) -> None:
    """Raise a `ValueError` for records too few to hold an image that fits, one that doesn't, and one taken out."""
    if len(records) < SMALLEST:
        raise ValueError(
            f"there are {len(records)} images; expected at least {SMALLEST}: a caption needs images that don't fit "
            "it, and some captions one that was taken out. Name a larger split"
        )


@torch.no_grad()
def evaluate_fits(model: Any, processor: Any, records: Any, batch_size: int = 64, progress: bool = True) -> FitsReport:
    """Ask every caption of some records for its image, with half of the images taken out, and junk for any.

    Args:
        model: A calibrated `TVRNModel`.
        processor: Its processor.
        records: Of `load_pairs`, map-style; others than those it was calibrated on.
        batch_size: Images, and captions, encoded at a time.
        progress: Show progress bars.

    Raises:
        ValueError: If there are fewer than three images, or the model is not calibrated.
    """
    check_size(records)
    if not model.has_probabilities:
        raise ValueError(
            "the model is not calibrated: its scores are no probabilities. Calibrate it (tvrn calibrate MODEL "
            "--data … --split …)"
        )
    records = with_words(records, processor)
    images, texts, rows = encode_dataset(model, processor, records, batch_size, progress=progress)
    kept = torch.arange(0, len(images), 2)
    gallery = images.select(kept)
    best = _best(model, gallery, texts)
    owner = torch.as_tensor(rows)
    there, right = owner % 2 == 0, kept[best.indices.cpu()] == owner
    captions = [caption for each in records.captions for caption in each]
    some = [*captions[:: max(1, 2 * len(captions) // JUNK)], *phrases(captions)]
    junk, foreign = (
        _best(
            model, gallery, encode_captions(model, processor, queries, batch_size, progress, True).select(slice(None))
        )
        for queries in (gibberish(some[:JUNK], seed=1), FOREIGN_WORDS)
    )
    top = best.values.cpu()
    yes = top >= THRESHOLD
    bins = _bins(top, right)
    return FitsReport(
        gallery_size=len(gallery),
        queries=len(texts),
        threshold=THRESHOLD,
        expected_calibration_error=sum(count * abs(mean - share) for mean, share, count in bins) / len(texts),
        precision=_share(there[yes]),
        recall=_share(yes[there]),
        hit_recall=_share(yes[right]),
        gibberish_below=_share(junk.values < THRESHOLD),
        foreign_below=_share(foreign.values < THRESHOLD),
        bins=bins,
    )


def _best(model: Any, gallery: Any, texts: Any) -> Any:
    """The highest probability of each text, and its image's row."""
    return model.fits(model.match(gallery, texts), len(gallery), texts).max(dim=0)


def _bins(top: Tensor, right: Tensor) -> list[tuple[float, float, int]]:
    numbers = (top * BINS).long().clamp(max=BINS - 1)
    members = [numbers == number for number in range(BINS)]
    return [(float(top[m].mean()), _share(right[m]), int(m.sum())) for m in members if m.any()]


def _share(answers: Tensor) -> float:
    """Of yes among answers; 0 of none."""
    return float(answers.double().mean()) if len(answers) else 0.0
