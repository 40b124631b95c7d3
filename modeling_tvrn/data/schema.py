"""Column layouts of public image-caption data: which column holds what, and how to read one row."""

from __future__ import annotations

import ast
import json
import numbers
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .file_kinds import is_unicode, printable
from .skipped import BAD_NAME, BROKEN_CAPTION, EMPTY_CAPTION, ID_MISMATCH, NO_CAPTION, SkipReport
from .splits import EVERY_SPLIT, canonical_split

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
FILENAME_COLUMNS = ("filename", "file_name", "image_name", "image_path", "path", *FOLDER_COLUMNS)
REGION_COLUMNS = ("region_features", "region_boxes", "region_mask")
_BLANK_LETTERS = "\u115f\u1160\u2800\u3164\uffa0"  # Hangul fillers and the empty Braille cell
# One item of a printed list, and the list.
_PRINTED_ITEM = re.compile(r"""'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*"|None|nan|null|NaN""")
_PRINTED = re.compile(rf"\[\s*(?:(?:{_PRINTED_ITEM.pattern})(?:\s*,\s*|\s+))*(?:{_PRINTED_ITEM.pattern})?\s*\]")
_NUMBERED = re.compile(r"(caption|text|sentence|comment)s?[ _]?(\d+)$")

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
    """One row as a source has it: its columns, the split of the file it is in, and an id for where it has none."""

    values: Mapping[str, Any]
    split: str | None
    key: str


@dataclass
class Pair:
    """One image's captions and names, whatever the source; without the image."""

    image_id: ItemId
    captions: list[str]
    caption_ids: list[ItemId]
    split: str
    filename: str
    own_split: bool = False  # told by the row, not by its file


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


def _check_chosen(chosen: Mapping[str, Any], columns: Sequence[str], source: str) -> Mapping[str, Any]:
    for role, names in chosen.items():
        if role not in ROLES:
            raise ValueError(f"columns={{{role!r}: ...}}: unknown role; choose among {', '.join(ROLES)}")
        if names is None and role != "captions":
            continue
        if not names or (isinstance(names, list | tuple) and role != "captions"):
            raise ValueError(f"columns={{{role!r}: {names!r}}}: expected a column name (a list only for 'captions')")
        for name in [names] if isinstance(names, str) else names:
            if name not in columns:
                raise ValueError(
                    f"columns={{{role!r}: {name!r}}}: {source} has no such column; it has {list(columns)}"
                )
    return chosen


def _caption_columns(columns: Sequence[str], source: str) -> list[str]:
    single = _first(CAPTION_COLUMNS, columns)
    numbered = [(int(match[2]), name) for name in columns if (match := _NUMBERED.match(name))]
    if single and numbered:
        raise ValueError(
            f"{source} has captions in {single!r} and in {[name for _, name in numbered]}; choose, so that none is "
            f"lost unseen: columns={{'captions': {single!r}}} or columns={{'captions': [...]}}"
        )
    return [single] if single else [name for _, name in sorted(numbered)]


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
    return next((name for name in names if name in columns), None)


def read_pair(layout: Layout, row: SourceRow, report: SkipReport) -> Pair | None:
    """One row in the common shape; captions that cannot be used are left out and counted, and None is returned where
    none is left.

    A row without an image id is named by its file name, else by its place in the source. Captions without ids are
    named `image#0`, `image#1`, ... in the source's order, as Flickr's are; an image without a file name has its place
    in the source for one.
    """
    filename = _filename(layout, row.values)
    image_id = _plain_id(row.values.get(layout.image_id)) if layout.image_id else None
    if image_id is None:
        image_id = filename or row.key
    if not is_unicode(f"{image_id}{filename}"):
        report.add(BAD_NAME, printable(filename or str(image_id)))
        return None
    captions = read_captions([row.values.get(name) for name in layout.captions])
    given = read_ids(row.values, layout)
    if given is not None and len(given) != len(captions):
        report.add(ID_MISMATCH, f"{image_id}: {len(captions)} captions, {len(given)} ids")
        return None
    ids: list[ItemId] = [f"{image_id}#{k}" for k in range(len(captions))] if given is None else given
    kept = []
    for text, caption_id in zip(captions, ids, strict=True):
        reason = caption_fault(text)
        if reason is None:
            kept.append((text.strip(), caption_id))
        else:
            report.add(reason, f"a caption of {image_id}")
    if not kept:
        report.add(NO_CAPTION, str(image_id))
        return None
    own_split = row.values.get(layout.split) if layout.split else None
    split = canonical_split(str(own_split or row.split or EVERY_SPLIT))
    return Pair(image_id, [t for t, _ in kept], [i for _, i in kept], split, filename or row.key, bool(own_split))


