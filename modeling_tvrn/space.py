"""A Hugging Face Space (SDK gradio), written into a folder: the demo page over photographs and a model.

The Space holds a copy of this package, which lies on no index: what is uploaded is what was tried here.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .data.image_folder import IMAGE_SUFFIXES, image_files
from .data.skipped import UNREADABLE_FILE, SkipReport
from .front_door import EXPECTED, check_exists, is_dual_encoder, kind_of, load_model, read_config
from .index import ImageTextIndex
from .index.folder import FolderBackend
from .index.versions import SEGMENTS
from .redaction import redacted_text
from .storage.files import make_folder, publish_folder

MOST_BYTES = 10**9  # that a Space's repository may hold
PACKAGE = Path(__file__).parent
DISTRIBUTION = "modeling-tvrn"
APP = '''"""Search photographs (written by `tvrn space`)."""

import os
from pathlib import Path

from modeling_tvrn import load_model
from modeling_tvrn.demo import launch

HERE = Path(__file__).parent
IN_SPACE = "SPACE_ID" in os.environ

if __name__ == "__main__":
    launch(
        *load_model({model}),
        HERE / "photos",
        HERE / "index",
        host="0.0.0.0" if IN_SPACE else "127.0.0.1",
        port=7860 if IN_SPACE else None,
    )
'''
REQUIREMENTS = """# PyTorch for CPUs: without this line come gigabytes of CUDA libraries. With a GPU remove it.
--extra-index-url https://download.pytorch.org/whl/cpu
{lines}
"""
ABOUT = """
Type a sentence or choose a photograph: the photographs in `photos` that fit are found by {name}, and a click on one
shows which words and regions its score rests on.

{start}

`pip install -r requirements.txt gradio=={gradio}`, then `python app.py` serves the page on your own machine. A private
model needs a secret HF_TOKEN in the Space's settings.
"""
INDEXED = "What the search reads lies in `index`, so only photographs that are added later are encoded at the start."
NOT_INDEXED = "Every start encodes all photographs; `tvrn space … --index` copies what is already encoded."


@dataclass(frozen=True)
class Space:
    """What was written.

    Attributes:
        folder: Of the Space.
        model: A Hub id, or the model's folder within the Space.
        photographs: How many are there.
        skipped: Photographs that could not be copied: reason -> count, with examples.
        bytes: "photographs", "index", "model", "code" -> size.
    """

    folder: Path
    model: str
    photographs: int
    bytes: Mapping[str, int]
    skipped: SkipReport = field(default_factory=SkipReport)

    @property
    def commands(self) -> list[str]:
        """What tries it here, and what publishes it."""
        run = shlex.join(["python", str(self.folder / "app.py")])
        upload = shlex.join(["hf", "upload", "OWNER/NAME", str(self.folder), ".", "--repo-type", "space"])
        return [run, "hf auth login", upload]

    def as_dict(self) -> dict[str, Any]:
        """All attributes by name, as JSON values."""
        plain = {"folder": str(self.folder), "skipped": dict(self.skipped), "commands": self.commands}
        return {**vars(self), **plain}

    def __str__(self) -> str:
        sizes = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in self.bytes.items() if size)
        left_out = f" Left out: {self.skipped}." if self.skipped else ""
        here, log_in, upload = self.commands
        return (
            f"{self.folder}: a Space of {self.photographs} photographs with {self.model} ({sizes}).{left_out}\n"
            f"Photographs go as they are, with what their files say of place and time. Nothing was uploaded.\n"
            f"Try it here:  {here}\nPublish it:   {log_in} && {upload}"
        )


def write_space(
    model: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    images: str | os.PathLike[str],
    *,
    index: str | os.PathLike[str] | None = None,
    title: str = "Photograph search",
) -> Space:
    """Write a Space that searches photographs: README.md, app.py, requirements.txt, the package, and what they read.

    Args:
        model: Hub id, which the Space fetches when it starts, or a local folder, which is copied.
        folder: New, or empty.
        images: Folder of photographs, which are copied.
        index: Of the folder `images` by this model, as `tvrn index` writes it: what is encoded of these photographs is
            copied, and the Space need not encode them again. Paths, which say where it was built, and what the index
            holds besides stay behind.
        title: Of the Space.

    Raises:
        ValueError: If there is no such model or photograph, the model reads no photographs, the index is of another
            model (`OtherModelError`), of captions, of other photographs, without features or with `region_storage`,
            or the whole is larger than a Space may be.
        OSError: If the folder holds something, or cannot be written to.
        ImportError: If the package runs without being installed: nothing then says what it requires.
    """
    name, target, source = os.fspath(model), Path(folder), Path(images).resolve()
    local = Path(name).is_dir()
    lines = [line for line in importlib.metadata.requires(DISTRIBUTION) or [] if "extra ==" not in line]
    if target.resolve() == Path.cwd():
        raise OSError(f"{str(target)!r} is the folder that you are in, which can't be put in place; name another one")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OSError(f"{str(target)!r} is no empty folder; give a new one, so that nothing is overwritten")
    if not source.is_dir():
        raise ValueError(f"images is {os.fspath(images)!r}; expected a folder of photographs")
    check_exists(name)
    config = read_config(name, {}, EXPECTED)
    if config.model_type != "tvrn" and not is_dual_encoder(config):
        raise ValueError(f"{name!r} holds a {kind_of(config)}; {EXPECTED}")
    towers = [getattr(config, f"{part}_config", None) for part in ("vision", "dual_encoder", "detector")]
    if config.model_type == "tvrn" and not any(towers):
        raise ValueError(f"{name!r} reads region features, not photographs; a Space needs a model of pixels")
    skipped = SkipReport()
    photographs = sorted(image_files(source, onerror=lambda error: skipped.add(UNREADABLE_FILE, str(error))))
    if not photographs:
        raise ValueError(f"{os.fspath(images)!r} holds no photographs ({', '.join(IMAGE_SUFFIXES[:6])}, …)")
    loaded: Any = None
    processor: Any = None
    if local or index is not None:
        loaded, processor = load_model(name, device="cpu")
    opened = None if index is None else _opened(index, loaded, processor)
    weights = [*Path(name).glob("*.safetensors")] if local else []
    encoded = opened.manifest["report"]["feature_bytes"] if opened is not None else 0
    _check_size({"photographs": _size(photographs), "index": encoded, "model": _size(weights)})
    make_folder(target.parent)
    with tempfile.TemporaryDirectory(prefix=".tvrn-space-", dir=target.parent) as temporary:
        space = Path(temporary) / "space"
        copied = [path for path in photographs if _copy(path, space / "photos" / path.relative_to(source), skipped)]
        if not copied:
            raise ValueError(f"no photograph in {os.fspath(images)!r} can be read ({skipped})")
        if opened is not None:  # its encoded items alone: the rest names files of this machine
            opened.segments.copy(_keys(opened, source, copied, index), space / "index" / SEGMENTS)
        shown = Path(name).resolve().name if local else name
        if local and config.model_type == "tvrn":
            for part in (loaded, processor):
                part.save_pretrained(space / "models" / shown)
        elif local:
            loaded.save_dual_encoder(space / "models" / shown, processor)
        shutil.copytree(PACKAGE, space / "modeling_tvrn", ignore=shutil.ignore_patterns("__pycache__"))
        within = f'HERE / "models" / {shown!r}' if local else repr(name)
        (space / "app.py").write_text(APP.format(model=within), encoding="utf-8")
        (space / "requirements.txt").write_text(REQUIREMENTS.format(lines="\n".join(sorted(lines))), encoding="utf-8")
        (space / "README.md").write_text(_page(title, shown, not local, opened is not None), encoding="utf-8")
        places = {"photographs": "photos", "index": "index", "model": "models", "code": "modeling_tvrn"}
        sizes = {part: _size([*(space / place).rglob("*")]) for part, place in places.items()}
        publish_folder(space, target)
    return Space(target, f"models/{shown}" if local else name, len(copied), sizes, skipped)


def _copy(path: Path, copy: Path, skipped: SkipReport) -> bool:
    """Whether a photograph could be copied; why not is noted."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copyfile(path, copy)
    except OSError as error:
        skipped.add(UNREADABLE_FILE, str(error))
        return False
    return True


