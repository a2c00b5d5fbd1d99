"""Bad records: what is counted, sampled, written, and raised."""

from __future__ import annotations

import json
import pickle
import threading
from pathlib import Path
from typing import Any

import fsspec
import pytest

from penstock.errors import DataError
from penstock.feed.bad import QUARANTINE, SAMPLED, BadRecords


def add(bad: BadRecords, where: str, rows: list[int], values: Any = 1, **options: Any) -> None:
    def reason(i: int) -> str:
        return f"row {rows[i]} is bad"

    bad.add(where, rows, reason, lambda i: {"x": values}, "mend it", **options)


def lines_of(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {
        path.name: [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(folder.iterdir())
    }


def test_the_first_is_an_error_unless_told_otherwise() -> None:
    bad = BadRecords()
    add(bad, "a.csv", [])
    assert bad.line() == ""
    with pytest.raises(DataError, match=r"a\.csv: row 3 is bad\n  hint: mend it"):
        add(bad, "a.csv", [3, 4])
    with pytest.raises(DataError, match=r"'skpi'(.|\n)*did you mean 'skip'"):
        BadRecords("skpi")


def test_skipped_ones_are_counted_and_the_first_few_sampled(tmp_path: Path) -> None:
    bad = BadRecords("skip", str(tmp_path))
    add(bad, "a.csv", [3, 4])
    add(bad, "b.csv", list(range(1000)))
    assert bad.count == 1002
    assert len(bad.sample) == SAMPLED
    assert (bad.sample[2].where, bad.sample[2].row) == ("b.csv", 0)
    assert bad.line().startswith("1,002 bad records left out: a.csv: row 3 is bad; ")
    assert "every record is bad: 1,002 of 1,002, the first in a.csv: row 3" in str(bad.every("run"))
    assert not list(tmp_path.iterdir())
    bad.clear()
    assert (bad.count, bad.sample, bad.line()) == (0, [], "")


def test_quarantined_ones_are_written_with_their_values(tmp_path: Path) -> None:
    bad = BadRecords("quarantine", str(tmp_path / "kept"))
    add(bad, "/data/a.csv", [3, 4], b"\x00\xff")
    add(bad, "/data/a.csv", [9], [1.5, float("nan")])
    add(bad, "/more/a.csv", [1])
    files = lines_of(tmp_path / "kept")
    assert len(files) == 2  # of one name, but two places
    ours = next(lines for lines in files.values() if len(lines) == 3)
    assert ours[0] == {
        "where": "/data/a.csv",
        "row": 3,
        "reason": "row 3 is bad",
        "record": {"x": {"base64": "AP8="}},
    }
    assert ours[2]["record"] == {"x": [1.5, "nan"]}
    assert f"kept in {tmp_path / 'kept'}" in bad.line()
    # Read once more, they are not there twice.
    again = BadRecords("quarantine", str(tmp_path / "kept"))
    add(again, "/data/a.csv", [3])
    assert sorted(map(len, lines_of(tmp_path / "kept").values())) == [1, 1]


def test_the_folder_may_be_on_any_file_system_and_said_by_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(QUARANTINE, "memory://run-of-bad/quarantine")
    bad = BadRecords("quarantine")
    add(bad, "a.csv", [3])
    add(bad, "a.csv", [4, 5])
    memory = fsspec.filesystem("memory")
    found = [memory.cat_file(path).decode() for path in memory.find("/run-of-bad/quarantine")]
    rows = [json.loads(line)["row"] for text in found for line in text.splitlines()]
    assert sorted(rows) == [3, 4, 5]


def test_without_a_folder_they_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(QUARANTINE, raising=False)
    bad = BadRecords("quarantine")
    add(bad, "a.csv", [3])
    assert bad.line() == "1 bad record left out: a.csv: row 3 is bad"


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    bad = BadRecords("quarantine", str(tmp_path / "file" / "folder"))
    with pytest.raises(DataError, match="bad records cannot be written there"):
        add(bad, "a.csv", [3])


def test_pickled_it_forgets_what_it_has_seen(tmp_path: Path) -> None:
    bad = BadRecords("quarantine", str(tmp_path))
    add(bad, "a.csv", [3])
    other = pickle.loads(pickle.dumps(bad))
    assert (other.on_bad_record, other.folder, other.count) == ("quarantine", str(tmp_path), 0)


def test_threads_may_share_it(tmp_path: Path) -> None:
    bad = BadRecords("quarantine", str(tmp_path))

    def work(start: int) -> None:
        for row in range(start, start + 50):
            add(bad, "images", [row], by_process=True)

    threads = [threading.Thread(target=work, args=(100 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    (lines,) = lines_of(tmp_path).values()
    assert bad.count == 200
    assert sorted(line["row"] for line in lines) == [
        row for i in range(4) for row in range(100 * i, 100 * i + 50)
    ]