def caption_fault(text: str) -> str | None:
    """Under which heading a caption is left out that says nothing, or cannot be written down; None for a good one."""
    if not is_unicode(text):
        return BROKEN_CAPTION
    return EMPTY_CAPTION if is_blank(text) else None


def is_blank(text: str) -> bool:
    """Whether nothing of a text can be seen: blanks, control and format characters, marks and variation selectors."""
    return not any(letter not in _BLANK_LETTERS and _shows(unicodedata.category(letter)) for letter in text)


def _shows(category: str) -> bool:
    return category[0] not in "ZM" and category not in ("Cc", "Cf", "Cs")


def read_captions(values: Sequence[Any]) -> list[str]:
    """Captions out of the values of one or several columns.

    One column: a list, text with one caption a line, a JSON list, or structs with a field "raw". Several columns: a
    caption each. Missing ones come as empty strings, so that ids keep their place.
    """
    if len(values) > 1:
        return [_caption(value) for value in values]
    value = values[0]
    if isinstance(value, Mapping):
        value = value.get("raw")
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")  # what is no UTF-8 is left out as such
    if isinstance(value, str):
        return _split_text(value)
    if value is None or isinstance(value, numbers.Number):
        return [text] if (text := _caption(value)) else []
    return [_caption(item.get("raw") if isinstance(item, Mapping) else item) for item in value]


def _caption(value: Any) -> str:
    """A cell as text; nothing where it is missing, which tables write as null or NaN."""
    unknown = isinstance(value, numbers.Number) and value != value
    return "" if value is None or unknown or type(value).__name__ in ("NAType", "NaTType") else str(value)


def _split_text(text: str) -> list[str]:
    """One caption a line (only at newlines: splitlines also cuts at characters found inside captions)."""
    listed = _json_list(text)
    if listed is None and (listed := _printed_list(text)) is None:
        return text.strip().split("\n")
    return [_caption(item) for item in listed]


def _printed_list(text: str) -> list[str] | None:
    """The strings of a list as Python and NumPy print it, and pandas writes it into a table: between commas or
    blanks. None for other text."""
    if _PRINTED.fullmatch(text.strip()) is None:
        return None
    items = _PRINTED_ITEM.findall(text.strip()[1:-1])
    try:
        return [ast.literal_eval(item) if item[0] in "'\"" else "" for item in items]
    except (ValueError, SyntaxError):  # an escape that is none
        return None


def _json_list(text: str) -> list[Any] | None:
    if not (text.startswith("[") and text.endswith("]")):
        return None
    try:
        return list(json.loads(text))
    except ValueError:
        return None


def read_ids(values: Mapping[str, Any], layout: Layout) -> list[ItemId] | None:
    """Ids of a row's captions, from their column or from structs with a field "sentid"; None where there are none."""
    if layout.caption_ids is not None:
        found = values.get(layout.caption_ids)
        found = _json_list(found) if isinstance(found, str) and found.startswith("[") else found
        found = [found] if isinstance(found, int | str) else found
    else:
        found = _struct_ids(values.get(layout.captions[0]))
    return None if found is None or found == [""] else [_checked_id(item) for item in found]


def _struct_ids(value: Any) -> Any:
    if isinstance(value, Mapping):
        return value.get("sentid")
    if isinstance(value, list | tuple) and value and isinstance(value[0], Mapping) and "sentid" in value[0]:
        return [item["sentid"] for item in value]
    return None


def _checked_id(value: Any) -> ItemId:
    found = _plain_id(value)
    if found is None:
        raise ValueError(f"caption id {value!r}: expected an int or a str; leave the column out with another columns=")
    return found


def _plain_id(value: Any) -> ItemId | None:
    """An id as int or str; a float without a fraction is what tables make of ints with gaps."""
    if value is None or value == "":
        return None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"image or caption id {value!r} is a {type(value).__name__}: expected an int or a str")
    return value


def _filename(layout: Layout, values: Mapping[str, Any]) -> str:
    """The file name, below its folder where that is a column of its own (`val2014` and `COCO_val2014_1.jpg`)."""
    name = str(values.get(layout.filename) or "") if layout.filename else ""
    folder = str(values.get(layout.folder) or "") if layout.folder and layout.folder != layout.filename else ""
    if not folder or folder.rsplit("/", 1)[-1] == name:
        return folder or name
    return f"{folder.rstrip('/')}/{name}" if "." not in folder.rsplit("/", 1)[-1] else folder
