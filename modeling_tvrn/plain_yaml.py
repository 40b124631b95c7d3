"""YAML as people mean it, of bounded size: settings, command lines, and the headers of other people's cards."""

from __future__ import annotations

import re
from typing import Any

import yaml

__all__ = ["load_yaml", "yaml_problem"]

DEEPEST = 50  # mappings and lists in one another
MOST = 100_000  # values, each counted as often as aliases repeat it


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: `no` is a word (a precision here), `5e-4` is a number, `010` is not eight, `1:30` not
    ninety, and a date is text; PyYAML's 1.1 says otherwise. And a key stands once: of two, one would be lost."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """As the safe loader's, which would go on to the end of Python's stack."""
        self.depth += 1
        if self.depth > DEEPEST:
            raise _refused(f"it is nested more than {DEEPEST} deep", self.peek_event())
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As the safe loader's, without duplicates."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is not None and key in seen:
                raise _refused(f"the key {key!r} stands twice; keep one of the two", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep)


_REPLACED = {f"tag:yaml.org,2002:{kind}" for kind in ("bool", "float", "int", "timestamp")}
_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] not in _REPLACED]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"), [*"-+0123456789"])
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF")
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+\.[0-9]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)$"),
    "-+0123456789.",
)


def load_yaml(text: str) -> Any:
    """The value that a text says.

    Raises:
        yaml.YAMLError: It is no YAML, has a key twice, values in themselves, or too many or too deep ones.
    """
    loader = _Loader(text)
    node: Any = None
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {}, 0)
        return loader.construct_document(node)
    except ValueError as error:  # a number of thousands of digits
        raise _refused(str(error), node) from None
    finally:
        loader.dispose()


def yaml_problem(error: Exception) -> str:
    """What is wrong and where, without the lines around it, which may hold a secret."""
    mark = getattr(error, "problem_mark", None)
    where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else ""
    said = getattr(error, "problem", None) or getattr(error, "reason", None) or type(error).__name__
    return f"{said}{where}"


def _count(node: yaml.Node, counts: dict[int, int], depth: int) -> int:
    """Values in a node, those behind an alias each time."""
    if depth > DEEPEST:  # of an alias to what holds it, too
        raise _refused(f"it is nested more than {DEEPEST} deep", node)
    if id(node) not in counts:
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        nodes = [each for pair in inner for each in pair] if isinstance(node, yaml.MappingNode) else inner
        counts[id(node)] = 1 + sum(_count(each, counts, depth + 1) for each in nodes)
    if counts[id(node)] > MOST:
        raise _refused(f"with its aliases it has more than {MOST:,} values", node)
    return counts[id(node)]


def _refused(problem: str, node: Any) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark if node is not None else None)
