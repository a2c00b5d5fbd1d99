"""What is shipped to nodes: code, the whole environment, and what a node is found to lack."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import textwrap
import time
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cloudpickle
import pytest

import penstock
from penstock.cluster.bootstrap import by_value
from penstock.cluster.environment import (
    Code,
    pack_code,
    unpack_code,
    words,
)
from penstock.cluster.node import Facts, Problem, facts, problems
from penstock.errors import JobError

SOURCE = Path(penstock.__file__).parent.parent
GIB = 1 << 30
COMPILED = sysconfig.get_config_var("EXT_SUFFIX")


def lay(root: Path, files: Mapping[str, str | bytes]) -> Path:
    """A made-up folder of these files."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        data = content if isinstance(content, bytes) else textwrap.dedent(content).encode()
        (root / name).write_bytes(data)
    return root


def run(
    python: str | Path, code: str, *options: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs code in a Python of its own, with no more variables than these."""
    return subprocess.run(
        [python, *options, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": os.environ["PATH"], **variables},
        check=False,
    )


def packed(*folders: Path, code: str, extra: tuple[str, ...] = ()) -> Code:
    """What a driver packs that has run `code` with these folders on its path."""
    done = run(
        sys.executable,
        f"""
        {code}
        import pickle, sys
        from penstock.cluster.environment import pack_code
        from penstock.errors import JobError
        try:
            packed = tuple(pack_code({extra!r}))
        except JobError as error:
            packed = error
        sys.stdout.buffer.write(pickle.dumps(packed).hex().encode())
        """,
        PYTHONPATH=os.pathsep.join(map(str, [*folders, SOURCE])),
    )
    assert done.returncode == 0, done.stderr
    found = cloudpickle.loads(bytes.fromhex(done.stdout))
    if isinstance(found, JobError):
        raise found
    return Code(*found)


def entries(code: Code) -> dict[str, bytes]:
    """What is in the archive beside Penstock, by name."""
    with zipfile.ZipFile(io.BytesIO(code.data)) as archive:
        names = [name for name in archive.namelist() if not name.startswith("penstock")]
        return {name: archive.read(name) for name in names}


@pytest.fixture(scope="module")
def code() -> Code:
    return Code(*packed(code="pass"))


# Packing code


def test_penstock_is_shipped_whole(code: Code) -> None:
    with zipfile.ZipFile(io.BytesIO(code.data)) as archive:
        names = set(archive.namelist())
        assert archive.read("penstock/errors.py") == (SOURCE / "penstock/errors.py").read_bytes()
    here = {
        path.relative_to(SOURCE).as_posix()
        for path in (SOURCE / "penstock").rglob("*")
        if path.is_file() and path.parent.name != "__pycache__"
    }
    assert {name for name in names if name.startswith("penstock/")} == here
    assert "penstock/feed/mnist/train-images-idx3-ubyte.gz" in here
    assert [name for name in names - here if not name.endswith(".dist-info/METADATA")] == []
    assert (code.names, code.compiled, code.left_out) == ((), (), ())
    assert len(code.digest) == 64


def test_the_users_modules_are_found_and_libraries_are_not(tmp_path: Path) -> None:
    project = lay(
        tmp_path / "project",
        {
            "single.py": "import nets.deep.layers, numpy, yaml\n",
            "nets/__init__.py": "",
            "nets/deep/__init__.py": "",
            "nets/deep/layers.py": "x = 1\n",
            "nets/not_imported.py": "",
            "nets/vocabulary.json": "{}",
            "nets/.secret/key.txt": "no",
            "nets/.hidden": "no",
            "nets/__pycache__/layers.pyc": "no",
            "nets/without_source.pyc": "",
            "nets/runs/1/result.json": "no",
            "nets/node_modules/a.js": "no",
            "nets/env/pyvenv.cfg": "no",
            "nets/env/lib/a.py": "no",
            "unused.py": "",
            "later.py": "",
        },
    )
    libraries = lay(tmp_path / "lib/python3/site-packages", {"installed.py": ""})
    code = packed(project, libraries, code="import single, installed", extra=("later",))
    assert sorted(entries(code)) == [
        "later.py",
        "nets/__init__.py",
        "nets/deep/__init__.py",
        "nets/deep/layers.py",
        "nets/not_imported.py",
        "nets/vocabulary.json",
        "nets/without_source.pyc",
        "single.py",
    ]
    assert code.names == ("later", "nets", "single")
    assert packed(project, libraries, code="import installed", extra=("installed",)).names == (
        "installed",
    )


def test_the_same_code_gives_the_same_bytes(tmp_path: Path) -> None:
    project = lay(tmp_path, {"one.py": "x = 1\n", "two.py": "", "sub/__init__.py": ""})
    first = packed(project, code="import one, two, sub")
    for path in project.rglob("*.py"):
        os.utime(path, (1e9, 1e9))
        path.chmod(0o755)
    assert packed(project, code="import sub, two, one") == first
    (project / "one.py").write_text("x = 2\n")
    assert packed(project, code="import one, two, sub").digest != first.digest


def test_main_goes_by_value_and_a_module_by_the_name_it_is_imported_by(tmp_path: Path) -> None:
    project = lay(tmp_path, {"some-file.py": "x = 1\n", "sitecustomize.py": "", "py4j.py": ""})
    load = (
        "import sys, py4j; from importlib import util; spec = util.spec_from_file_location("
        f"'named', {str(project / 'some-file.py')!r}); m = util.module_from_spec(spec); "
        "spec.loader.exec_module(m); sys.modules['named'] = m"
    )
    assert entries(packed(project, code=load)) == {"named.py": b"x = 1\n"}


def test_namespace_packages_go_with_all_their_folders(tmp_path: Path) -> None:
    one = lay(tmp_path / "one", {"team/a.py": "import team.b\n"})
    two = lay(tmp_path / "two", {"team/b.py": ""})
    installed = lay(tmp_path / "site-packages", {"team/c.py": ""})
    code = packed(one, two, installed, code="import team.a, team.c")
    assert sorted(entries(code)) == ["team/a.py", "team/b.py"]
    (two / "team/a.py").write_text("")
    with pytest.raises(JobError, match=r"both be team/a\.py on the nodes: .*one.*two") as error:
        packed(one, two, code="import team.a")
    assert "rename" in error.value.hint


def test_compiled_modules_go_as_their_files(tmp_path: Path) -> None:
    # A real one of the standard library's, under a name of its own. (Debian's Python has some
    # within itself.)
    files = [Path(p) / f"{name}{COMPILED}" for p in sys.path for name in ("_heapq", "_bz2")]
    file = next(file for file in files if file.exists())
    module = file.name.removesuffix(COMPILED)
    project = lay(tmp_path, {file.name: file.read_bytes(), "fast/__init__.py": ""})
    shutil.copy(project / file.name, project / "fast" / file.name)
    load = (
        f"import sys; sys.modules.pop({module!r}, None); "
        f"sys.path.insert(0, {str(project)!r}); import fast, fast.{module}, {module}"
    )
    code = packed(project, code=load)
    assert code.compiled == (file.name, f"fast/{file.name}")
    assert entries(code)[file.name] == file.read_bytes()


def test_what_is_not_code_is_left_out_and_said(tmp_path: Path) -> None:
    project = lay(
        tmp_path / "project",
        {"nets/__init__.py": "", "nets/weights.bin": bytes(5 * 10**6), "elsewhere/a.py": ""},
    )
    (project / "nets/linked").symlink_to(project / "elsewhere")
    (project / "nets/broken.txt").symlink_to(project / "nowhere")
    with zipfile.ZipFile(tmp_path / "zipped.zip", "w") as archive:
        archive.writestr("zipped.py", "")
    code = packed(project, tmp_path / "zipped.zip", code="import nets, zipped")
    assert list(entries(code)) == ["nets/__init__.py"]
    assert code.names == ("nets",)
    assert [name.partition(" (")[0] for name in code.left_out] == [
        "nets/broken.txt",
        "nets/linked",
        "nets/weights.bin",
        "zipped",
    ]
    assert "data, 5 MB" in code.left_out[2]
    assert "zipped.zip" in code.left_out[3]
    assert "nets/broken.txt (not a readable file), nets/linked" in words(code)
    assert "and 2 more" in words(code)


def test_too_much_code_names_the_largest_files_and_the_way_out(tmp_path: Path) -> None:
    project = lay(tmp_path, {"nets/__init__.py": "", "nets/small.txt": "x"})
    sizes = {"a": 30, "b": 20, "c": 14, "d": 1}  # MB
    for name, megabytes in sizes.items():
        with open(project / "nets" / f"{name}.py", "wb") as file:
            file.truncate(megabytes * 10**6)
    with pytest.raises(JobError, match=r"65 MB in 6 files.*64 MB") as error:
        packed(project, code="import nets")
    assert re.findall(r"nets/(\w+)\.py \((\d+ MB)\)", error.value.message) == [
        ("a", "30 MB"),
        ("b", "20 MB"),
        ("c", "14 MB"),
    ]
    assert "whole environment" in error.value.hint


def test_an_extra_module_that_is_nowhere() -> None:
    for name in ("no_such_module", "sys"):
        with pytest.raises(JobError, match=name) as error:
            pack_code([name])
        assert error.value.hint


# Unpacking it on a node


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A folder for a node's sys.path that has cloudpickle only, as Spark's Python workers do."""
    origin = importlib.util.find_spec("cloudpickle")
    assert origin is not None
    assert origin.origin is not None
    shutil.copytree(Path(origin.origin).parent, tmp_path / "bare/cloudpickle")
    return tmp_path / "bare"


def on_node(bare: Path, code: str, **variables: str) -> list[str]:
    """What a Python prints that has the standard library and cloudpickle alone."""
    code = f"""
import sys
sys.path.append({str(bare)!r})
import importlib.util, pickle
assert importlib.util.find_spec("penstock") is None
assert importlib.util.find_spec("torch") is None
{textwrap.dedent(code)}"""
    done = run(sys.executable, code, "-I", "-S", **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_shipped_code_runs_on_a_node_without_penstock(tmp_path: Path, bare: Path) -> None:
    project = lay(tmp_path / "project", {"nets/__init__.py": "", "nets/a.py": "x = 7\n"})
    code = packed(project, code="import nets")
    unpack = by_value("penstock.cluster.environment", "unpack_code")
    gather = by_value("penstock.cluster.node", "facts")
    shipped = lay(tmp_path, {"shipped": cloudpickle.dumps((unpack, gather, *code[:2]))})
    folder, version, known = on_node(
        bare,
        f"""
        unpack, gather, data, digest = pickle.load(open({str(shipped / "shipped")!r}, "rb"))
        before = gather()
        folder = unpack(data, digest)
        sys.path.insert(0, folder)
        from nets.a import x
        from penstock.errors import JobError
        from penstock.cluster.node import facts
        assert sys.modules["penstock"].__file__.startswith(folder)
        after = facts()
        assert before["packages"] == after["packages"], (before, after)
        print(folder)
        print(before["python"])
        print(x, before["packages"]["torch"], before["packages"]["cloudpickle"])
        """,
        XDG_CACHE_HOME=str(tmp_path / "cache"),
    )
    assert folder == str(tmp_path / "cache/penstock" / f"code-{code.digest}")
    assert version == ".".join(map(str, sys.version_info[:3]))
    assert known == "7 None unknown"


def test_agents_of_a_node_unpack_at_once(tmp_path: Path, bare: Path, code: Code) -> None:
    unpack = by_value("penstock.cluster.environment", "unpack_code")
    shipped = lay(tmp_path, {"shipped": cloudpickle.dumps((unpack, *code[:2]))})
    printed = on_node(
        bare,
        f"""
        import os
        unpack, data, digest = pickle.load(open({str(shipped / "shipped")!r}, "rb"))
        pids = []
        for _ in range(6):
            pids.append(os.fork())
            if not pids[-1]:
                try:
                    folder = unpack(data, digest, {str(tmp_path / "cache")!r})
                    ok = os.path.exists(folder + "/penstock/errors.py")
                finally:
                    os._exit(0 if ok else 1)
        print([os.waitpid(pid, 0)[1] for pid in pids])
        """,
    )
    assert printed == ["[0, 0, 0, 0, 0, 0]"]
    assert sorted(os.listdir(tmp_path / "cache")) == [f"code-{code.digest}", "lock"]


def test_code_is_unpacked_once_into_the_users_own_folder(tmp_path: Path, code: Code) -> None:
    cache = tmp_path / "cache"
    place = Path(unpack_code(*code[:2], str(cache)))
    assert cache.stat().st_mode & 0o777 == 0o700
    inode = (place / "penstock/errors.py").stat().st_ino
    cache.chmod(0o755)
    descriptors = len(os.listdir("/proc/self/fd"))
    assert Path(unpack_code(*code[:2], str(cache))) == place
    assert (place / "penstock/errors.py").stat().st_ino == inode
    assert cache.stat().st_mode & 0o777 == 0o700
    assert len(os.listdir("/proc/self/fd")) == descriptors


@pytest.mark.parametrize("lost", [".unpacked", "penstock/errors.py"])
def test_a_damaged_cache_is_made_anew(tmp_path: Path, code: Code, lost: str) -> None:
    place = Path(unpack_code(*code[:2], str(tmp_path / "cache")))
    (place / "penstock/spec.py").write_bytes(b"#" * (place / "penstock/spec.py").stat().st_size)
    (place / lost).unlink()
    assert Path(unpack_code(*code[:2], str(tmp_path / "cache"))) == place
    for name in ("errors.py", "spec.py"):
        assert (place / "penstock" / name).read_bytes() == (SOURCE / "penstock" / name).read_bytes()
    assert len(os.listdir(tmp_path / "cache")) == 2


def test_an_agent_waits_for_another_that_unpacks(tmp_path: Path, code: Code) -> None:
    cache = Path(unpack_code(*code[:2], str(tmp_path / "cache"))).parent
    place = cache / f"code-{code.digest}"
    (place / ".unpacked").unlink()
    with ThreadPoolExecutor() as pool:
        with open(cache / "lock", "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            waiting = pool.submit(unpack_code, *code[:2], str(cache))
            with pytest.raises(TimeoutError):
                waiting.result(0.2)
            assert not (place / ".unpacked").exists()
        assert waiting.result(10) == str(place)
    assert (place / ".unpacked").exists()


def test_damaged_data_are_refused(tmp_path: Path, code: Code) -> None:
    with pytest.raises(ValueError, match=r"damaged on its way \(\d"):
        unpack_code(code.data[:-1] + b"x", code.digest, str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_a_folder_of_another_user_is_refused(tmp_path: Path, code: Code) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "cache").symlink_to(tmp_path / "theirs")
    with pytest.raises(OSError, match="not a folder of this user's own") as error:
        unpack_code(*code[:2], str(tmp_path / "cache"))
    assert "XDG_CACHE_HOME" in str(error.value)
    if os.geteuid() == 0:
        os.chown(tmp_path / "theirs", 12345, 12345)
        with pytest.raises(OSError, match="not a folder of this user's own"):
            unpack_code(*code[:2], str(tmp_path / "theirs"))
    assert os.listdir(tmp_path / "theirs") == []


def test_without_a_home_the_temporary_folder_serves(
    tmp_path: Path, code: Code, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/no")
    monkeypatch.setenv("HOME", "/dev/null")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    place = Path(unpack_code(*code[:2]))
    assert place.parent == tmp_path / f"penstock-{os.geteuid()}"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert Path(unpack_code(*code[:2])).parent == tmp_path / "home/.cache/penstock"


def test_code_that_nobody_uses_is_removed_after_a_week(tmp_path: Path, code: Code) -> None:
    cache = tmp_path / "cache"
    held = Path(unpack_code(*code[:2], str(cache)))
    week_s = 7 * 86400
    for name, age_s in {
        "old": week_s + 60,
        "young": week_s - 60,
        "unpacking-x": week_s + 60,
    }.items():
        lay(cache / f"code-{name}", {} if "-" in name else {".unpacked": ""})
        (cache / f"code-{name}").mkdir(exist_ok=True)
        for path in (*(cache / f"code-{name}").iterdir(), cache / f"code-{name}"):
            os.utime(path, (time.time() - age_s,) * 2)
    lay(cache, {"other/.unpacked": ""})
    os.utime(cache / "other/.unpacked", (0, 0))
    os.utime(held / ".unpacked", (0, 0))
    second = io.BytesIO()
    with zipfile.ZipFile(second, "w") as archive:
        archive.writestr("a.py", "")
    other = Code(second.getvalue(), hashlib.sha256(second.getvalue()).hexdigest(), ())
    unpack_code(*other[:2], str(cache))
    kept = {f"code-{code.digest}", f"code-{other.digest}", "code-young", "other", "lock"}
    assert set(os.listdir(cache)) == kept


# The whole environment


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A venv with a package, an editable install, and what is not to be shipped."""
    folder = tmp_path_factory.mktemp("made") / "venv"
    base = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    subprocess.run([base, "-m", "venv", "--without-pip", folder], check=True, timeout=60)
    site = next((folder / "lib").glob("python*/site-packages"))
    lay(
        folder,
        {
            "bin/tool": f"#!{folder}/bin/python\n",
            "bin/shell": "#!/bin/sh\n",
            "installer/linked.txt": "shared",
        },
    )
    shutil.move(folder / "installer", folder.parent / "installer")
    lay(
        site,
        {
            "tiny/__init__.py": "from tiny.part import x\n",
            "tiny/part.py": "x = 42\n",
            "tiny/__pycache__/part.cpython-311.pyc": "old",
            "tiny-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n",
            "mine.pth": str(folder.parent / "mine"),
            "mine-2.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: mine\nVersion: 2.0\n",
            "mine-2.0.dist-info/direct_url.json": '{"dir_info": {"editable": true}, "url": ""}',
            "mine-2.0.dist-info/RECORD": "mine.pth,,\nmine-2.0.dist-info/METADATA,,\n"
            "mine-2.0.dist-info/direct_url.json,,\nmine-2.0.dist-info/RECORD,,\n",
        },
    )
    (site / "tiny/linked.txt").symlink_to(folder.parent / "installer/linked.txt")
    (site / "tiny/again.py").symlink_to(site / "tiny/part.py")
    return folder


PACK = """
import sys
from penstock.cluster.environment import pack_environment
from penstock.errors import JobError
try:
    print(pack_environment(sys.argv[1], lambda words: print(words, file=sys.stderr, flush=True)))
except JobError as error:
    sys.exit(f"{error.message} HINT {error.hint}")
"""


def pack(python: Path, cache: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [python, "-c", PACK, cache],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(SOURCE)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_an_environment_runs_where_it_is_unpacked(made: Path, tmp_path: Path) -> None:
    printed, told = pack(made / "bin/python", tmp_path / "cache").communicate(timeout=60)
    file = Path(printed.strip())
    assert file.name.startswith("environment-")
    assert [line.partition(":")[0].split()[0] for line in told.splitlines()] == [
        "packing",
        "packed",
    ]
    shutil.move(made, made.parent / "gone")  # nothing may lead back
    shutil.move(made.parent / "installer", made.parent / "gone-as-well")
    try:
        with tarfile.open(file) as tar:
            assert {(member.uid, member.uname) for member in tar} == {(0, "")}
            # Python 3.11.4 is the first to ask for one.
            safely = {"filter": "tar"} if hasattr(tarfile, "tar_filter") else {}
            tar.extractall(tmp_path / "environment", **safely)
        python = tmp_path / "environment/bin/python"
        code = "import sys, tiny, tiny.again, json; print(tiny.x, tiny.again.x, sys.prefix)"
        done = run(python, f"{code}; print(tiny.__file__)")
    finally:
        shutil.move(made.parent / "gone", made)
        shutil.move(made.parent / "gone-as-well", made.parent / "installer")
    assert done.stderr == ""
    assert done.stdout.startswith(f"42 42 {tmp_path / 'environment'}\n{tmp_path / 'environment'}")
    shipped = {p.relative_to(tmp_path / "environment").as_posix() for p in python.parent.iterdir()}
    assert "bin/shell" in shipped
    assert "bin/tool" not in shipped
    site = next((tmp_path / "environment/lib").glob("python*/site-packages"))
    assert sorted(p.name for p in site.iterdir()) == ["tiny", "tiny-1.0.dist-info"]
    assert not (site / "tiny/linked.txt").is_symlink()
    assert (site / "tiny/linked.txt").read_text() == "shared"
    with tarfile.open(file) as tar:
        assert [name for name in tar.getnames() if "__pycache__" in name] == []


def test_an_environment_is_packed_once_for_what_is_installed(made: Path, tmp_path: Path) -> None:
    cache, python = tmp_path / "cache", made / "bin/python"
    both = [pack(python, cache), pack(python, cache)]
    files = {process.communicate(timeout=60)[0].strip() for process in both}
    assert len(files) == 1
    file = Path(files.pop())
    assert sorted(p.name for p in cache.iterdir()) == [
        file.name,
        file.with_suffix(".lock").name,
    ]
    about = file.stat()
    printed, told = pack(python, cache).communicate(timeout=60)
    assert (printed.strip(), told) == (str(file), "")
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (about.st_ino, about.st_mtime_ns)
    site = next((made / "lib").glob("python*/site-packages"))
    lay(site, {"more-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: more\nVersion: 1.0\n"})
    try:
        assert pack(python, cache).communicate(timeout=60)[0].strip() != str(file)
    finally:
        shutil.rmtree(site / "more-1.0.dist-info")


def test_packing_waits_for_another_run_that_packs(made: Path, tmp_path: Path) -> None:
    file = Path(pack(made / "bin/python", tmp_path).communicate(timeout=60)[0].strip())
    file.unlink()
    with open(file.with_suffix(".lock"), "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = pack(made / "bin/python", tmp_path)
        assert process.stderr is not None
        assert "another run packs" in process.stderr.readline()
        assert not file.exists()
        file.write_bytes(b"by the other run")
    printed, told = process.communicate(timeout=60)
    assert (printed.strip(), told) == (str(file), "")
    assert file.read_bytes() == b"by the other run"


def test_environments_that_cannot_be_shipped(made: Path, tmp_path: Path) -> None:
    told = pack((made / "bin/python").resolve(), tmp_path).communicate(timeout=60)[1]
    assert "the system's own Python" in told
    assert "HINT python -m venv" in told
    settings = (made / "pyvenv.cfg").read_text()
    try:
        (made / "pyvenv.cfg").write_text(settings.replace("packages = false", "packages = true"))
        told = pack(made / "bin/python", tmp_path).communicate(timeout=60)[1]
    finally:
        (made / "pyvenv.cfg").write_text(settings)
    assert "pyvenv.cfg includes the system's packages" in told
    assert "HINT make it without" in told
    told = pack(made / "bin/python", Path("/dev/null/no")).communicate(timeout=60)[1]
    assert "cannot be packed into /dev/null/no" in told
    assert "HINT choose another folder" in told


def test_words(tmp_path: Path) -> None:
    code = Code(bytes(412_000), "", ("a", "b", "c"))
    rest = "; the nodes' own Python has the rest"
    assert words(code) == f"ships penstock and 3 modules of yours (412 KB){rest}"
    assert words(code._replace(names=("a",))).startswith("ships penstock and 1 module of yours")
    assert words(code._replace(names=())) == f"ships penstock (412 KB){rest}"
    file = tmp_path / "environment.tar.gz"
    assert "ships the whole environment (it is packed first)" in words(code, file)
    with open(file, "wb") as stream:
        stream.truncate(1_200_000_000)
    assert "ships the whole environment (1.2 GB, packed before)" in words(code, file)


# Nodes


def node(**changes: object) -> Facts:
    """The facts of a node without problems, with changes."""
    packages = {"torch": "2.13.0+cpu", "numpy": "2.4.6", "rich": "15.0.0"}
    good = Facts(
        host="node7",
        python="3.11.7",
        executable="/usr/bin/python3",
        platform="linux-x86_64",
        packages=packages,
        memory_bytes=8 * GIB,
        memory_limit_bytes=None,
        shared_bytes=GIB,
        cores=4,
        temporary="/tmp",
        temporary_bytes=GIB,
    )
    if isinstance(changed := changes.get("packages"), dict):
        changes["packages"] = packages | changed
    return good._replace(**changes)  # type: ignore[arg-type]


def test_facts_of_this_machine() -> None:
    values = facts()
    here = Facts.of(json.loads(json.dumps(values | {"gpus": ["0"]})))
    assert here == Facts(**values) == Facts.of(here._asdict())
    assert here.packages["torch"] == importlib.metadata.version("torch")
    assert here.python == ".".join(map(str, sys.version_info[:3]))
    assert here.memory_bytes is not None
    assert here.memory_bytes > 1 << 20
    assert 1 <= here.cores <= (os.cpu_count() or 1)
    assert problems(here, here, 1 << 20) == []
    done = run(
        sys.executable,
        "import sys; from penstock.cluster.node import facts; facts(); "
        "assert not {'torch', 'numpy', 'pyarrow'} & set(sys.modules)",
        PYTHONPATH=str(SOURCE),
    )
    assert done.returncode == 0, done.stderr


def test_what_is_required_is_known_without_metadata(tmp_path: Path, bare: Path) -> None:
    gather = by_value("penstock.cluster.node", "facts")
    shipped = lay(tmp_path, {"shipped": cloudpickle.dumps(gather)})
    printed = on_node(
        bare,
        f"""
        import json
        print(json.dumps(pickle.load(open({str(shipped / "shipped")!r}, "rb"))()["packages"]))
        """,
    )
    assert json.loads(printed[0]).keys() == facts()["packages"].keys()


def test_memory_and_cores_are_what_cgroup_v2_leaves(tmp_path: Path) -> None:
    root = lay(
        tmp_path,
        {
            "proc/meminfo": "MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n",
            "proc/self/cgroup": "0::/pod/container\n",
            "sys/fs/cgroup/pod/memory.max": f"{4 * GIB}\n",
            "sys/fs/cgroup/pod/memory.current": f"{3 * GIB}\n",
            "sys/fs/cgroup/pod/memory.stat": f"anon 1\ninactive_file {GIB}\n",
            "sys/fs/cgroup/pod/container/memory.max": "max\n",
            "sys/fs/cgroup/pod/container/memory.current": f"{3 * GIB}\n",
            "sys/fs/cgroup/pod/cpu.max": "100000 100000\n",
            "sys/fs/cgroup/pod/container/cpu.max": "max 100000\n",
            "sys/fs/cgroup/other/memory.max": "1\n",
        },
    )
    found = Facts.of(facts(str(root)))
    assert (found.memory_bytes, found.memory_limit_bytes) == (2 * GIB, 4 * GIB)
    assert found.cores == 1
    assert found.shared_bytes is None


def test_memory_and_cores_are_what_cgroup_v1_leaves(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": "MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n",
        "proc/self/cgroup": "5:memory:/docker/a\n4:cpu,cpuacct:/docker/a\n0::/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{6 * GIB}\n",  # of which only the top shows
        "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{2 * GIB}\n",
        "sys/fs/cgroup/memory/memory.stat": f"inactive_file 0\ntotal_inactive_file {GIB}\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
    }
    found = Facts.of(facts(str(lay(tmp_path, files))))
    assert (found.memory_bytes, found.memory_limit_bytes) == (5 * GIB, 6 * GIB)
    assert found.cores == len(os.sched_getaffinity(0))
    lay(tmp_path, {"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"})
    found = Facts.of(facts(str(tmp_path)))
    assert (found.memory_bytes, found.memory_limit_bytes) == (8 * GIB, None)


def only(*arguments: Facts, need_bytes: int = GIB, compiled: tuple[str, ...] = ()) -> Problem:
    (problem,) = problems(*arguments, need_bytes, rank=3, compiled=compiled)
    assert problem.rank == 3
    assert problem.what.startswith("node7: ")
    assert problem.fix
    return problem


def test_a_node_like_the_driver_has_no_problems() -> None:
    assert problems(node(), node(), GIB) == []
    assert problems(node(python="3.11.2"), node(), GIB) == []
    assert problems(node(packages={"rich": "15.1.0"}), node(), GIB) == []
    assert problems(node(memory_bytes=None), node(), GIB) == []
    assert problems(node(packages={"rich": None}), node(packages={"rich": None}), GIB) == []


def test_another_python() -> None:
    found = only(node(python="3.10.12"), node())
    assert found.fatal
    assert "Python 3.10.12 (/usr/bin/python3); the driver has 3.11.7" in found.what
    assert "spark.pyspark.python: a Python 3.11" in found.fix


def test_another_torch() -> None:
    minor = only(node(packages={"torch": "2.12.0+cpu"}), node())
    assert (minor.fatal, minor.what) == (True, "node7: torch 2.12.0+cpu; the driver has 2.13.0+cpu")
    for version in ("2.13.1+cpu", "2.13.0+cu128"):
        note = only(node(packages={"torch": version}), node())
        assert not note.fatal
        assert "bits of the result may differ" in note.what


def test_missing_packages() -> None:
    found = only(node(packages={"torch": None, "rich": None}), node())
    assert found.fatal
    assert "torch and rich not installed for /usr/bin/python3" in found.what
    assert "pip install torch==2.13.0 rich==15.0.0" in found.fix
    assert "numpy and rich" not in only(node(packages={"rich": None}), node()).what


def test_another_major_version_is_worth_a_note() -> None:
    found = only(node(packages={"numpy": "1.26.4"}), node())
    assert not found.fatal
    assert found.what == "node7: numpy 1.26.4; the driver has 2.4.6"


def test_another_platform_matters_to_compiled_modules() -> None:
    assert not only(node(platform="linux-aarch64"), node()).fatal
    found = only(node(platform="linux-aarch64"), node(), compiled=("fast.so",))
    assert found.fatal
    assert "fast.so only runs on the driver's" in found.what


def test_too_little_memory() -> None:
    found = only(node(memory_limit_bytes=2 * 10**9), node(), need_bytes=9 * 10**9)
    assert found.fatal
    assert "8.6 GB of memory free, 9.0 GB needed; its cgroup grants 2.0 GB" in found.what
    assert "spark.executor.memoryOverhead" in found.fix


def test_too_little_shared_memory() -> None:
    assert not only(node(shared_bytes=64 << 20), node()).fatal
    assert only(node(shared_bytes=None), node()).fatal


def test_importing_is_light() -> None:
    code = "import sys, penstock.cluster.environment; print(sorted({'torch', 'pyarrow', 'pyspark'}"
    done = run(sys.executable, f"{code} & set(sys.modules)))", PYTHONPATH=str(SOURCE))
    assert (done.returncode, done.stdout) == (0, "[]\n")
