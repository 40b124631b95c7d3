"""Column layouts of public image-caption data: which column holds what, and how to read one row."""

from __future__ import annotations

import ast
import numbers
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .file_kinds import is_unicode, printable
from .image_folder import IMAGE_SUFFIXES
from .skipped import (
    BAD_ID,
    BAD_NAME,
    BROKEN_CAPTION,
    EMPTY_CAPTION,
    ID_MISMATCH,
    NO_CAPTION,
    NOT_TEXT,
    SkipReport,
    Unusable,
)  # fmt: skip
from .splits import EVERY_SPLIT, canonical_split
from .text_files import read_json

ItemId = int | str

# In order of preference: of several columns that say the same, the first one counts.
IMAGE_COLUMNS = (
    "image", "jpg", "jpeg", "png", "webp", "img", "jpe", "jfif", "mpo", "gif", "bmp", "tif", "tiff", "avif",
    "jp2", "heic", "heif",
)  # fmt: skip
CAPTION_COLUMNS = (
    "captions", "caption", "sentences_raw", "sentences", "raw", "txt", "text", "sentence", "comment",
)  # fmt: skip
IMAGE_ID_COLUMNS = ("image_id", "img_id", "cocoid", "coco_id", "imgid")
CAPTION_ID_COLUMNS = ("caption_ids", "sentids", "sentences_sentid", "caption_id", "sentid")
SPLIT_COLUMNS = ("split",)
FOLDER_COLUMNS = ("filepath", "file_path")
FILENAME_COLUMNS = (
    "filename", "file_name", "image_name", "image_path", "image_file", "path", "file", *FOLDER_COLUMNS,
)  # fmt: skip
LINE_COLUMNS = ("txt",)  # webdataset's text member, also where `datasets` made a column of it: a caption a line
REGION_COLUMNS = ("region_features", "region_boxes", "region_mask")
_BLANK_LETTERS = "\u115f\u1160\u2800\u3164\uffa0"  # Hangul fillers and the empty Braille cell
# One item of a printed list, and the list.
_PRINTED_ITEM = re.compile(r"""'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*"|None|nan|null|NaN""")
_PRINTED = re.compile(rf"\[\s*(?:(?:{_PRINTED_ITEM.pattern})(?:\s*,\s*|\s+))*(?:{_PRINTED_ITEM.pattern})?\s*\]")
_NUMBERED = re.compile(r"(caption|text|sentence|comment)s?[ _]?(\d+)$", re.IGNORECASE)

ROLES = ("image", "captions", "image_id", "caption_ids", "split", "filename")


@dataclass(frozen=True)
class Layout:
    """Names of the columns that hold each part of a record; None for a part that the source does not have."""

    captions: tuple[str, ...]
    image: str | None = None
    regions: tuple[str, ...] = ()
    image_id: str | None = None
    caption_ids: str | None = None
    split: str | None = None
    filename: str | None = None
    folder: str | None = None

    @property
    def text_columns(self) -> list[str]:
        """The columns that are read without touching images."""
        single = (self.image_id, self.caption_ids, self.split, self.filename, self.folder)
        names = [*self.captions, *(name for name in single if name is not None)]
        return list(dict.fromkeys(names))


@dataclass(frozen=True)
class SourceRow:
    """One row as a source has it: its columns, the split of the file it is in, and an id for where it has none.

    Attributes:
        fault: why it cannot be used, whatever its columns hold.
    """

    values: Mapping[str, Any]
    split: str | None
    key: str
    fault: Unusable | None = None


@dataclass
class Pair:
    """One image's captions and names, whatever the source; without the image."""

    image_id: ItemId
    captions: list[str]
    caption_ids: list[ItemId]
    split: str
    filename: str
    own_split: bool = False  # told by the row, not by its file
    is_named: bool = False  # whether the file name is the row's own


