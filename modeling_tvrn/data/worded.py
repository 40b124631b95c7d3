"""Records without the captions in which a model finds no word: left out, counted, and named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

from .file_kinds import is_unicode
from .records import PairStream, Record
from .schema import ItemId, is_blank
from .skipped import SkipReport, good_captions

NAMED = 10  # unknown words, at most

FindProblems = Callable[[Sequence[Any]], Mapping[int, str]]


def unusable_captions(processors: Sequence[Any], captions: Sequence[Any]) -> dict[int, str]:
    """Why captions cannot be used by one of the processors, by their place; good ones are not in it."""
    found = {}
    for i, text in enumerate(captions):
        if isinstance(text, str) and (is_blank(text) or not is_unicode(text)):
            found[i] = f"{text!r:.80} is {'blank' if is_blank(text) else 'not UTF-8'}"
    for processor in processors:
        # not of every processor: one that came with an older checkpoint, or of another model
        find = getattr(processor, "caption_problems", None)
        if find is not None and getattr(processor, "tokenizer", None) is not None:
            found = {**find(captions), **found}
    return dict(sorted(found.items()))


def unknown_words(processor: Any, text: str) -> list[str]:
    """The words of a text that a tokenizer does not know, all of which become the same token."""
    tokenizer = processor.tokenizer
    roles = [role for role, token in tokenizer.special_tokens_map.items() if token == tokenizer.unk_token]
    if roles != ["unk_token"] or not tokenizer.is_fast:  # CLIP's is also its last token, and it spells every word
        return []
    read = tokenizer(text, return_offsets_mapping=True)
    places = [place for place, token in enumerate(read["input_ids"]) if token == tokenizer.unk_token_id]
    return list(dict.fromkeys(text[slice(*read["offset_mapping"][place])] for place in places))


def about_unknown_words(processor: Any, texts: Iterable[str]) -> str:
    """A sentence that names the unknown words of some texts, the most frequent first; empty where there are none."""
    found = Counter(word for text in texts for word in unknown_words(processor, text))
    if not found:
        return ""
    named = ", ".join(word for word, _ in found.most_common(NAMED)) + (", …" if len(found) > NAMED else "")
    return f"the model does not know {named}: each is <unk> to it, as any other"


def with_words(records: Any, *processors: Any) -> Any:
    """The records without captions that one of the processors cannot use, such as `<pad>` or a lone U+FE0F.

    Of map-style records and lists they are counted and reported at once, of a stream as they come; an image that has
    no caption left is left out. Where every caption can be used, map-style records and lists come back as they are.

    Args:
        records: of `load_pairs`, map-style or a stream; or a list of records.
        processors: of all models that are to read them.
    """
    find: FindProblems = partial(unusable_captions, processors)
    if isinstance(records, PairStream):
        return records.leaving_out(find)
    if isinstance(records, Sequence):
        return _listed(records, find)
    if not all(hasattr(records, name) for name in ("captions", "image_ids", "__getitem__")):
        return _WordedStream(records, find)
    kept, report = _kept(list(zip(records.image_ids, records.captions, strict=True)), find)
    if not report.total:
        return records
    report.warn(str(getattr(records, "name", "the records")))
    return WordedRecords(records, kept, report.after(getattr(records, "skipped", None)))


Kept = list[tuple[int, list[int]]]  # row of an image, and places of its captions


def _kept(texts: Sequence[tuple[ItemId, Sequence[Any]]], find: FindProblems) -> tuple[Kept, SkipReport]:
    report = SkipReport()
    problems = find([caption for _, captions in texts for caption in captions])
    kept, start = [], 0
    for row, (image_id, captions) in enumerate(texts):
        own = {place: problems[start + place] for place in range(len(captions)) if start + place in problems}
        places = good_captions(image_id, captions, own, report)
        if places or not captions:  # images that never had a caption are not this function's concern
            kept.append((row, places))
        start += len(captions)
    return kept, report


def _listed(records: Sequence[Record], find: FindProblems) -> Sequence[Record]:
    kept, report = _kept([(record["image_id"], record["captions"]) for record in records], find)
    report.warn("the records")
    return [_with_captions(records[row], places) for row, places in kept] if report.total else records


def _with_captions(record: Record, places: Sequence[int]) -> Record:
    """The record with these captions alone."""
    lists = {name: record[name] for name in ("captions", "caption_ids") if record.get(name) is not None}
    chosen = {name: [values[place] for place in places] for name, values in lists.items()}
    if "caption_ids" not in lists and len(places) < len(record["captions"]):  # ids by place would shift
        chosen["caption_ids"] = [f"{record['image_id']}#{place}" for place in places]
    return {**record, **chosen}


class WordedRecords:
    """Map-style records of which some captions are left out; made by `with_words`.

    Offers what the wrapped records offer.

    Attributes:
        skipped: what was left out, here and while loading.
    """

    def __init__(self, records: Any, kept: Kept, skipped: SkipReport) -> None:
        self.records, self.kept, self.skipped = records, kept, skipped

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        row, places = self.kept[index]
        return _with_captions(self.records[row], places)

    def __iter__(self) -> Iterator[Record]:
        return (self[row] for row in range(len(self)))

    def select(self, rows: Sequence[int]) -> WordedRecords:
        """Records of the given rows, in this order."""
        return WordedRecords(self.records, [self.kept[row] for row in rows], self.skipped)

    @cached_property
    def captions(self) -> list[list[str]]:
        """Captions of each record."""
        return [[self.records.captions[row][place] for place in places] for row, places in self.kept]

    @cached_property
    def caption_ids(self) -> list[list[ItemId]]:
        """Ids of each record's captions."""
        return [[self.records.caption_ids[row][place] for place in places] for row, places in self.kept]

    @cached_property
    def image_ids(self) -> list[ItemId]:
        """Id of each record's image."""
        return self._chosen("image_ids")

    @cached_property
    def splits(self) -> list[str]:
        """Split of each record."""
        return self._chosen("splits")

    @cached_property
    def filenames(self) -> list[str]:
        """File name of each record."""
        return self._chosen("filenames")

    def _chosen(self, name: str) -> list[Any]:
        values = getattr(self.records, name)
        return [values[row] for row, _ in self.kept]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "records":  # while being copied or unpickled
            raise AttributeError(name)
        return getattr(self.records, name)


class _WordedStream:
    """Records as they come, without the captions that cannot be used."""

    def __init__(self, records: Iterable[Record], find: FindProblems) -> None:
        self.records, self.find = records, find
        self._report = SkipReport()

    @property
    def skipped(self) -> SkipReport:
        """What was left out in this pass, here and by the records themselves."""
        return self._report.after(getattr(self.records, "skipped", None))

    def __iter__(self) -> Iterator[Record]:
        self._report.clear()
        for record in self.records:
            captions = record["captions"]
            places = good_captions(record["image_id"], captions, self.find(captions), self._report)
            if places or not captions:
                yield _with_captions(record, places)
        self._report.warn(str(getattr(self.records, "name", "the records")))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "records":
            raise AttributeError(name)
        return getattr(self.records, name)
