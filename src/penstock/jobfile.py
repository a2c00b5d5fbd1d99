"""Job files: YAML text to values and back, with the line of every key.

YAML 1.2: `5e-4` is a number, `on` and `1:30` are words.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from penstock.errors import JobError
from penstock.section import Key, Problem, job_error, received
from penstock.spec import fold

SOURCES = ("train", "test")
CHOICES = ("network", "loss", "optimizer", "schedule", "strategy", *SOURCES)
"""Keys whose value is a name, or one name with its keywords."""


class Place(NamedTuple):
    """Where a value was said, and the order in which problems are told."""

    line: float
    text: str


@dataclass(frozen=True)
class Document:
    """The values of a Job file.

    Arguments:
        name: of the file, as given.
        values: mappings, lists and scalars.
        places: of each key, by its path.
        problems: seen already: keys that are there twice.
    """

    name: str
    values: dict[str, Any]
    places: dict[Key, Place]
    problems: tuple[tuple[Place, Problem], ...] = ()

    def error(self, problems: Sequence[Problem]) -> JobError:
        """These problems and those of the document, each with its place, as one error."""
        placed = [*self.problems, *((self._place(problem.path), problem) for problem in problems)]
        placed.sort(key=lambda pair: pair[0].line)
        return job_error([(place.text, problem) for place, problem in placed])

    def override(self, overrides: Sequence[str]) -> Document:
        """With `key=value` of the command line put over it, in their order.

        Arguments:
            overrides: `batch_size=64`, `strategy.averaging.every=10`; values are YAML. Relative
                paths in them start from the current folder.

        Raises:
            JobError: one is not `key=value`, or its value not YAML.
        """
        document = self
        for override in overrides:
            document = document._override(override)
        return document

    def _override(self, override: str) -> Document:
        place = Place(math.inf, f"--set {override}")
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            raise JobError(f"{place.text}: expected key=value", hint="--set batch_size=64")
        value, inner, problems = _parse(text, place.text, one_line=True)
        path = _split(key)
        given: Any = _absolute(_put({}, path, value), Path.cwd())
        values = dict(self.values)
        if path[0] in CHOICES and len(path) > 1:
            head, name = str(path[0]), str(path[1])
            current = values.get(head)
            current = current if isinstance(current, dict) else {current: {}}
            former = next((str(said) for said in current if fold(str(said)) == fold(name)), None)
            # Another name takes the place of the former with its keywords.
            values[head] = {former: current[former]} if former else {}
            given[head] = {former or name: given[head][name]}
            path = (head, former or name, *path[2:])
        for part in path:
            given = given[part]
        values = _put(values, path, given)
        places = {old: at for old, at in self.places.items() if old[: len(path)] != path}
        for depth in range(1, len(path) + 1):
            places.setdefault(path[:depth], place)
        places.update({(*path, *deeper): place for deeper in inner})
        found = tuple((place, problem.under(*path)) for _, problem in problems)
        return replace(self, values=values, places=places, problems=(*self.problems, *found))

    def _place(self, path: Key) -> Place:
        for length in range(len(path), 0, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return Place(0, self.name)


def read(path: str | os.PathLike[str]) -> Document:
    """The values of a Job file, with the line of each.

    Relative paths of its sources (`path`, `url`) start from the file's folder; fsspec URLs and
    absolute paths stay as they are.

    Raises:
        JobError: missing, empty, not YAML, or not a mapping.
    """
    name = os.fspath(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise JobError(f"{name}: no such file", hint=_beside(Path(path))) from None
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"{name}: cannot be read: {error}") from error
    values, places, problems = _parse(text, name)
    if values is None:
        raise JobError(
            f"{name}: is empty",
            hint="a Job has at least network, loss, optimizer, train, batch_size and epochs",
        )
    if not isinstance(values, dict):
        raise JobError(
            f"{name}:1: {received(values)}\n  expected keys and values",
            hint="such as `batch_size: 32`, with a space after the colon",
        )
    values = _absolute(values, Path(path).absolute().parent)
    return Document(name, values, places, tuple(problems))


@dataclass(frozen=True)
class Unsaid:
    """A value that YAML cannot say: written as null, with a comment."""

    label: str


def write(values: Mapping[str, Any]) -> str:
    """YAML of mappings, lists and scalars, in their order, a key of the first level at a time."""
    lines: list[str] = []
    for key, value in values.items():
        items = value if isinstance(value, list) else []
        if isinstance(value, Unsaid):
            lines.append(f"{key}: {_null(value)}\n")
        elif any(isinstance(item, Unsaid) for item in items):
            lines.append(f"{key}:\n")
            lines += [f"- {_null(x)}\n" if isinstance(x, Unsaid) else _dump([x]) for x in items]
        else:
            lines.append(_dump({key: value}))
    return "".join(lines)


def _null(value: Unsaid) -> str:
    return f"null  # given in Python: {value.label}"


class _Loader(yaml.SafeLoader):
    """The core schema of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012