def detect_layout(
    columns: Iterable[str],
    chosen: Mapping[str, Any] | None = None,
    source: str = "the source",
    has_images: bool = False,
) -> Layout:
    """Find out which column holds what.

    Args:
        columns: the source's column names.
        chosen: the user's own choice, role -> column; None for "in no column". "captions" may name a list.
        source: its name, for the message.
        has_images: whether the images come from elsewhere (a folder), so that no column need hold them.

    Raises:
        ValueError: no captions or no images are found, or several columns could hold the captions.
    """
    columns = list(columns)
    chosen = _check_chosen(chosen or {}, columns, source)
    captions = chosen.get("captions") or _caption_columns(columns, source)
    layout = Layout(
        captions=tuple([captions] if isinstance(captions, str) else captions),
        image=chosen.get("image", _first(IMAGE_COLUMNS, columns)),
        regions=tuple(name for name in REGION_COLUMNS if name in columns),
        image_id=chosen.get("image_id", _first(IMAGE_ID_COLUMNS, columns)),
        caption_ids=chosen.get("caption_ids", _first(CAPTION_ID_COLUMNS, columns)),
        split=chosen.get("split", _first(SPLIT_COLUMNS, columns)),
        filename=chosen.get("filename", _first(FILENAME_COLUMNS, columns)),
        folder=_first(FOLDER_COLUMNS, columns),
    )
    if not layout.captions or not (has_images or layout.image or "region_features" in layout.regions):
        raise ValueError(_refusal(columns, layout, source))
    return replace(layout, regions=()) if layout.image else layout


def named_columns(chosen: Mapping[str, Any]) -> list[str]:
    """The names in a user's choice of columns.

    Raises:
        ValueError: it is no mapping.
    """
    if not isinstance(chosen, Mapping):
        raise ValueError(f"columns={chosen!r}: expected a mapping of {', '.join(ROLES)} to names of columns")
    lists = [names if isinstance(names, list | tuple) else [names] for names in chosen.values()]
    return [name for names in lists for name in names if isinstance(name, str)]


def _check_chosen(chosen: Mapping[str, Any], columns: Sequence[str], source: str) -> Mapping[str, Any]:
    named_columns(chosen)
    for role, names in chosen.items():
        if role not in ROLES:
            raise ValueError(f"columns={{{role!r}: ...}}: unknown role; choose among {', '.join(ROLES)}")
        if names is None and role != "captions":
            continue
        if not names or (not isinstance(names, str) and (role != "captions" or not isinstance(names, list | tuple))):
            raise ValueError(f"columns={{{role!r}: {names!r}}}: expected a column name (a list only for 'captions')")
        for name in [names] if isinstance(names, str) else names:
            if name not in columns:
                raise ValueError(
                    f"columns={{{role!r}: {name!r}}}: {source} has no such column; it has {list(columns)}"
                )
    return chosen


def check_extra_columns(extra: Iterable[str], columns: Sequence[str], source: str) -> None:
    """Refuse columns to keep that are not there.

    Raises:
        ValueError: as it says.
    """
    for name in extra:
        if name not in columns:
            raise ValueError(f"extra_columns={name!r}: {source} has no such column; it has {list(columns)}")


def _caption_columns(columns: Sequence[str], source: str) -> list[str]:
    single = _first(CAPTION_COLUMNS, columns)
    numbered = [(int(match[2]), name) for name in columns if (match := _NUMBERED.match(name))]
    if single and numbered:
        raise ValueError(
            f"{source} has captions in {single!r} and in {[name for _, name in numbered]}; choose, so that none is "
            f"lost unseen: columns={{'captions': {single!r}}} or columns={{'captions': [...]}}"
        )
    return [single] if single else [name for _, name in sorted(numbered)]


def is_caption_column(name: str) -> bool:
    """Whether a column of this name is taken for captions."""
    return name.lower() in CAPTION_COLUMNS or _NUMBERED.match(name) is not None