def _opened(index: str | os.PathLike[str], model: Any, processor: Any) -> FolderBackend:
    found = ImageTextIndex.load(index, model, processor)
    content = found.backend.manifest
    kind = None
    if found.side != "images" or not content["features"]:
        kind = "captions" if found.side != "images" else "embeddings alone"
    elif (storage := content.get("region_storage", "float16")) != "float16":
        kind = f"regions in {storage}, which a Space's page would encode again"
    if kind is not None:
        raise ValueError(f"the index in {os.fspath(index)!r} is of {kind}; expected photographs, with their features")
    assert isinstance(found.backend, FolderBackend)
    return found.backend


def _keys(opened: FolderBackend, source: Path, copied: list[Path], index: Any) -> list[str]:
    """Of the items of these photographs. Nothing else that the index holds is anybody's business."""
    by_name = dict(zip(opened.table.column("id"), opened.keys, strict=True))
    found = [by_name[name] for path in copied if (name := path.relative_to(source).as_posix()) in by_name]
    if not found:
        raise ValueError(
            f"the index in {os.fspath(index)!r} holds none of the photographs in {str(source)!r}; expected the index "
            "that `tvrn index` made of that folder"
        )
    return list(dict.fromkeys(found))


def _check_size(parts: Mapping[str, int]) -> None:
    whole = sum(parts.values())
    if whole > MOST_BYTES:
        each = ", ".join(f"{name} {size / 1e6:,.0f} MB" for name, size in parts.items() if size)
        raise ValueError(
            f"the Space would hold {whole / 1e6:,.0f} MB ({each}), and at most {MOST_BYTES / 1e6:,.0f} MB fit; take "
            "fewer or smaller photographs, leave the index out, or push the model and name it by its Hub id"
        )


def _size(paths: list[Path]) -> int:
    return sum(path.stat().st_size for path in paths if path.is_file())


def _page(title: str, name: str, on_hub: bool, indexed: bool) -> str:
    """README.md: the header that the Hub reads, and a few words."""
    header = {
        "title": redacted_text(title),
        "emoji": "🔎",
        "colorFrom": "blue",
        "colorTo": "gray",
        "sdk": "gradio",
        "sdk_version": _gradio_version(),
        "python_version": f"{sys.version_info.major}.{sys.version_info.minor}",  # the Hub's default is older
        "app_file": "app.py",
        **({"models": [name]} if on_hub else {}),
    }
    about = ABOUT.format(
        name=f"[{name}](https://huggingface.co/{name})" if on_hub else name,
        start=INDEXED if indexed else NOT_INDEXED,
        gradio=_gradio_version(),
    )
    return f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---\n\n# {header['title']}\n{about}"


def _gradio_version() -> str:
    """The installed one, else the lowest that the extra `demo` takes."""
    try:
        return importlib.metadata.version("gradio")
    except importlib.metadata.PackageNotFoundError:
        wanted = " ".join(
            line for line in importlib.metadata.requires(DISTRIBUTION) or [] if line.startswith("gradio")
        )
        lowest = re.search(r">=\s*([\d.]+)", wanted)
        return lowest[1] if lowest else "6.20.0"