class _Dumper(yaml.SafeDumper):
    """Quotes what the loader would not read as text."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def ignore_aliases(self, data: Any) -> bool:
        return True


_SCALARS = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
for _tag, _pattern in _SCALARS.items():
    for _schema in (_Loader, _Dumper):
        _schema.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), None
        )


def _dump(value: Any) -> str:
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _parse(
    text: str, name: str, *, one_line: bool = False
) -> tuple[Any, dict[Key, Place], list[tuple[Place, Problem]]]:
    """Values, places by path, and keys that are there twice."""
    places: dict[Key, Place] = {}
    problems: list[tuple[Place, Problem]] = []

    def where(mark: Any) -> str:
        return name if one_line else f"{name}:{mark.line + 1}"

    def value_of(node: yaml.Node, path: Key, parents: tuple[yaml.Node, ...]) -> Any:
        if node in parents:
            raise JobError(f"{where(node.start_mark)}: an alias stands for what it is part of")
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node, where(node.start_mark))
        inside = (*parents, node)
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                places[*path, index] = Place(item.start_mark.line, where(item.start_mark))
            return [value_of(item, (*path, i), inside) for i, item in enumerate(node.value)]
        values: dict[Any, Any] = {}
        first: dict[Any, Any] = {}
        for key_node, item in node.value:
            mark = key_node.start_mark
            if not isinstance(key_node, yaml.ScalarNode):
                raise JobError(f"{where(mark)}: a key is a word, not a list or a mapping")
            key = _scalar(key_node, where(mark))
            at = (*path, key)
            places[at] = Place(mark.line, where(mark))
            if key in values:
                before = "" if one_line else f" (first in line {first[key].line + 1})"
                twice = Problem(at, f"the key is there twice{before}", hint="remove one")
                problems.append((places[at], twice))
            first.setdefault(key, mark)
            values[key] = value_of(item, at, inside)
        return values

    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        raise _syntax(error, where(error.problem_mark or error.context_mark)) from None
    except yaml.YAMLError as error:
        raise JobError(f"{name}: not YAML: {' '.join(str(error).split())}") from None
    return (None if root is None else value_of(root, (), ())), places, problems


def _scalar(node: yaml.ScalarNode, where: str) -> Any:
    kind, text = node.tag.removeprefix("tag:yaml.org,2002:"), node.value
    if kind == "str":
        return text
    if not re.fullmatch(_SCALARS.get(kind, "(?!)"), text):
        raise JobError(f"{where}: tag {node.tag!r} on {text!r} is not read here")
    if kind == "int":
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    if kind == "float":
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return None if kind == "null" else text.lower() == "true"


def _syntax(error: yaml.MarkedYAMLError, where: str) -> JobError:
    problem = error.problem or error.context or "cannot be parsed"
    if "'\\t'" in problem:
        return JobError(
            f"{where}: a tab where YAML wants spaces", hint="indent with spaces: tabs are not YAML"
        )
    start = error.context_mark
    context = f" ({error.context}, line {start.line + 1})" if error.context and start else ""
    return JobError(
        f"{where}: not YAML: {problem}{context}",
        hint="check indentation, quotes and brackets here and in the line above",
    )


def _beside(path: Path) -> str:
    found = sorted(p.name for p in path.absolute().parent.glob("*.y*ml"))[:8]
    return f"{path.absolute().parent} holds {', '.join(found)}" if found else ""


def _split(key: str) -> Key:
    """`optimizer.adagrad.lr` in three; a name with dots, as `penstock.zoo:lenet`, stays whole."""
    head, _, rest = key.partition(".")
    if head not in CHOICES or not rest:
        return tuple(key.split("."))
    name, dot, keyword = rest.rpartition(".")
    return (head, name, keyword) if dot and ":" not in keyword else (head, rest)


def _absolute(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """With the relative paths of sources taken from `folder`."""

    def path_of(value: Any) -> Any:
        if isinstance(value, list):
            return [path_of(item) for item in value]
        if not isinstance(value, str) or "://" in value or "::" in value:
            return value
        return os.path.normpath(folder / Path(value).expanduser())

    out = dict(values)
    for source in SOURCES:
        if isinstance(values.get(source), dict):
            out[source] = {
                name: {
                    key: path_of(value) if key in ("path", "url") else value
                    for key, value in keywords.items()
                }
                if isinstance(keywords, dict)
                else keywords
                for name, keywords in values[source].items()
            }
    return out


def _put(values: dict[str, Any], path: Key, value: Any) -> dict[str, Any]:
    """A copy with `value` at `path`; what was there and is not a mapping makes room."""
    key, *deeper = path
    inner = values.get(str(key))
    if deeper:
        value = _put(inner if isinstance(inner, dict) else {}, tuple(deeper), value)
    return {**values, str(key): value}