def _refusal(columns: Sequence[str], layout: Layout, source: str) -> str:
    lacks = "captions" if not layout.captions else "images"
    return (
        f"{source} has no column of {lacks} that is understood; columns seen: {list(columns)}. Understood: images in "
        f"{', '.join(IMAGE_COLUMNS)} (or region_features with region_boxes, or names of files in "
        f"{FILENAME_COLUMNS[0]}, ... with image_root=); captions in {', '.join(CAPTION_COLUMNS)}, or numbered as "
        f"caption_0, caption_1, ...; ids in {', '.join(IMAGE_ID_COLUMNS + CAPTION_ID_COLUMNS)}. For other names "
        "pass columns={'image': ..., 'captions': ..., 'image_id': ...}"
    )


def _first(names: Iterable[str], columns: Sequence[str]) -> str | None:
    """The first of the names that is a column, in whatever case."""
    spelled = {column.lower(): column for column in reversed(columns)} | {column: column for column in columns}
    return next((spelled[name] for name in names if name in spelled), None)


def read_pair(layout: Layout, row: SourceRow, report: SkipReport) -> Pair | None:
    """One row in the common shape; captions that cannot be used are left out and counted, and None is returned where
    none is left, or the row itself cannot be used.

    A row without an image id is named by its file name, else by its place in the source. Captions without ids are
    named `image#0`, `image#1`, ... in the source's order, as Flickr's are; an image without a file name has its place
    in the source for one.
    """
    try:
        return _read_pair(layout, row, report)
    except Unusable as error:
        report.add(error.reason, error.detail)
        return None


def _read_pair(layout: Layout, row: SourceRow, report: SkipReport) -> Pair:
    if row.fault is not None:
        raise row.fault
    filename = file_name(layout, row.values)
    image_id = _plain_id(row.values.get(layout.image_id), filename or row.key) if layout.image_id else None
    if image_id is None:
        image_id = filename or row.key
    if not is_unicode(f"{image_id}{filename}"):
        raise Unusable(BAD_NAME, printable(filename or str(image_id)))
    captions = read_captions([row.values.get(name) for name in layout.captions], layout.captions[0] in LINE_COLUMNS)
    given = read_ids(row.values, layout)
    if given is not None and len(given) != len(captions):
        raise Unusable(ID_MISMATCH, f"{image_id}: {len(captions)} captions, {len(given)} ids")
    ids = [_plain_id(item, str(image_id)) for item in given or ()] or [f"{image_id}#{k}" for k in range(len(captions))]
    kept: list[tuple[str, ItemId]] = []
    for text, caption_id in zip(captions, ids, strict=True):
        reason = caption_fault(text)
        if reason is not None:
            report.add(reason, f"a caption of {image_id}")
        elif caption_id is None:
            raise Unusable(BAD_ID, f"{image_id}: a caption's id is empty")
        else:
            kept.append((text.strip(), caption_id))
    if not kept:
        raise Unusable(NO_CAPTION, str(image_id))
    own_split = row.values.get(layout.split) if layout.split else None
    split = canonical_split(str(own_split or row.split or EVERY_SPLIT))
    texts, names = [text for text, _ in kept], [name for _, name in kept]
    return Pair(image_id, texts, names, split, filename or row.key, bool(own_split), bool(filename))


def caption_fault(text: Any) -> str | None:
    """Under which heading a caption is left out that says nothing, or cannot be written down; None for a good one."""
    if not isinstance(text, str):
        return NOT_TEXT
    if not is_unicode(text):
        return BROKEN_CAPTION
    return EMPTY_CAPTION if is_blank(text) else None


def is_blank(text: str) -> bool:
    """Whether nothing of a text can be seen: blanks, control and format characters, marks and variation selectors."""
    categories = (unicodedata.category(letter) for letter in text if letter not in _BLANK_LETTERS)
    return all(category[0] in "ZM" or category in ("Cc", "Cf", "Cs") for category in categories)


