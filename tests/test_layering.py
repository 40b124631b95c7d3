"""Who may import whom, read from the source of every module, so that imports inside functions count too.

Layers: configuration ← modeling ← {kernels, engines} ← scoring ← {evaluation, index} ← training ← cli and examples;
explain and hub stand beside scoring. The leaves (losses, metrics, storage, teachers, data, processing, pixels, plots,
redaction, plain_yaml) import none of ours; but processing and teachers may read the configuration, teachers prepare
pixels and pool maps as processing and model do, know the engine that ran a tower, and write their files with storage,
redaction reads YAML, and it keeps secrets out of what storage, teachers and data write, and pixels say to processing,
teachers and data what a picture looks like.
Shipped files are copied flat beside a checkpoint, where only torch, transformers and what those require exist.
"""

import ast
import graphlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "modeling_tvrn"

SHIPPED = {path.stem for path in PACKAGE.glob("*_tvrn.py")} | {"losses"}
# What a user has who installed transformers and torch to load a model from the Hub.
SHIPPED_MAY_IMPORT = {"torch", "numpy", "transformers", "tokenizers", "safetensors", "PIL"}
ALWAYS_REQUIRED = {
    *("torch", "transformers", "datasets", "accelerate", "safetensors", "huggingface_hub", "tokenizers", "evaluate"),
    *("numpy", "PIL", "pyarrow", "yaml", "tqdm", "matplotlib", "typer", "pydantic"),
}
EVERYTHING_SHIPPED = {"configuration", "modeling", "processing", "losses"}
LEAVES = {
    *("losses", "metrics", "storage", "teachers", "data", "processing", "pixels", "plots", "redaction", "plain_yaml"),
}
BASE = {"configuration", "modeling", "engines", "front_door", *LEAVES}
MAY_IMPORT = {
    "__init__": {"registration", "front_door", *EVERYTHING_SHIPPED},
    "front_door": {"configuration", "modeling", "processing", "storage"},
    "registration": set(),
    "configuration": set(),
    "modeling": {"configuration", "losses"},
    "processing": {"configuration", "pixels"},
    "pixels": set(),
    "losses": set(),
    "metrics": set(),
    "storage": {"redaction"},
    "teachers": {"configuration", "modeling", "engines", "pixels", "processing", "storage", "redaction"},
    "data": {"pixels", "redaction"},
    "plots": set(),
    "redaction": {"plain_yaml"},
    "plain_yaml": set(),
    "kernels": {"configuration", "modeling"},
    "engines": {"modeling", "storage"},
    "scoring": {*BASE, "kernels"},
    "explain": BASE,
    "hub": BASE,
    "evaluation": {*BASE, "scoring", "explain", "hub"},
    "index": {*BASE, "scoring", "explain", "hub"},
    "mteb": {*BASE, "scoring"},
    "training": {*BASE, "scoring", "explain", "hub", "evaluation", "index"},
}
TOP = {*MAY_IMPORT} - {"__init__", "registration"}
MAY_IMPORT |= {"demo": TOP, "space": TOP, "export": TOP, "cli": {*TOP, "demo", "space", "export"}}
# Shipped files by the layer they belong to; a new one is named here.
LAYER_OF_SHIPPED = {
    "checks_tvrn": "modeling",
    "detectors_tvrn": "modeling",
    "encoded_tvrn": "modeling",
    "layers_tvrn": "modeling",
    "pair_tvrn": "modeling",
    "towers_tvrn": "modeling",
    "pixels_tvrn": "pixels",
    "configuration_tvrn": "configuration",
    "modeling_tvrn": "modeling",
    "processing_tvrn": "processing",
    "trust_tvrn": "configuration",
}

# Made of an extra: nothing but a function imports these files.
OF_AN_EXTRA = {"modeling_tvrn.kernels.programs": {"triton"}}

FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """The line and absolute dotted name of everything a file imports, type-checking and function bodies included."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            # `from . import x` names a module, `from .x import y` something in one.
            names = [f"{module}.{alias.name}" for alias in node.names] if node.module is None else [module]
            yield from ((node.lineno, name) for name in names)


def layer(dotted: str) -> str:
    """The layer of one of our modules: its file or folder below the package."""
    part = dotted.split(".")[1] if "." in dotted else "__init__"
    return LAYER_OF_SHIPPED.get(part, part)


def dotted_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", FILES, ids=dotted_name)
def test_a_module_imports_only_from_its_own_layer_and_those_below(path: Path) -> None:
    own = layer(dotted_name(path))
    assert own in MAY_IMPORT, f"{path.name} belongs to no layer: name {own!r} in MAY_IMPORT or LAYER_OF_SHIPPED"
    allowed = {own, *MAY_IMPORT[own]}
    wrong = [
        f"line {line}: {name}"
        for line, name in imports(path)
        if name.split(".")[0] == "modeling_tvrn" and layer(name) not in allowed and name != "modeling_tvrn.__version__"
    ]
    assert not wrong, f"{own} may import {sorted(allowed)}, but {path.relative_to(ROOT)} has {wrong}"


@pytest.mark.parametrize("path", [path for path in FILES if path.stem in SHIPPED], ids=dotted_name)
def test_a_shipped_file_needs_nothing_but_its_neighbours_and_what_loads_models(path: Path) -> None:
    """Beside a checkpoint there is no package: relative imports are flat and name shipped files."""
    assert path.parent == PACKAGE, "shipped files lie flat in the package, as they do beside a checkpoint"
    allowed = SHIPPED_MAY_IMPORT | set(sys.stdlib_module_names)
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, f"line {node.lineno}: not flat"
            assert node.module, f"line {node.lineno}: `from . import x` is not followed when files are copied"
            assert node.module in SHIPPED, f"line {node.lineno}: .{node.module} is not shipped with a checkpoint"
    for line, name in imports(path):
        top = name.split(".")[0]
        assert top in allowed or top == "modeling_tvrn", (
            f"line {line}: {name} is not there for a user of the Hub alone"
        )


@pytest.mark.parametrize("path", [path for path in FILES if path.stem in SHIPPED], ids=dotted_name)
def test_a_shipped_file_never_names_the_package_absolutely(path: Path) -> None:
    """`from modeling_tvrn.x import` would find the checkpoint's own modeling_tvrn.py, or nothing."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        assert not [name for name in names if name.split(".")[0] == "modeling_tvrn"]


@pytest.mark.parametrize("path", FILES, ids=dotted_name)
def test_only_requirements_are_imported_at_the_top_of_a_module(path: Path) -> None:
    """An extra is imported inside the function that needs it, where its absence can be explained."""
    allowed = ALWAYS_REQUIRED | set(sys.stdlib_module_names) | {"modeling_tvrn"}
    allowed |= OF_AN_EXTRA.get(dotted_name(path), set())
    for node in ast.parse(path.read_text("utf-8")).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        for name in names:
            assert name.split(".")[0] in allowed, f"line {node.lineno}: {name} is an extra; import it where it is used"


@pytest.mark.slow
def test_no_import_circle_between_files() -> None:
    """Also none by imports of types alone or inside functions: what two files share has a third to be in."""
    files = {dotted_name(path): path for path in FILES}
    graph = {
        name: {found for _, found in imports(path) if found in files and found != name} for name, path in files.items()
    }
    sorter = graphlib.TopologicalSorter(graph)
    try:
        sorter.prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"imports go round: {' → '.join(error.args[1])}")


def test_every_required_library_is_declared() -> None:
    """What the package imports is what setup.py requires, by the names pip knows."""
    pip_names = {"PIL": "pillow", "yaml": "pyyaml"}
    declared = (ROOT / "setup.py").read_text("utf-8").split("REQUIREMENTS = [")[1].split("]")[0]
    for module in ALWAYS_REQUIRED:
        assert f'"{pip_names.get(module, module)}>=' in declared, f"{module} is imported but not required"


def test_examples_shadow_no_library() -> None:
    """`python examples/x.py` puts examples/ first on the path: a file called datasets.py would be imported as the
    library."""
    scripts = {path.stem for path in (ROOT / "examples").rglob("*.py")}
    assert not scripts & (ALWAYS_REQUIRED | set(sys.stdlib_module_names) | {"modeling_tvrn", "setup", "tests"})
