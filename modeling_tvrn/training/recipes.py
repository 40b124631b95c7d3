"""The recipes that come with the package, and which one a command means."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .settings import read_overrides, read_yaml

__all__ = ["OWN", "QUICKSTART", "default_recipe", "find_recipe", "recipe_values", "shipped_recipes"]

PACKAGE = Path(__file__).resolve().parents[1]
# In an installed copy inside the package, in a checkout beside it.
FOLDERS = (PACKAGE / "recipes", PACKAGE.parent / "examples" / "configs")
QUICKSTART, OWN = "scenes", "own"
STARTS = ("dual_encoder", "start_from")  # models that bring towers and sizes
BROUGHT = ("vision", "text", "model")


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    folder = next((folder for folder in FOLDERS if folder.is_dir()), FOLDERS[0])
    return {path.stem: path for path in sorted(folder.glob("*.yaml"), key=lambda path: path.stem)}


def find_recipe(name: str | Path) -> Path:
    """The file of a recipe: an existing file, or `-`, which is stdin; else the shipped one of that name.

    Raises:
        ValueError: neither is there; lists the shipped ones, the nearest first.
    """
    path, shipped = Path(name).expanduser(), shipped_recipes()
    if path.is_file() or str(name) == "-":
        return path
    if str(name) in shipped:
        return shipped[str(name)]
    near = difflib.get_close_matches(path.stem, shipped, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    kind = "is a folder: no configuration file" if path.is_dir() else "no configuration file"
    raise ValueError(
        f"{kind} {str(name)!r}, and no recipe of that name comes with the package; {hint}It has {', '.join(shipped)}"
    )


def default_recipe(overrides: Sequence[str]) -> str:
    """The recipe of a command that names none: `own` for one's own data or model, else the quickstart."""
    given = read_overrides([word for word in overrides if "=" in word], {})
    is_own = given.get("data", QUICKSTART) != QUICKSTART or any(given.get(name) is not None for name in STARTS)
    return OWN if is_own else QUICKSTART


def recipe_values(name: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Keys and values of a recipe.

    Args:
        name: a file, or a shipped recipe.
        overrides: what is laid over them; where these name a model to start from, `own` says nothing of towers and
            sizes, which that model brings.
    """
    path = find_recipe(name)
    values = read_yaml(path)
    given = read_overrides(overrides, {})
    if path == shipped_recipes().get(OWN) and any(given.get(start) is not None for start in STARTS):
        values = {key: value for key, value in values.items() if key not in BROUGHT}
    if given.get("phases") is not None:  # they have lengths of their own, and the user has not given the recipe's
        values = {key: value for key, value in values.items() if key not in ("epochs", "max_steps")}
    return values