def read_captions(values: Sequence[Any], per_line: bool = False) -> list[Any]:
    """Captions out of the values of one or several columns.

    One column: a list, text, a list written as text (JSON's, Python's or NumPy's), or structs with a field "raw".
    Several columns: a caption each. Missing ones come as empty strings, so that ids keep their place; numbers come as
    text, and what is no text comes as it is, to be counted.

    Args:
        per_line: whether text holds a caption a line.
    """
    if len(values) > 1:
        return [_caption(value) for value in values]
    value = values[0]
    if _is_missing(value):
        return []
    if isinstance(value, list | tuple | np.ndarray):
        return [_caption(item) for item in value]
    text = _caption(value)
    if not isinstance(text, str):
        return [text]
    listed = _written_list(text)
    if listed is not None:
        return [_caption(item) for item in listed]
    return lines_of(text) if per_line else [text]


def lines_of(text: str) -> list[str]:
    """The lines of a text (cut at newlines only: splitlines also cuts at characters found inside captions)."""
    return text.strip().split("\n")


def _caption(value: Any) -> Any:
    """A caption as text: of a struct its field "raw", of a number its digits; "" for none, others as they are."""
    if isinstance(value, Mapping) and "raw" in value:
        value = value["raw"]
    if _is_missing(value):
        return ""
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")  # what is no UTF-8 is left out as such
    if isinstance(value, numbers.Number) and not isinstance(value, bool):
        return str(int(value) if isinstance(value, float) and value.is_integer() else value)
    return value


def _is_missing(value: Any) -> bool:
    """Whether a table has nothing there: JSON's null, the NaN that others write for it, or pandas' marks."""
    no_number = isinstance(value, numbers.Number) and str(value).lower().lstrip("-") in ("nan", "inf", "infinity")
    return value is None or no_number or type(value).__name__ in ("NAType", "NaTType")


def _written_list(text: str) -> list[Any] | None:
    """The items of a list that was written as text; None where it is text and no list."""
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return None
    try:
        return list(read_json(text, "a list"))
    except ValueError:
        return _printed_items(text)


def _printed_items(text: str) -> list[str | None] | None:
    """The strings of a list as Python prints it, or as NumPy does, without commas; None for those that are missing."""
    if _PRINTED.fullmatch(text) is None:  # first: a parser takes minutes over long text that only begins as a list
        return None
    try:
        return [ast.literal_eval(item) if item[0] in "'\"" else None for item in _PRINTED_ITEM.findall(text[1:-1])]
    except (ValueError, SyntaxError):  # an escape that is none
        return None


def read_ids(values: Mapping[str, Any], layout: Layout) -> list[Any] | None:
    """Ids of a row's captions, from their column or from structs with a field "sentid"; None where there are none."""
    if layout.caption_ids is not None:
        found = values.get(layout.caption_ids)
        found = _written_list(found) or found if isinstance(found, str) else found
        found = found if found is None or isinstance(found, list | tuple) else [found]
    else:
        found = _struct_ids(values.get(layout.captions[0]))
    return None if found is None or all(item == "" or _is_missing(item) for item in found) else list(found)


def _struct_ids(value: Any) -> list[Any] | None:
    if isinstance(value, Mapping):
        return None if value.get("sentid") is None else [value["sentid"]]
    if isinstance(value, list | tuple) and value and isinstance(value[0], Mapping) and "sentid" in value[0]:
        return [item.get("sentid") if isinstance(item, Mapping) else None for item in value]
    return None


def _plain_id(value: Any, image: str) -> ItemId | None:
    """An id as int or str; a float without a fraction is what tables make of ints with gaps."""
    if value == "" or _is_missing(value):
        return None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise Unusable(BAD_ID, f"{image}: {value!r:.80} is a {type(value).__name__}")
    return value


def file_name(layout: Layout, values: Mapping[str, Any]) -> str:
    """The file name, below its folder where that is a column of its own (`val2014` and `COCO_val2014_1.jpg`)."""
    name = str(values.get(layout.filename) or "") if layout.filename else ""
    folder = str(values.get(layout.folder) or "") if layout.folder and layout.folder != layout.filename else ""
    if not folder or folder.rsplit("/", 1)[-1] == name:
        return folder or name
    return folder if folder.lower().endswith(IMAGE_SUFFIXES) or not name else f"{folder.rstrip('/')}/{name}"
