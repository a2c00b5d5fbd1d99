"""What cluster nodes lack is shipped: the code always, the whole environment on request.

`pack_code` and `unpack_code`: Penstock and the user's own modules, as one archive named by its
content. `pack_environment`: this interpreter's environment, for `spark.archives`.

`unpack_code` runs on nodes that may not have Penstock yet: it is sent by value, and leans on
nothing but the standard library, imported inside. The records are named tuples since dataclasses
cannot be made where this source runs under a name that is no module's.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.machinery
import importlib.metadata
import importlib.util
import io
import os
import re
import sys
import sysconfig
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from penstock.cluster.node import size
from penstock.errors import JobError, TransportError

CODE_BYTES = 64 * 10**6
"""The most that is shipped as code: it goes with every task."""
DATA_FILE_BYTES = 4 * 10**6
"""The largest data file in a user's package that is taken for a part of its code."""
PACKING_S = 1800.0
"""How long another run may take to pack the same environment."""
PROGRESS_S = 5.0

_NOT_THE_USERS = re.compile(
    r"penstock|__main__|__mp_main__|pyspark|py4j|_?pydev.*|debugpy|sitecustomize|usercustomize"
)
_SKIPPED_FOLDERS = {"__pycache__", "node_modules", "runs"}
_COMPILED = tuple(importlib.machinery.EXTENSION_SUFFIXES)
_SUFFIXES = tuple(sorted(importlib.machinery.all_suffixes(), key=len, reverse=True))


class Code(NamedTuple):
    """Penstock and the user's modules, to be shipped.

    Arguments:
        data: a zip archive; the same files give the same bytes.
        digest: its SHA-256, hexadecimal.
        names: the user's top-level modules and packages in it.
        compiled: files in it that only run on the driver's platform.
        left_out: what of the user's code is not in it, each with the reason.
    """

    data: bytes
    digest: str
    names: tuple[str, ...]
    compiled: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


def pack_code(extra_modules: Iterable[str] = ()) -> Code:
    """Packs Penstock and every imported module that is the user's own.

    A module is the user's own if it lies neither in the standard library nor in a site-packages:
    editable installs are. A package goes whole, with its small data files, and so does each of
    a namespace package's folders; a compiled module goes as its file.

    Arguments:
        extra_modules: further ones by name, wherever they lie: such as are imported only later, or
            installed here but not on the nodes.

    Raises:
        JobError: an extra module is not found, two files would have one name, or the code is
            larger than `CODE_BYTES`; names the files.
    """
    import penstock

    files: dict[str, Path] = {}
    left_out: list[str] = []
    for top, place in _modules(extra_modules):
        for name, path in _files(top, place, left_out):
            if name in files:
                raise JobError(
                    f"two files of your code would both be {name} on the nodes: "
                    f"{files[name]} and {path}",
                    hint="rename one of them, or take one off sys.path",
                )
            files[name] = path
    sizes = {name: path.stat().st_size for name, path in files.items()}
    if sum(sizes.values()) > CODE_BYTES:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
        raise JobError(
            f"your code is {size(sum(sizes.values()))} in {len(sizes):,} files, more than the "
            f"{size(CODE_BYTES)} that go with each task; the largest are "
            + ", ".join(f"{files[name]} ({size(sizes[name])})" for name in largest),
            hint="move data out of the package's folder, install the package on the nodes, or "
            "ship the whole environment",
        )
    names = sorted({re.split(r"[/.]", name)[0] for name in files})
    compiled = sorted(name for name in files if name.endswith(_COMPILED))
    files |= dict(_files("penstock", Path(str(penstock.__file__)).parent, left_out))
    files |= _metadata()

    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in sorted(files):
            # An entry is of 1980 and of no one's: the same code gives the same bytes.
            entry = zipfile.ZipInfo(name)
            archive.writestr(entry, files[name].read_bytes(), zipfile.ZIP_DEFLATED)
    data = stream.getvalue()
    digest = hashlib.sha256(data).hexdigest()
    return Code(data, digest, tuple(names), tuple(compiled), tuple(sorted(left_out)))


def _modules(extra: Iterable[str]) -> Iterator[tuple[str, Path]]:
    """Top-level modules of the user's by name, each with its file or its folders."""
    wanted = {name.partition(".")[0] for name in extra}
    for top in sorted(wanted):
        spec = importlib.util.find_spec(top)
        places = _places(spec.origin, spec.submodule_search_locations) if spec else []
        if not places:
            raise JobError(
                f"extra module {top!r}: no file or folder of that name on this driver's sys.path",
                hint="give the name that `import` takes, and put its folder on PYTHONPATH",
            )
        yield from ((top, place) for place in places)
    for top in sorted({name.partition(".")[0] for name in list(sys.modules)} - wanted):
        if not _NOT_THE_USERS.fullmatch(top):
            module = getattr(sys.modules.get(top), "__dict__", {})  # others are made when asked for
            for place in _places(module.get("__file__"), module.get("__path__")):
                if not _is_library(place):
                    yield top, place


