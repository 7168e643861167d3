"""data.validate: a sound set passes, and every single change to a prepared set is found."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from data import prepare
from data.shard import sha256_of
from data.source.prepared import SCHEMA
from data.validate import check_prepared, main

SAMPLES = Path("tests/data/samples")


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("set") / "out"
    prepare.main(["--input", str(SAMPLES / "canonical.jsonl"), "--out", str(out), "--workers", "0"])
    return out


@pytest.fixture
def copy(sound: Path, tmp_path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "out"))


def status(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


def test_sound_sets(sound: Path, capsys) -> None:
    assert status(sound) == 0
    assert status(sound, "--decode") == 0
    assert status(SAMPLES / "pairs.tar") == 0
    assert capsys.readouterr().out.splitlines() == ["3 documents, 0 problems"] * 3


@pytest.mark.parametrize(
    "name",
    ["shards/00000.arrow", "lengths.npy", "batches.npy", "statistics.json", "quarantine.jsonl", "tokenizer.json"],
)
def test_altered_and_missing_files_are_found(copy: Path, capsys, name: str) -> None:
    content = bytearray((copy / name).read_bytes() or b"x")
    content[-1] ^= 1
    (copy / name).write_bytes(content)
    problem = "is not what the manifest says"
    unreadable = False
    if status(copy) == 1:
        assert f"{copy / name}: {problem}" in capsys.readouterr().out
    else:
        unreadable = True
    assert unreadable == (name == "batches.npy")  # its last number is the count of documents
    (copy / name).unlink()
    assert status(copy) == (2 if name in ("lengths.npy", "batches.npy") else 1)


def forge(copy: Path, name: str) -> None:
    """Make the manifest agree with a file that was changed."""
    manifest = json.loads((copy / "manifest.json").read_bytes())
    entries = {**manifest["files"], **{shard["file"]: shard for shard in manifest["shards"]}}
    entries[name]["bytes"] = (copy / name).stat().st_size
    entries[name]["sha256"] = sha256_of(copy / name)
    (copy / "manifest.json").write_text(json.dumps(manifest))


def test_wrong_lengths_are_found(copy: Path) -> None:
    lengths = np.load(copy / "lengths.npy")
    lengths[1, 2] += 1
    np.save(copy / "lengths.npy", lengths)
    forge(copy, "lengths.npy")
    problems = list(check_prepared(copy))
    assert problems == [None, None, f"{copy}: document 2: its length is not what lengths.npy says"]


def test_wrong_ids_and_pictures_are_found(copy: Path) -> None:
    path = copy / "shards/00000.arrow"
    rows = pa.ipc.open_file(str(path)).read_all().to_pylist()
    rows[0]["segments"][0]["ids"][0] += 1
    rows[1]["segments"][1]["image"] = rows[1]["segments"][1]["image"][:-40]
    rows[2]["segments"][1]["height"] += 1
    with pa.ipc.new_file(str(path), SCHEMA) as writer:
        writer.write_batch(pa.RecordBatch.from_pylist(rows, SCHEMA))
    forge(copy, path.relative_to(copy).as_posix())
    ids, cut, size = check_prepared(copy, decode=True)
    assert ids == f"{copy}: document 0: segment 1: its ids are not those of its text"
    assert cut is not None
    assert "document 1" in cut
    assert size is not None
    assert "is 9 x 13 pixels, not 10 x 13" in size


def test_raw_data_with_problems(tmp_path, capsys) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' + "{oops\n" * 30)
    assert status(tmp_path / "a.jsonl", "--show", 2) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith(f"{tmp_path / 'a.jsonl'}: line 2: not valid JSON")
    assert lines[-1] == "1 documents, 30 problems, 2 shown"


def test_what_cannot_be_checked(tmp_path, capsys) -> None:
    for arguments in ([tmp_path / "gone"], [tmp_path], [], [tmp_path, "--format", "xyz"]):
        assert status(*arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
