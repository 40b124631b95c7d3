"""What a checkpoint's folder holds, looked at without loading a model or running any of its code."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..storage.files import FILES, StorageError, check_listed
from .report import Check

__all__ = ["check_code", "check_files", "check_no_pickle", "foreign_code", "read_json", "weight_files"]

PACKAGE = Path(__file__).resolve().parents[1]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill", ".mar")
# Starts of a pickle (protocols 2 to 5), and of the zip archive that torch.save writes.
PICKLE_STARTS = tuple(b"\x80" + bytes([protocol]) for protocol in (2, 3, 4, 5))
AUTO_CLASSES = {"AutoConfig": "config.json", "AutoModel": "config.json", "AutoProcessor": "processor_config.json"}
# What somebody has who installed transformers and torch to load a model from the Hub.
LOADS_MODELS = {"torch", "numpy", "transformers", "tokenizers", "safetensors", "huggingface_hub", "PIL"}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object; empty where there is no such file.

    Raises:
        ValueError: it is no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} holds a {type(value).__name__}; expected an object")
    return value


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that a checkpoint consists of, whether or not they exist."""
    if (folder / INDEX).is_file():
        return [folder / name for name in sorted(set(read_json(folder / INDEX).get("weight_map", {}).values()))]
    return [folder / WEIGHTS]


def check_files(folder: Path) -> Check:
    """Everything that loading reads is there, and as training wrote it."""
    wanted = ["config.json", "processor_config.json", *(path.name for path in weight_files(folder))]
    if read_json(folder / "processor_config.json").get("tokenizer") is not None:
        wanted += ["tokenizer.json", "tokenizer_config.json"]
    missing = [name for name in wanted if not (folder / name).is_file()]
    # A slow tokenizer has its own vocabulary file in place of tokenizer.json.
    if "tokenizer.json" in missing and any(folder.glob("vocab*")):
        missing.remove("tokenizer.json")
    if missing:
        advice = (
            "save both parts into the same folder: model.save_pretrained(folder); processor.save_pretrained(folder)"
        )
        return Check("files", "failed", f"missing: {', '.join(missing)}", advice)
    if (folder / FILES).is_file():
        try:
            check_listed(folder)
        except StorageError as error:
            return Check("files", "failed", f"{error.path.name} is {error.problem}", error.fix)
    size = sum(path.stat().st_size for path in weight_files(folder))
    return Check("files", "ok", f"config, processor, weights ({size / 1e6:,.1f} MB) are there")


def check_no_pickle(folder: Path, names: Sequence[str]) -> Check:
    """No file that runs code when it is read: weights are safetensors alone.

    Args:
        folder: where those files are that could be looked into.
        names: all files of the checkpoint, those not downloaded too.
    """
    found = sorted(name for name in names if name.lower().endswith(PICKLES) or _is_pickle(folder / name))
    if not found:
        return Check("safetensors only", "ok", "no file is a pickle")
    advice = "remove them; whoever opens a pickle runs what it says. Weights belong into model.safetensors"
    return Check("safetensors only", "failed", f"pickles: {', '.join(found)}", advice)


def _is_pickle(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(64)
    return start.startswith(PICKLE_STARTS) or (start.startswith(b"PK\x03\x04") and b"data.pkl" in start)


def check_code(folder: Path) -> Check:
    """The code that `trust_remote_code=True` runs is complete and needs nothing but what loads models."""
    problems = list(_code_problems(folder))
    if problems:
        advice = "save again with the installed modeling_tvrn, which copies its code beside the weights"
        return Check("shipped code", "failed", "; ".join(problems), advice)
    files = sorted(path.name for path in folder.glob("*.py"))
    foreign = foreign_code(folder)
    same = f"{', '.join(foreign)} differ" if foreign else "all as in the installed package"
    return Check("shipped code", "ok", f"{len(files)} files, {same}")


def foreign_code(folder: Path) -> list[str]:
    """Python files of the folder that are not the installed package's, byte for byte."""
    own = {path.name: path.read_bytes() for path in PACKAGE.glob("*.py")}
    return sorted(path.name for path in folder.glob("*.py") if own.get(path.name) != path.read_bytes())


def _code_problems(folder: Path) -> Iterator[str]:
    seen: dict[str, ast.Module | None] = {}
    for auto_class, file in AUTO_CLASSES.items():
        target = read_json(folder / file).get("auto_map", {}).get(auto_class)
        if target is None:
            yield f"{file} names no code for {auto_class} (auto_map)"
        elif "--" in target:
            yield f"{auto_class}'s code lies in another repository ({target})"
        else:
            module, _, name = target.rpartition(".")
            yield from _module_problems(folder, module, seen)
            tree = seen[module]
            classes = [node.name for node in tree.body if isinstance(node, ast.ClassDef)] if tree else []
            if (folder / f"{module}.py").is_file() and name not in classes:
                yield f"{module}.py has no class {name}, which {auto_class} needs"


def _module_problems(folder: Path, module: str, seen: dict[str, ast.Module | None]) -> Iterator[str]:
    """What hinders a module of the folder, or one that it imports, from being loaded elsewhere."""
    if module in seen:
        return
    seen[module] = None
    path = folder / f"{module}.py"
    if not path.is_file():
        yield f"{path.name} is missing"
        return
    try:
        tree = seen[module] = ast.parse(path.read_text("utf-8"))
    except (SyntaxError, UnicodeDecodeError) as error:
        yield f"{path.name} is no Python ({error})"
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield from _module_problems(folder, str(node.module), seen)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [str(node.module)]
            tops = {name.partition(".")[0] for name in names}
            for top in sorted(tops - LOADS_MODELS - set(sys.stdlib_module_names)):
                yield f"{path.name} imports {top}, which a user of the Hub may not have"