def _places(file: object, folders: object) -> list[Path]:
    """A package's folders, or a module's file; only what is a path, there or not."""
    found: list[object] = []
    if isinstance(folders, Iterable) and not isinstance(folders, str):
        found += folders
    # Import hooks put names of their own into __path__; built-in modules come from nowhere.
    return [Path(path) for path in found or [file] if isinstance(path, str) and os.path.isabs(path)]


def _is_library(path: Path) -> bool:
    """Whether it belongs to Python, or to what was installed for it."""
    folders = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
    for form in (path, path.resolve()):
        if {"site-packages", "dist-packages"} & set(form.parts):
            return True
        if any(form.is_relative_to(f) or form.is_relative_to(Path(f).resolve()) for f in folders):
            return True
    return False


def _files(name: str, place: Path, left_out: list[str]) -> Iterator[tuple[str, Path]]:
    """Names in the archive and paths of what lies at `place`.

    Arguments:
        name: of the module there.
        left_out: takes what is not shipped, with the reason.
    """
    if not place.is_dir():
        suffix = next((s for s in _SUFFIXES if place.name.endswith(s)), "")
        if place.is_file() and suffix:
            yield name + suffix, place
        else:
            left_out.append(f"{name} ({place} is no module's file: a zip's, or gone)")
        return
    for root, folders, files in os.walk(place):
        folders[:] = sorted(f for f in folders if not _skipped(Path(root, f)))
        links = [f for f in folders if os.path.islink(os.path.join(root, f))]
        for file in sorted([*files, *links]):
            path = Path(root, file)
            inside = f"{name}/{path.relative_to(place).as_posix()}"
            if file.startswith("."):
                continue
            elif not path.is_file() or not os.access(path, os.R_OK):
                left_out.append(f"{inside} (not a readable file)")
            elif path.stat().st_size > DATA_FILE_BYTES and not file.endswith(_SUFFIXES):
                left_out.append(f"{inside} (data, {size(path.stat().st_size)})")
            else:
                yield inside, path


def _skipped(folder: Path) -> bool:
    hidden = folder.name.startswith(".") or folder.name in _SKIPPED_FOLDERS
    return hidden or (folder / "pyvenv.cfg").exists()


def _metadata() -> dict[str, Path]:
    """Penstock's own metadata, by which nodes know what it requires."""
    try:
        files = importlib.metadata.files("penstock") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    return {f.as_posix(): Path(str(f.locate())) for f in files if f.name == "METADATA"}


