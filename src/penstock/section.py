"""Keys with values, and what can be wrong with them.

Every part of a Job is a `Section`; what is wrong with one is a `Problem` with the path of its key.
A Job given in Python raises its problems as one `JobError`; one read from a file has the line of
each put before it (`jobfile.py`).
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from penstock.errors import JobError, did_you_mean

Key = tuple[str | int, ...]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: at which key, what was received, what was expected, what to do."""

    path: Key
    text: str
    expected: str = ""
    hint: str = ""

    def under(self, *parents: str | int) -> Problem:
        return replace(self, path=(*parents, *self.path))

    def message(self, place: str = "") -> str:
        """Without the hint; `place` is a file and line."""
        head = ": ".join(part for part in (place, ".".join(map(str, self.path)), self.text) if part)
        return f"{head}\n  expected {self.expected}" if self.expected else head


class Problems(ValueError):
    """What a validator raises: pydantic gathers them, with the path of the value."""

    def __init__(self, *problems: Problem) -> None:
        super().__init__("; ".join(problem.message() for problem in problems))
        self.problems = problems


def job_error(problems: Sequence[tuple[str, Problem]]) -> JobError:
    """All problems, each with its place, as one error."""
    if len(problems) == 1:
        place, problem = problems[0]
        return JobError(problem.message(place), hint=problem.hint)
    return JobError(
        "\n".join(
            str(JobError(problem.message(place), hint=problem.hint)) for place, problem in problems
        )
    )


_KINDS = {bool: "true or false", int: "whole number", float: "number", str: "text", dict: "mapping"}
_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}",
}


def received(value: Any) -> str:
    """`received 'x' (text)`: a value of a Job, in words."""
    if value is None:
        return "received nothing (null)"
    if not isinstance(value, (bool, int, float, str, dict, list, tuple)):
        return f"received {label(value)}"
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    return f"received {shown} ({_KINDS.get(type(value), type(value).__name__)})"


def label(value: Any) -> str:
    """A name for a thing given in Python, on one line and without its address in memory."""
    if isinstance(value, functools.partial):
        return f"a partial of {label(value.func)}"
    if inspect.isclass(value) or inspect.isroutine(value):
        kind = "class" if inspect.isclass(value) else "function"
        return f"{kind} {value.__module__}.{value.__qualname__}"
    return f"an instance of {type(value).__module__}.{type(value).__qualname__}"


class Section(BaseModel):
    """Keys with values: immutable, unknown keys refused, no value changed into another type."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, arbitrary_types_allowed=True
    )
    path: ClassVar[Key] = ()

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            problems = problems_of(error, type(self))
            raise job_error([("", problem.under(*self.path)) for problem in problems]) from None

    # Says to pydantic that validating values (a nested section, a file) need not come through
    # here: it then gathers the errors of all sections before anything is raised.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    def __setattr__(self, name: str, value: Any) -> None:
        noun = type(self).__name__
        raise JobError(
            f"{'.'.join(map(str, (*self.path, name)))}: {noun} cannot be changed",
            hint=f"job.replace({self.path[0] if self.path else name}=...) gives another Job",
        )

    @classmethod
    def known(cls) -> list[str]:
        """The keys as they are said, in their order."""
        return [info.alias or name for name, info in cls.model_fields.items()]

    def given(self) -> dict[str, Any]:
        """The values that were said, without the defaults."""
        return {
            info.alias or name: getattr(self, name)
            for name, info in type(self).model_fields.items()
            if name in self.model_fields_set
        }


def problems_of(error: ValidationError, model: type[Section]) -> list[Problem]:
    """What pydantic found wrong with the values of `model`, in our words."""
    problems: list[Problem] = []
    for detail in error.errors(include_url=False):
        path, context = tuple(detail["loc"]), detail.get("ctx", {})
        kind, value = detail["type"], detail["input"]
        inner = context.get("error")
        if isinstance(inner, Problems):
            problems += [problem.under(*path) for problem in inner.problems]
            continue
        text, expected, hint = received(value), "", ""
        if kind in ("extra_forbidden", "invalid_key"):
            keys = _section_at(model, path[:-1]).known()
            text, expected = "unknown key", f"one of: {', '.join(keys)}"
            hint = did_you_mean(str(path[-1]), keys)
        elif kind == "missing":
            text = "missing"
        elif kind == "literal_error":
            words = re.findall(r"'([^']*)'", context["expected"])
            expected, hint = f"one of: {', '.join(words)}", did_you_mean(str(value), words)
        elif kind == "model_type":
            expected = f"a mapping with keys of: {', '.join(_section_at(model, path).known())}"
        elif kind in _EXPECTED:
            expected = _EXPECTED[kind].format(**context)
        else:
            expected = detail["msg"][0].lower() + detail["msg"][1:]
        problems.append(Problem(path, text, expected, hint))
    return problems


def _section_at(model: type[Section], path: Key) -> type[Section]:
    for key in path:
        fields = {info.alias or name: info.annotation for name, info in model.model_fields.items()}
        annotation = fields.get(str(key))
        for kind in get_args(annotation) or (annotation,):
            if inspect.isclass(kind) and issubclass(kind, Section):
                model = kind
    return model
