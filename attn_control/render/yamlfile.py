"""Reads a YAML file and remembers where every key stands, so that an error can point at its line.

The loader is PyYAML's SafeLoader with the scalar rules of YAML 1.2: `1e-3` is a number, `off` and
`no` are text (a variant may be called `off`), and dates stay text. A key written twice is an error,
because YAML would silently keep the last one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from attn_control.errors import AttnControlError

MAX_BYTES = 4_000_000
MAX_KEYS = 200_000  # aliases multiply: nine of nine of nine ... is a small file and a full memory
KeyPath = tuple[Any, ...]


class JobError(AttnControlError):
    """A problem at a key of a job, for those who show it beside that key.

    `path` leads to the key, `problem` is the sentence without its place.
    """

    def __init__(self, message: str, path: KeyPath, problem: str) -> None:
        super().__init__(message)
        self.path, self.problem = path, problem


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars; the class has its own resolver table."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        # Keys are names here: a variant called 1 or true is text, as its mark below says too.
        self.flatten_mapping(node)
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                key.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in [
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("merge", r"<<", "<"),
]:
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first)
    )


def _decimal_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    # YAML 1.1 would read 010 as octal eight.
    text = loader.construct_scalar(node)
    if len(text) > 40:  # Python itself refuses thousands of digits, with an error of another kind
        raise yaml.constructor.ConstructorError(
            None, None, f"a number of {len(text)} digits", node.start_mark
        )
    return int(text)


_Loader.add_constructor("tag:yaml.org,2002:int", _decimal_int)


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would read as something other than text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # U+0085 and its like are line ends in single quotes; in double ones they are escaped.
        style = None if data.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)
_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[.0-9]+(?:[eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)


def dump_yaml(data: Any, *, one_line: bool = False) -> str:
    """YAML that `parse_yaml` reads back as the same data: mappings, lists, text, numbers, None."""
    return yaml.dump(
        data,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        width=1_000_000 if one_line else 88,
        default_flow_style=True if one_line else None,
    )


@dataclass
class YamlFile:
    """The data of one file and the place of every key path in it."""

    name: str
    data: Any
    marks: dict[KeyPath, tuple[int, int]] = field(default_factory=dict)

    def place(self, path: KeyPath = ()) -> str:
        """`file:line:column` of a key path, or of its nearest known parent."""
        path = tuple(path)
        while path and path not in self.marks:
            path = path[:-1]
        if path not in self.marks:
            return self.name
        line, column = self.marks[path]
        return f"{self.name}:{line}:{column}"

    def error(self, path: KeyPath, problem: str) -> JobError:
        """An error that starts with the place and the key path."""
        keys = dotted(path)
        message = f"{self.place(path)}: {keys + ': ' if keys else ''}{problem}"
        return JobError(message, tuple(path), problem)


def dotted(path: KeyPath) -> str:
    """`('variants', 'cfg', 'controls', 0)` as `variants.cfg.controls[0]`."""
    text = ""
    for key in path:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else str(key)
    return text


def read_yaml(path: Path | str) -> YamlFile:
    """Load one YAML document; every problem is an AttnControlError with file, line and column."""
    path = Path(path)
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise AttnControlError(f"{path}: no such job file") from None
    except IsADirectoryError:
        raise AttnControlError(f"{path}: expected a YAML file, this is a folder") from None
    except OSError as error:
        raise AttnControlError(f"{path}: cannot be read ({error.strerror})") from None
    if len(raw) > MAX_BYTES:
        raise AttnControlError(
            f"{path}: {len(raw)} bytes is too large for a job (limit {MAX_BYTES})"
        )
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise AttnControlError(f"{path}: byte {error.start} is not UTF-8 text") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, name: str) -> YamlFile:
    """The same for text already in memory."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            raise AttnControlError(f"{name}: the file is empty, expected a job")
        marks: dict[KeyPath, tuple[int, int]] = {}
        for path, mark in _walk(node, (), name, frozenset()):
            marks[path] = (mark.line + 1, mark.column + 1)
            if len(marks) > MAX_KEYS:
                raise AttnControlError(f"{name}: more than {MAX_KEYS} keys and items")
        return YamlFile(name, loader.construct_document(node), marks)
    except yaml.MarkedYAMLError as error:
        at = error.problem_mark or error.context_mark
        place = f"{name}:{at.line + 1}:{at.column + 1}" if at else name
        context = f" ({error.context})" if error.context else ""
        raise AttnControlError(f"{place}: not valid YAML: {error.problem}{context}") from None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise AttnControlError(f"{name}: not valid YAML: {reason}") from None
    except RecursionError:
        raise AttnControlError(f"{name}: nested too deeply to be a job") from None
    finally:
        loader.dispose()


def _walk(
    node: yaml.Node, path: KeyPath, name: str, above: frozenset[int]
) -> Iterator[tuple[KeyPath, yaml.Mark]]:
    """Every key path below a node. A key's place is the key itself, an item's place is the item."""
    if id(node) in above:
        raise AttnControlError(
            f"{name}:{node.start_mark.line + 1}: {dotted(path)}: an alias refers to its own parent"
        )
    above = above | {id(node)}
    if not path:
        yield path, node.start_mark
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield (*path, index), item.start_mark
            yield from _walk(item, (*path, index), name, above)
    elif isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            mark = key.start_mark
            if not isinstance(key, yaml.ScalarNode):
                raise AttnControlError(
                    f"{name}:{mark.line + 1}:{mark.column + 1}: {dotted(path)}: a key must be text"
                )
            if key.value in seen and key.value != "<<":
                raise AttnControlError(
                    f"{name}:{mark.line + 1}:{mark.column + 1}: {dotted((*path, key.value))}: "
                    f"written twice, first on line {seen[key.value]}"
                )
            seen[key.value] = mark.line + 1
            yield (*path, key.value), mark
            yield from _walk(value, (*path, key.value), name, above)
