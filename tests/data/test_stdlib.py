import sysconfig
from pathlib import Path

import pytest

from data.document import Text
from data.source.stdlib import StandardLibrary


def texts(source: StandardLibrary) -> dict[str, list[str]]:
    """Path -> its pieces, in order."""
    files: dict[str, list[str]] = {}
    for index in range(len(source)):
        document = source.document(index)
        (segment,) = document.segments
        assert isinstance(segment, Text)
        assert segment.learn
        path, start = document.id.rsplit(":", 1)
        assert int(start) == len("".join(files.get(path, [])).encode())
        files.setdefault(path, []).append(segment.text)
    return files


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small standard library of 60 files and everything that has to be left out."""
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "lib"))
    for name in ("site-packages", "json", "json/tests", "test", "__pycache__"):
        (tmp_path / "lib" / name).mkdir(parents=True)
        (tmp_path / "lib" / name / "module.py").write_text("x = 1\n")
    for number in range(60):
        (tmp_path / "lib" / f"m{number:02}.py").write_text("".join(f"line_{k} = {k}\n" for k in range(number)))
    (tmp_path / "lib" / "latin.py").write_bytes(b"# \xe9\n")
    (tmp_path / "lib" / "_sysconfigdata_x.py").write_text("x = 1\n")
    (tmp_path / "lib" / "README.txt").write_text("no code\n")
    (tmp_path / "outside.py").write_text("x = 1\n")
    (tmp_path / "lib" / "link.py").symlink_to(tmp_path / "outside.py")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "deep.py").write_text("x = 1\n")
    (tmp_path / "lib" / "linked").symlink_to(tmp_path / "folder")
    return tmp_path / "lib"


def test_the_splits_share_no_file_and_cover_the_library(library: Path) -> None:
    train, test = texts(StandardLibrary("train", 64)), texts(StandardLibrary("test", 64))
    assert test
    assert train.keys().isdisjoint(test)
    assert sorted(train | test) == sorted(["json/module.py", *(f"m{number:02}.py" for number in range(1, 60))])
    assert list(train) == sorted(train)
    for path, pieces in (train | test).items():
        assert "".join(pieces) == (library / path).read_text()


def test_pieces_end_at_line_borders_and_keep_the_limit(library: Path) -> None:
    (library / "m00.py").write_text("é" * 100 + "\nshort\n" + "\n" * 50)  # one line of 201 bytes
    files = texts(StandardLibrary("train", 33)) | texts(StandardLibrary("test", 33))
    for path, pieces in files.items():
        assert max(len(piece.encode()) for piece in pieces) <= 33
        if path != "m00.py":
            assert all(piece.endswith("\n") for piece in pieces)
    assert "".join(files["m00.py"]) == (library / "m00.py").read_text()
    assert files["m00.py"][:7] == ["é" * 16] * 6 + ["é" * 4 + "\nshort\n" + "\n" * 18]


def test_the_running_library() -> None:
    source = StandardLibrary("test")
    assert 100 < len(source) < 2000
    assert source.document(3) == StandardLibrary("test").document(3, pixels=False)
    with pytest.raises(IndexError):
        source.document(len(source))


def test_bad_arguments_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="split"):
        StandardLibrary("dev")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_bytes"):
        StandardLibrary("test", 3)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match="no Python files"):
        StandardLibrary("train")