def unpack_code(data: bytes, digest: str, folder: str | None = None) -> str:
    """Unpacks shipped code on a node, once for each user; runs there without Penstock.

    What has not been used for 7 days is removed, unless a process that called this still lives.

    Arguments:
        data, digest: of `Code`.
        folder: for the unpacked code, in place of the user's cache.

    Returns:
        The folder to put on sys.path.

    Raises:
        ValueError: the data are not what the digest says.
        OSError: no folder can be written.
    """
    import contextlib
    import fcntl
    import hashlib
    import io
    import os
    import shutil
    import stat
    import tempfile
    import time
    import zipfile

    keep_s = 7 * 86400.0
    wait_s = 60.0
    marker = ".unpacked"  # its time is that of the last use

    def whole(place: str) -> bool:
        try:
            os.stat(os.path.join(place, marker))
            # Temporary folders are tidied by age, file by file.
            return all(
                os.path.getsize(os.path.join(place, entry.filename)) == entry.file_size
                for entry in archive.infolist()
            )
        except OSError:
            return False

    def lock(file: int, place: str) -> None:
        give_up = time.monotonic() + wait_s
        while True:
            try:
                return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > give_up:
                    message = f"{place}: another agent has unpacked for {wait_s:.0f} s"
                    raise TimeoutError(message) from None
                time.sleep(0.02)
            except OSError:  # a filesystem without locks: renames alone have to do
                return None

    def hold(place: str) -> None:
        # A shared lock until this process ends, once for each folder: workers that start after
        # a week still find their code.
        used = os.path.realpath(os.path.join(place, marker))
        os.utime(used)
        with contextlib.suppress(OSError):
            held = []
            for number in os.listdir("/proc/self/fd"):
                with contextlib.suppress(OSError):
                    held.append(os.readlink(f"/proc/self/fd/{number}"))
            if used not in held:
                fcntl.flock(os.open(used, os.O_RDWR), fcntl.LOCK_SH | fcntl.LOCK_NB)

    def sweep(cache: str) -> None:
        for name in os.listdir(cache):
            old, used = os.path.join(cache, name), os.path.join(cache, name, marker)
            with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
                seen = os.stat(used if os.path.exists(used) else old).st_mtime
                if not name.startswith("code-") or time.time() - seen < keep_s:
                    continue
                if os.path.exists(used):
                    file = stack.enter_context(open(used, "r+b"))
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(old)

    def unpack(cache: str) -> str:
        os.makedirs(os.path.dirname(cache), exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.mkdir(cache, 0o700)
        about = os.lstat(cache)
        if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.geteuid():
            raise PermissionError(f"{cache}: not a folder of this user's own")
        os.chmod(cache, 0o700)
        place = os.path.join(cache, f"code-{digest}")
        with open(os.path.join(cache, "lock"), "wb") as file:
            lock(file.fileno(), cache)
            if not whole(place):
                with tempfile.TemporaryDirectory(
                    prefix="code-unpacking-", dir=cache, ignore_cleanup_errors=True
                ) as new:
                    archive.extractall(os.path.join(new, "new"))
                    open(os.path.join(new, "new", marker), "wb").close()
                    with contextlib.suppress(FileNotFoundError):
                        os.rename(place, os.path.join(new, "damaged"))
                    try:
                        os.rename(os.path.join(new, "new"), place)
                    except OSError:
                        if not whole(place):  # else another agent was faster, without a lock
                            raise
            hold(place)
            sweep(cache)
        return place

    found = hashlib.sha256(data).hexdigest()
    if found != digest:
        raise ValueError(
            f"the shipped code has the digest {found[:12]} where {digest[:12]} was sent: it was "
            f"damaged on its way ({len(data):,} bytes came)\n  hint: run again"
        )
    if folder is not None:
        caches = [os.path.abspath(folder)]
    else:
        homes = [os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache")]
        caches = [os.path.join(home, "penstock") for home in homes if os.path.isabs(home)]
        # Other users share the temporary folder.
        caches.append(os.path.join(tempfile.gettempdir(), f"penstock-{os.geteuid()}"))
    refused = []
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for cache in caches:
            try:
                return unpack(cache)
            except OSError as error:  # no home, not writable, full
                refused.append(str(error))
    raise OSError(
        f"the shipped code can be unpacked nowhere: {'; '.join(refused)}\n  hint: let "
        "spark.executorEnv.XDG_CACHE_HOME name a folder that the executors' user can write"
    )


def environment_file(cache: str | Path) -> Path:
    """Where `pack_environment` puts, or has put, this interpreter's environment.

    Its name is made of what is installed: names and versions of all distributions that are not
    editable, and the Python and platform.

    Raises:
        JobError: this interpreter's environment cannot be shipped.
    """
    prefix = Path(sys.prefix)
    conda = sorted(path.stem for path in (prefix / "conda-meta").glob("*.json"))
    if sys.prefix == sys.base_prefix and not conda:
        raise JobError(
            f"this is the system's own Python ({sys.executable}): there is no environment to ship",
            hint="python -m venv ENVIRONMENT, install the packages there and run from it; or "
            "install them on the nodes",
        )
    with contextlib.suppress(FileNotFoundError):
        settings = (prefix / "pyvenv.cfg").read_text()
        if re.search(r"(?im)^include-system-site-packages\s*=\s*true", settings):
            raise JobError(
                f"{prefix / 'pyvenv.cfg'} includes the system's packages: the environment that "
                "would be shipped is not whole",
                hint="make it without --system-site-packages and install all packages in it",
            )
    installed = (f"{d.name}=={d.version}" for d in _distributions() if not _is_editable(d))
    lock = [sys.version, sysconfig.get_platform(), sys.base_prefix, *conda, *sorted(installed)]
    digest = hashlib.sha256("\n".join(lock).encode()).hexdigest()[:16]
    return Path(cache) / f"environment-{digest}.tar.gz"


def pack_environment(cache: str | Path, progress: Callable[[str], None] | None = None) -> Path:
    """Packs this interpreter's environment, a venv or of conda, unless it was packed before.

    For `spark.archives=PATH#environment` and `spark.pyspark.python=./environment/bin/python`. A
    venv's Python is a link: nodes need the base Python at the same path. Editable installs are
    not in it (`pack_code` ships them), nor scripts that name the environment's path.

    Arguments:
        cache: folder for packed environments.
        progress: is told in words how far it is.

    Returns:
        The archive, tar.gz.

    Raises:
        JobError: this interpreter's environment cannot be shipped, or not be written to `cache`.
        TransportError: another run packs it, for longer than `PACKING_S`.
    """
    file, tell = environment_file(cache), progress or (lambda words: None)
    partial = file.with_suffix(".partial")
    if file.exists():
        return file
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file.with_suffix(".lock"), "wb") as lock:
            _wait_for(lock, file, tell)
            if not file.exists():
                try:
                    _write(partial, tell)
                    os.replace(partial, file)
                finally:
                    partial.unlink(missing_ok=True)
    except OSError as error:
        raise JobError(
            f"the environment {sys.prefix} cannot be packed into {file}: {error}",
            hint="choose another folder for it, or free space there",
        ) from error
    return file


def _wait_for(lock: IO[bytes], file: Path, tell: Callable[[str], None]) -> None:
    give_up, told = time.monotonic() + PACKING_S, False
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > give_up:
                raise TransportError(
                    f"{file}: another run has been packing it for {PACKING_S:.0f} s",
                    hint=f"end that run; `fuser {lock.name}` names it",
                ) from None
            if not told:
                tell("another run packs the environment: waiting for it")
                told = True
            time.sleep(0.1)


def _write(partial: Path, tell: Callable[[str], None]) -> None:
    members = [*_members(partial.parent.resolve())]
    total, done = sum(path.lstat().st_size for path in members), 0
    tell(f"packing the environment {sys.prefix}: {size(total)}")
    told = time.monotonic()
    # The lowest level: torch is large, and little of it is text.
    with tarfile.open(partial, "w:gz", compresslevel=1) as tar:
        for path in members:
            _add(tar, path)
            done += path.lstat().st_size
            if time.monotonic() - told > PROGRESS_S:
                told = time.monotonic()
                tell(f"packing the environment: {size(done)} of {size(total)}")
    tell(f"packed the environment: {size(partial.stat().st_size)}")


def _members(cache: Path) -> Iterator[Path]:
    """The environment's files and links, sorted."""
    prefix = Path(sys.prefix)
    editable = {
        os.path.realpath(str(file.locate()))
        for distribution in _distributions()
        if _is_editable(distribution)
        for file in distribution.files or ()
    }
    for root, folders, files in os.walk(prefix):
        folders[:] = sorted(
            f for f in folders if f != "__pycache__" and Path(root, f).resolve() != cache
        )
        links = [f for f in folders if os.path.islink(os.path.join(root, f))]
        for path in (Path(root, name) for name in sorted([*links, *files])):
            script = path.parent == prefix / "bin" and _names_prefix(path)
            if os.path.realpath(path) not in editable and not script:
                yield path


def _names_prefix(script: Path) -> bool:
    """Whether a program would run the environment where it lies now."""
    if not script.is_file() or script.is_symlink():
        return False
    with open(script, "rb") as file:
        head = file.read(512)
    return head.startswith(b"#!") and os.fsencode(sys.prefix) in head


def _add(tar: tarfile.TarFile, path: Path) -> None:
    prefix = Path(sys.prefix)
    info = tar.gettarinfo(path, path.relative_to(prefix).as_posix())
    if info is not None and info.issym():
        target = Path(os.path.normpath(path.parent / os.readlink(path)))
        if target.is_relative_to(prefix):
            info.linkname = os.path.relpath(target, path.parent)
        elif path.parent != prefix / "bin" and target.is_file():  # into an installer's cache
            path = path.resolve()
            info = tar.gettarinfo(path, info.name)
    if info is None or not (info.isreg() or info.issym() or info.islnk()):
        return
    info.uid = info.gid = 0  # the driver's user is nobody on the nodes
    info.uname = info.gname = ""
    if info.isreg():
        with open(path, "rb") as file:
            tar.addfile(info, file)
    else:
        tar.addfile(info)


def _distributions() -> list[importlib.metadata.Distribution]:
    """What is installed in this environment."""
    folders = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    return [*importlib.metadata.distributions(path=sorted(folders))]


def _is_editable(distribution: importlib.metadata.Distribution) -> bool:
    return (
        re.search(r'"editable":\s*true', distribution.read_text("direct_url.json") or "")
        is not None
    )


def words(code: Code, environment: Path | None = None) -> str:
    """What is shipped, in one line.

    Arguments:
        environment: `environment_file`, where the whole environment is shipped.
    """
    mine = len(code.names)
    yours = f" and {mine} module{'s' * (mine != 1)} of yours" if mine else ""
    line = f"ships penstock{yours} ({size(len(code.data))})"
    if code.left_out:
        more = f" and {len(code.left_out) - 2} more" if len(code.left_out) > 2 else ""
        line += f", without {', '.join(code.left_out[:2])}{more}"
    if environment is None:
        return f"{line}; the nodes' own Python has the rest"
    packed = "it is packed first"
    if environment.exists():
        packed = f"{size(environment.stat().st_size)}, packed before"
    line += f"; ships the whole environment ({packed})"
    if sys.prefix != sys.base_prefix:
        line += f", whose base Python the nodes have at {sys.base_prefix}"
    return line
