"""What makes a thing: a network, loss, optimizer, schedule, source or callback.

A `Maker` is said in Python or YAML in the same few ways, for a `Role`, and checked when it is said
and not when it is used: its name is found, and its keywords are those of the signature.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from penstock.errors import (
    DataError,
    JobError,
    NetworkError,
    PenstockError,
    UserError,
    did_you_mean,
)
from penstock.section import Problem, Problems, label, received


@dataclass(frozen=True)
class Role:
    """What a Maker is wanted for.

    Arguments:
        noun: "optimizer".
        module: where its short names are looked up.
        offers: which things of that module have a short name: "class" (subclasses of `gives`) or
            "function" (whose first parameters are `given`).
        ending: what a short name leaves out: "LR" makes `cosine_annealing` of CosineAnnealingLR.
        gives: the class of what is made, as `module:name`; empty where anything will do.
        given: the names of what the run passes by position.
        called: the run calls the thing itself, so that a function or an instance is the thing, and
            only a class is something that makes it.
        wanted: what it takes, for messages.
        refused: classes that cannot work here, as `module:name`, each with the reason and a hint.
        error: what a failure to make it is.
    """

    noun: str
    module: str = ""
    offers: str = "class"
    ending: str = ""
    gives: str = ""
    given: tuple[str, ...] = ()
    called: bool = False
    wanted: str = ""
    refused: tuple[tuple[str, str, str], ...] = ()
    error: type[UserError] = NetworkError


NETWORK = Role("network", gives="torch.nn:Module", wanted="a torch.nn.Module or what makes one")
LOSS = Role(
    "loss",
    module="torch.nn.functional",
    offers="function",
    ending="_loss",
    given=("input", "target"),
    called=True,
    wanted="a callable (output, target) -> scalar",
)
OPTIMIZER = Role(
    "optimizer",
    module="torch.optim",
    gives="torch.optim:Optimizer",
    given=("params",),
    wanted="what makes a torch.optim.Optimizer from parameters",
    refused=(
        (
            "torch.optim:LBFGS",
            "evaluates the loss several times within a step (needs a closure)",
            "use adam, adagrad, sgd or another that steps once from the gradient",
        ),
    ),
)
SCHEDULE = Role(
    "schedule",
    module="torch.optim.lr_scheduler",
    ending="LR",
    gives="torch.optim.lr_scheduler:LRScheduler",
    given=("optimizer",),
    wanted="what makes a torch.optim.lr_scheduler.LRScheduler from an optimizer",
    refused=(
        (
            "torch.optim.lr_scheduler:ReduceLROnPlateau",
            "needs a metric at every step",
            "use a schedule of the step alone, such as cosine_annealing, and stop: {metric: ...}",
        ),
    ),
)
SOURCE = Role(
    "source",
    module="penstock.feed",
    offers="function",
    gives="penstock.feed.source:Source",
    wanted="a Source or what makes one",
    error=DataError,
)
CALLBACK = Role("callback", called=True, wanted="a callback", error=JobError)


def fold(word: str) -> str:
    """One spelling for `AdamW`, `adamw` and `adam_w`."""
    return word.replace("_", "").lower()


@functools.cache
def short_names(role: Role) -> Mapping[str, Any]:
    """Every short name of a role, as it is written to files, and what it stands for."""
    found: dict[str, Any] = {}
    if not role.module:
        return found
    module = importlib.import_module(role.module)
    base = locate(role.gives) if role.gives else object
    for attribute, value in vars(module).items():
        if role.offers == "class":
            offered = inspect.isclass(value) and issubclass(value, base) and value is not base
        else:
            offered = inspect.isfunction(value) and _leading(value, role) == role.given
        if offered and not attribute.startswith("_"):
            word = attribute.removesuffix(role.ending)
            found[re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", "_", word).lower()] = value
    return found


def _leading(function: Any, role: Role) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)[: len(role.given)]


@dataclass(frozen=True, eq=False, repr=False)
class Maker:
    """What makes a thing: a class or function with keywords, or the thing itself.

    Arguments:
        role: what it is wanted for.
        target: what is called, or the thing itself.
        keywords: keyword arguments of the call.
        spelled: the name by which the target was found, where it was said by name.
        folders: on the import path while that name is looked up.
    """

    role: Role
    target: Any
    keywords: Mapping[str, Any] = field(default_factory=dict)
    spelled: str = ""
    folders: tuple[str, ...] = ()

    @classmethod
    def of(cls, value: Any, role: Role, folder: str | None = None) -> Maker:
        """The Maker that `value` says, checked.

        Arguments:
            value: a short name or `package.module:name`; `{name: {keyword: value}}`; a class,
                function or `functools.partial`; or the thing itself.
            role: what it is wanted for.
            folder: the Job file's: put on the import path, with the current folder, while names
                are looked up.

        Raises:
            Problems: unknown name or keyword, a keyword that is missing, or another kind of thing.
        """
        if isinstance(value, Maker) and value.role == role:
            return value
        maker = cls._read(value, role, folder)
        parents: tuple[str, ...] = tuple(value) if isinstance(value, Mapping) else ()
        problems = maker._problems()
        if problems:
            parents = parents or ((maker.key,) if maker.key else ())
            raise Problems(*(p.under(*parents) if p.path else p for p in problems))
        if role.module != "penstock.feed" or maker.target not in short_names(role).values():
            return maker
        # A source named in penstock.feed is made at once: it only describes data, opens nothing,
        # and says itself how a Job file says it.
        try:
            return cls(role, maker.make())
        except PenstockError as error:
            raise Problems(Problem(parents, error.message, hint=error.hint)) from error

    @classmethod
    def _read(cls, value: Any, role: Role, folder: str | None) -> Maker:
        folders = tuple(dict.fromkeys(os.path.abspath(path) for path in (folder or ".", ".")))
        if isinstance(value, str):
            return cls(role, _named(value, role, folders), {}, value, folders)
        if isinstance(value, functools.partial) and not value.args:
            return cls(role, value.func, dict(value.keywords))
        if not isinstance(value, Mapping):
            return cls(role, value)
        if len(value) != 1 or not isinstance(next(iter(value)), str):
            expected = f"one key, the name of the {role.noun}, with its keywords"
            raise Problems(Problem((), received(dict(value)), expected))
        ((name, keywords),) = value.items()
        keywords = {} if keywords is None else keywords
        if not isinstance(keywords, Mapping) or not all(isinstance(k, str) for k in keywords):
            raise Problems(Problem((name,), received(keywords), "keywords and their values"))
        try:
            target = _named(name, role, folders)
        except Problems as found:
            raise Problems(*(problem.under(name) for problem in found.problems)) from found
        return cls(role, target, dict(keywords), name, folders)

    @property
    def made(self) -> bool:
        """Whether `target` is the thing itself."""
        if inspect.isclass(self.target):
            return False
        if self.role.called:
            return True
        return not self.role.given and isinstance(self.target, locate(self.role.gives))

    @property
    def word(self) -> str:
        """A short name for people: `lenet`, `net` for `Net()`; empty for a lambda."""
        target = getattr(self.target, "func", self.target)
        if recipe := _recipe(target):
            name = recipe if isinstance(recipe, str) else next(iter(recipe))
            return name.rpartition(":")[2]
        name = getattr(target, "__name__", type(target).__name__)
        return "" if name == "<lambda>" else str(name).lower()

    @property
    def key(self) -> str:
        """What its keywords stand under: the name as it was said, or a short one."""
        return self.spelled or self.word

    def make(self, *args: Any) -> Any:
        """The thing itself.

        A loss is a function `(output, target) -> scalar`, which this gives and does not call. A
        module given ready-made is given as it is, with its own weights.

        Arguments:
            args: what the role gives by position: the parameters for an optimizer, the optimizer
                for a schedule, nothing for the others.

        Raises:
            NetworkError, DataError or JobError: making it raised, or gave another kind of thing.
        """
        if self.made:
            return functools.partial(self.target, **self.keywords) if self.keywords else self.target
        try:
            thing = self.target(*args, **self.keywords)
        except PenstockError:
            raise
        except Exception as error:
            raise self.role.error(
                f"{self.role.noun}: {self} could not be made: {type(error).__name__}: {error}"
            ) from error
        if self.role.gives and not isinstance(thing, locate(self.role.gives)):
            raise self.role.error(
                f"{self.role.noun}: {self} gave {label(thing)}, expected {self.role.wanted}"
            )
        return thing

    def describe(self) -> str | dict[str, Any] | None:
        """What a Job file says for it: a name, or `{name: keywords}`; None if it cannot say it."""
        if self.role == SOURCE and self.made:
            said: dict[str, Any] | None = self.target.describe()
            return said
        if (name := self._name()) is None or not _is_plain(dict(self.keywords)):
            return None
        if isinstance(name, str) and self.keywords:
            return {name: _plain(dict(self.keywords))}
        return name

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Maker) or self.role != other.role:
            return False
        if self.target is other.target:
            return bool(_plain(dict(self.keywords)) == _plain(dict(other.keywords)))
        said = self.describe() if self.role == SOURCE else None
        return said is not None and said == other.describe()

    def __hash__(self) -> int:
        return hash((self.role, self.word))

    def __str__(self) -> str:
        shown = self.spelled or label(self.target)
        words = ", ".join(f"{key}={value!r}" for key, value in self.keywords.items())
        return f"{shown}({words})" if words else shown

    def __repr__(self) -> str:
        return f"Maker({self})"

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker may not have the Job file's folder on its import path: what was said by name
        # is looked up there again.
        if self.spelled:
            return _found_again, (self.role, self.spelled, dict(self.keywords), self.folders)
        return Maker, (self.role, self.target, dict(self.keywords))

    def _name(self) -> str | dict[str, Any] | None:
        if recipe := _recipe(self.target):
            return recipe
        for name, value in short_names(self.role).items():
            if value is self.target:
                return name
        where = getattr(self.target, "__module__", None) or "__main__"
        name = f"{where}:{getattr(self.target, '__qualname__', '<no name>')}"
        if where != "__main__" and "<" not in name and self._finds(name):
            return name
        return self.spelled or None

    def _finds(self, name: str) -> bool:
        try:
            return locate(name, self.folders) is self.target
        except Problems:
            return False

    def _problems(self) -> list[Problem]:
        role, target = self.role, self.target
        for name, reason, hint in role.refused:
            if inspect.isclass(target) and issubclass(target, locate(name)):
                return [Problem((), f"{name.rpartition(':')[2]} {reason}", hint=hint)]
        called = inspect.isroutine(target) or isinstance(target, functools.partial)
        if inspect.isclass(target):
            fits = not role.gives or issubclass(target, locate(role.gives))
        else:
            fits = called or (self.made and (callable(target) or role != LOSS))
        if not fits:
            return [Problem((), received(target), role.wanted, _hint(target, role))]
        if not called and not inspect.isclass(target):
            return [Problem((key,), "unknown keyword", "no keywords") for key in self.keywords]
        return self._keyword_problems()

    def _keyword_problems(self) -> list[Problem]:
        role = self.role
        try:
            parameters = list(inspect.signature(self.target).parameters.values())
        except (TypeError, ValueError):  # some builtins do not tell
            return []
        kinds = {parameter.kind for parameter in parameters}
        num_given = 0 if role.called and inspect.isclass(self.target) else len(role.given)
        placed = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        if len(placed) < num_given and inspect.Parameter.VAR_POSITIONAL not in kinds:
            text = f"{label(self.target)} takes {len(placed)} arguments by position"
            return [Problem((), text, f"{num_given}: {', '.join(role.given)}")]
        taken = placed[:num_given]
        free = [
            p
            for p in parameters
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p not in taken
        ]
        names = [parameter.name for parameter in free]
        expected = f"one of: {', '.join(names)}" if names else "no keywords"
        problems = [
            Problem((key,), "unknown keyword", expected, did_you_mean(key, names))
            for key in self.keywords
            if key not in names and inspect.Parameter.VAR_KEYWORD not in kinds
        ]
        if role == CALLBACK and not inspect.isclass(self.target):
            return problems  # what the run calls it with is the run's affair
        word = self.spelled or getattr(self.target, "__name__", "...")
        form = f"{{{word}: {{%s: ...}}}}" if self.spelled else f"functools.partial({word}, %s=...)"
        return problems + [
            Problem((p.name,), "missing", hint=f"say {form % p.name}")
            for p in free
            if p.default is p.empty and p.name not in self.keywords
        ]


def locate(name: str, folders: tuple[str, ...] = ()) -> Any:
    """What `package.module:attribute.attribute` names.

    The part before the colon may end in attributes too: `penstock.zoo:lenet`, where `zoo` is an
    attribute of the package `penstock`.

    Arguments:
        name: of the thing; its module is imported.
        folders: first on the import path meanwhile.

    Raises:
        Problems: no such module or attribute, or importing it raised.
    """
    module_name, _, attributes = name.partition(":")
    parts = module_name.split(".")
    if not all(part.isidentifier() for part in [*parts, *attributes.split(".")]):
        raise Problems(Problem((), received(name), "package.module:name"))
    with _importable(folders):
        _refuse_other(parts[0], folders)
        for count in range(len(parts), 0, -1):
            prefix = ".".join(parts[:count])
            try:
                found: Any = importlib.import_module(prefix)
                break
            except ModuleNotFoundError as error:
                if not error.name or not f"{prefix}.".startswith(f"{error.name}."):
                    raise _import_failed(prefix, error) from error
            except (Exception, SystemExit) as error:
                raise _import_failed(prefix, error) from error
        else:
            hint = f"looked in {', '.join(folders)} and the installed packages" if folders else ""
            raise Problems(Problem((), f"there is no module {parts[0]!r}", hint=hint))
    for attribute in [*parts[count:], *attributes.split(".")]:
        if not hasattr(found, attribute):
            kind = "module" if inspect.ismodule(found) else "class"
            text = f"{kind} {getattr(found, '__name__', prefix)!r} has no {attribute!r}"
            raise Problems(Problem((), text, hint=did_you_mean(attribute, dir(found))))
        found = getattr(found, attribute)
    return found


def _import_failed(module: str, error: BaseException) -> Problems:
    return Problems(Problem((), f"importing {module} failed: {type(error).__name__}: {error}"))


@contextmanager
def _importable(folders: tuple[str, ...]) -> Iterator[None]:
    before = sys.path[:]
    sys.path[:0] = folders
    if folders:
        importlib.invalidate_caches()  # a file may be newer than the last look into its folder
    try:
        yield
    finally:
        sys.path[:] = before


def _refuse_other(top: str, folders: tuple[str, ...]) -> None:
    """Two Job files may each have a `network.py` beside them: one process cannot hold both."""
    file = getattr(sys.modules.get(top), "__file__", None)
    for folder in map(Path, folders):
        if file is None:
            return
        for mine in (folder / f"{top}.py", folder / top / "__init__.py"):
            if mine.exists() and not mine.samefile(file):
                hint = "rename one of them, or start a new process"
                text = f"module {top!r} was loaded from {file} and is not {mine}"
                raise Problems(Problem((), text, hint=hint))
            if mine.exists():
                return


def _named(name: str, role: Role, folders: tuple[str, ...]) -> Any:
    if ":" in name:
        return locate(name, folders)
    known = short_names(role)
    for short, thing in known.items():
        if fold(name) in (fold(short), fold(thing.__name__)):
            return thing
    if known:
        refused = [refusal[0].rpartition(":")[2] for refusal in role.refused]
        words = sorted(word for word, thing in known.items() if thing.__name__ not in refused)
        expected = f"one of: {', '.join(words)}, or package.module:name"
        hint = did_you_mean(name.lower(), words)
        raise Problems(Problem((), f"unknown {role.noun} {name!r}", expected, hint))
    module, _, attribute = name.rpartition(".")
    hint = f"did you mean '{module}:{attribute}'?" if module else ""
    raise Problems(Problem((), received(name), "package.module:name", hint))


def _hint(target: Any, role: Role) -> str:
    if role in (OPTIMIZER, SCHEDULE):
        return f"give a class, or functools.partial(..., lr=...): the job makes its own {role.noun}"
    if role == NETWORK and inspect.isclass(target):
        return "a network is a subclass of torch.nn.Module"
    if role != SOURCE:
        return ""
    if isinstance(target, locate("torch.utils.data:DataLoader")):
        return "feed.dataset(loader.dataset): the job makes its own batches"
    if isinstance(target, locate("torch.utils.data:Dataset")):
        return "feed.dataset(...) makes a Source of a torch Dataset"
    if isinstance(target, (tuple, list)) or hasattr(target, "shape"):
        return "feed.arrays(x, y) makes a Source of numpy arrays or tensors"
    return "feed.arrays, feed.dataset, feed.parquet, feed.images and others make Sources"


def _recipe(target: Any) -> str | dict[str, Any] | None:
    """The mark of a function of the zoo, or of a module that it made."""
    recipe: str | dict[str, Any] | None = getattr(target, "__dict__", {}).get("penstock_recipe")
    return recipe


def _is_plain(value: Any) -> bool:
    """Whether YAML can say it, and reading it gives it again (a tuple becomes a list)."""
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(type(key) is str and _is_plain(item) for key, item in value.items())
    return type(value) in (str, int, float, bool, type(None))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _found_again(
    role: Role, name: str, keywords: dict[str, Any], folders: tuple[str, ...]
) -> Maker:
    return Maker(role, _named(name, role, folders), keywords, name, folders)
