"""Files made to harm: each is rejected with its reason, and what lies beside it is kept."""

import gzip
import io
import json
import os
import pickle
import random
import shutil
import struct
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from data import adapters, prepare
from data.adapters import RawDocument, Rejection, files, find_units, read, tar
from data.source.prepared import Prepared
from data.validate import check_prepared, check_raw

SAMPLES = Path("tests/data/samples")


def png(size: tuple[int, int] = (9, 7)) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def bomb(side: int) -> bytes:
    """A small PNG that says it is side x side pixels, all black."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10**6)))
        + chunk(b"IEND", b"")
    )


def archive() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as target:
        target.writestr("payload.exe", b"x" * 100)
    return file.getvalue()


def svg() -> bytes:
    return b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'


HOSTILE: list[tuple[str, Callable[[], bytes], str]] = [
    ("bomb", lambda: bomb(9_000), "9000 x 9000 pixels are more than the limit of 67108864"),
    ("huge bomb", lambda: bomb(60_000), "could be decompression bomb"),
    ("zip", archive, "the image file holds a ZIP archive"),
    ("picture with a zip behind it", lambda: png() + archive(), "the image file holds a ZIP archive"),
    ("text", lambda: b"hello", "not an image of a known kind"),
    ("empty", lambda: b"", "not an image of a known kind"),
    ("svg", svg, "not an image of a known kind"),
    ("postscript", lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image of a known kind"),
    ("pickle", lambda: pickle.dumps([1]), "not an image of a known kind"),
    ("header only", lambda: png()[:20], "unreadable image: Truncated"),
]


@pytest.mark.parametrize(("name", "make", "reason"), HOSTILE, ids=[name for name, _, _ in HOSTILE])
def test_images_that_are_none(tmp_path, name: str, make: Callable[[], bytes], reason: str) -> None:
    (tmp_path / "bad.png").write_bytes(make())
    (tmp_path / "good.png").write_bytes(png())
    rows = ("good", "bad", "good")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"id": n, "image": f"{n}.png"}) + "\n" for n in rows))
    prepare.main(["--input", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out"), "--workers", "0"])
    source = Prepared(tmp_path / "out")
    assert [source.document(k).id for k in range(len(source))] == ["good", "good"]
    (entry,) = [json.loads(line) for line in (tmp_path / "out/quarantine.jsonl").open()]
    assert entry["where"] == "line 2"
    assert reason in entry["reason"]


def test_four_bytes_that_look_like_an_archive_are_not_one(tmp_path) -> None:
    """A photo of which the last bytes happen to be those that end a ZIP file."""
    assert files.image_bytes(png() + b"PK\5\6" + bytes(30), ".", "/")


def rejections(path: Path | str, **options: Any) -> dict[str, str]:
    found = [item for unit in find_units([str(path)], **options) for item in read(unit)]
    return {item.where: item.reason for item in found if isinstance(item, Rejection)}


def kept(path: Path | str) -> list[str]:
    found = [item for unit in find_units([str(path)]) for item in read(unit)]
    return [item.id for item in found if isinstance(item, RawDocument)]


def test_paths_that_leave_the_folder(tmp_path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out.png"
    (inside / "sub").mkdir(parents=True)
    outside.write_bytes(png())
    (inside / "good.png").write_bytes(png())
    (inside / "link.png").symlink_to(outside)
    (inside / "good-link.png").symlink_to("good.png")
    (inside / "folder").symlink_to(tmp_path)
    os.mkfifo(inside / "pipe.png")
    bad = ["../out.png", str(outside), "link.png", "folder/out.png", "sub/../../out.png", "/etc/passwd", "/dev/zero"]
    others = {"pipe.png": "not a regular file", "sub": "is a directory", "a\0.png": "null", "": "is empty",
              "x" * 300: "name too long", "file:///etc/passwd": "is a URL",
              "data:image/png;base64,AA": "is a URL"}  # fmt: skip
    good = ["good.png", "sub/../good.png", str(inside / "good.png"), "good-link.png"]
    names = [*bad, *others, *good]
    (inside / "a.jsonl").write_text("".join(json.dumps({"id": name, "image": name}) + "\n" for name in names))
    found = rejections(inside / "a.jsonl")
    for line, name in enumerate(bad, 1):
        assert "lies outside the input folder" in found[f"line {line}"], name
    for line, (name, reason) in enumerate(others.items(), len(bad) + 1):
        assert reason in found[f"line {line}"].lower() or reason in found[f"line {line}"], (name, found[f"line {line}"])
    assert kept(inside / "a.jsonl") == [adapters.shorten(name) for name in good]


def test_links_of_data_files(tmp_path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "in/a.txt").write_text("a")
    (tmp_path / "in/b.txt").symlink_to(tmp_path / "secret.txt")
    os.mkfifo(tmp_path / "in/c.txt")
    assert rejections(tmp_path / "in") == {"file": "a link that leaves the input folder"}
    assert kept(tmp_path / "in") == ["a.txt"]


def test_texts_that_cannot_be_meant(tmp_path, monkeypatch) -> None:
    limit = adapters.MAX_TEXT_BYTES
    monkeypatch.setattr(adapters.lines, "MAX_RECORD_BYTES", 3 * limit)
    cases = [
        (b'{"text": "%s"}' % (b"a" * limit), None),
        (b'{"text": "%s"}' % (b"a" * (limit + 1)), f"text of {limit + 1} bytes is more than the limit of {limit}"),
        (b'{"text": "%s"}' % ("é".encode() * (limit // 2 + 1)), f"text of {limit + 2} bytes"),
        (b'{"text": "%s"}' % (b"a" * (3 * limit)), f"a line of more than {3 * limit} bytes"),
        (b'{"text": "a\\u0000b"}', "text holds a NUL character"),
        (b'{"text": "a\\ud800b"}', "text is not valid Unicode (character 1)"),
        (b'{"text": "\xff"}', "not valid JSON"),
        (b"[" * 10**5, "not valid JSON"),
        (b'{"a":' * 10**5, "not valid JSON"),
        (b"\0\0\0", "not valid JSON"),
        (b'{"text": ' + b"1" * 5000 + b"}", "not valid JSON"),
        (b'{"text": "b"}', None),
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(line for line, _ in cases))
    found = rejections(tmp_path / "a.jsonl")
    for number, (_, reason) in enumerate(cases, 1):
        assert (f"line {number}" in found) == (reason is not None), number
        assert reason is None or reason in found[f"line {number}"]
    assert len(kept(tmp_path / "a.jsonl")) == 2


def test_a_document_of_too_many_pictures(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(adapters, "MAX_DOCUMENT_BYTES", 4 * len(png()))
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"images": ["a.png"] * 5}) + "\n" + json.dumps({"id": "ok", "images": ["a.png"] * 4})
    )
    assert list(rejections(tmp_path / "a.jsonl")) == ["line 1"]
    assert kept(tmp_path / "a.jsonl") == ["ok"]


def test_files_of_more_than_the_limit(tmp_path, monkeypatch) -> None:
    with open(tmp_path / "a.png", "wb") as file:
        file.truncate(files.MAX_IMAGE_BYTES + 1)
    (tmp_path / "a.jsonl").write_text('{"image": "a.png"}')
    assert "are more than the limit of" in rejections(tmp_path / "a.jsonl")["line 1"]


Change = Callable[[tarfile.TarInfo], None]


def add(target: tarfile.TarFile, name: str, data: bytes = b"", **changes: Any) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in changes.items():
        setattr(info, key, value)
    target.addfile(info, io.BytesIO(data) if data else None)


def test_tar_members(tmp_path) -> None:
    path = tmp_path / "a.tar"
    (tmp_path / "x.png").write_bytes(png())
    with tarfile.open(path, "w") as target:
        add(target, "first.png", png())
        add(target, "../up.png", png())
        add(target, "/abs.png", png())
        add(target, "a/../../b.png", png())
        add(target, "sym.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(target, "hard.png", type=tarfile.LNKTYPE, linkname="first.png")
        add(target, "dev.png", type=tarfile.CHRTYPE)
        add(target, "fifo.png", type=tarfile.FIFOTYPE)
        add(target, "folder", type=tarfile.DIRTYPE)
        for suffix in ("pyd", "pickle", "pkl", "pt", "npy", "x.pth"):
            add(target, f"p-{suffix[-2:]}.txt", b"caption")
            add(target, f"p-{suffix[-2:]}.{suffix}", pickle.dumps(os.system))
        add(target, "last.png", png())
    found = rejections(path)
    for name in ("../up", "/abs", "a/../../b"):
        assert "the path leaves the archive" in found[f"sample {name}"]
    for name in ("sym", "hard", "dev", "fifo"):
        assert "a link, a device or another special member" in found[f"sample {name}"]
    for suffix in ("yd", "le", "kl", "pt", "py", "th"):
        assert "pickled data is never loaded" in found[f"sample p-{suffix}"]
    assert kept(path) == ["first", "last"]
    assert not list(tmp_path.glob("up*")) + list(tmp_path.parent.glob("up.png"))


def test_damaged_archives(tmp_path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as target:
        for k in range(5):
            add(target, f"{k}.png", png())
    content = bytearray(path.read_bytes())
    block = 512 + 512 * -(-len(png()) // 512)
    content[2 * block + 10] ^= 0xFF  # the third header
    path.write_bytes(content)
    # A lost member may have belonged to the sample before or to the one behind.
    assert kept(path) == ["0", "4"]
    found = rejections(path)
    assert list(found) == ["sample 1", "sample 3"]
    assert all(f"the archive is damaged at byte {2 * block}" in reason for reason in found.values())
    path.write_bytes(content[: 3 * block + 700])
    assert kept(path) == ["0"]
    assert list(rejections(path).items())[-1] == ("after sample 1", "cannot be read on: the archive is cut off")
    path.write_bytes(content[: block + 700])
    assert kept(path) == ["0"]
    assert rejections(path) == {"sample 1": "the archive is cut off"}
    with tarfile.open(path, "w") as target:  # says that it is larger than the file
        add(target, "0.png", png())
        info = tarfile.TarInfo("1.png")
        info.size = 2**40
        target.addfile(info)
    assert kept(path) == ["0"]
    assert "cannot be read on: the archive is cut off" in rejections(path).values()
    two = tmp_path / "two.tar"  # one archive behind the other
    two.write_bytes((SAMPLES / "pairs.tar").read_bytes() * 2)
    assert len(kept(two)) == 6


def test_compressed_archives_that_unfold_without_end(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tar, "_FREE_BYTES", 2**20)
    path = tmp_path / "a.tar.gz"
    with gzip.open(path, "wb") as packed, tarfile.open(fileobj=packed, mode="w|") as target:
        add(target, "first.png", png())
        for k in range(20):
            add(target, f"{k}.bin", bytes(2**20))
    assert os.path.getsize(path) < 2**16
    assert "unfolds to more than" in list(rejections(path).values())[-1]
    assert kept(path)[0] == "first"
    zeros = tmp_path / "zeros.tgz"
    zeros.write_bytes(gzip.compress(bytes(2**26)))
    assert "unfolds to more than" in rejections(zeros)["file"]
    large = tmp_path / "large.tgz"
    with gzip.open(large, "wb") as packed, tarfile.open(fileobj=packed, mode="w|") as target:
        add(target, "a.png", bytes(2**26 + 1))
    assert "unfolds to more than" in rejections(large)["file"]


def test_a_long_name_is_not_read_into_memory(tmp_path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as target:
        add(target, "x" * 100_000, b"x")
    assert "has a name of 100001 bytes" in rejections(path)["file"]


OTHER = {
    "nothing": b"", "zeros": bytes(3072), "noise": b"\xff\xfe" * 700, "parquet": b"PAR1" + bytes(50) + b"PAR1",
    "arrow": b"ARROW1\0\0",
}  # fmt: skip
# What is empty in its format holds no document, and nothing is wrong with it.
EMPTY = {("nothing", f"a.{suffix}") for suffix in ("jsonl", "json", "txt", "tar", "tar.gz")}
EMPTY |= {("zeros", "a.tar"), ("zeros", "a.tar.gz")}


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.tar", "a.tar.gz", "a.json", "a.csv", "a.jsonl", "a.txt"])
@pytest.mark.parametrize("content", OTHER)
def test_files_that_are_something_else(tmp_path, name: str, content: str) -> None:
    (tmp_path / name).write_bytes(OTHER[content])
    assert kept(tmp_path / name) == []
    found = rejections(tmp_path / name)
    assert all(found.values())
    assert bool(found) == ((content, name) not in EMPTY)


def test_rejections_in_terminal_and_file_hold_no_control_characters(tmp_path, capsys) -> None:
    from data.validate import main

    (tmp_path / "a.jsonl").write_text(json.dumps({"image": "\x1b[2Jx\ud800\n.png"}) + "\n")
    with pytest.raises(SystemExit, match="1"):
        main([str(tmp_path / "a.jsonl")])
    output = capsys.readouterr().out
    assert "\x1b" not in output
    assert len(output.splitlines()) == 2


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Bytes changed, cut, doubled, inserted or zeroed at random places."""
    content = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 30))):
        at = rng.randrange(len(content) + 1)
        match rng.randrange(6):
            case 0:
                content[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del content[at : at + rng.choice((1, 10, 1000))]
            case 2:
                content[at:at] = rng.randbytes(rng.choice((1, 4, 600)))
            case 3:
                content[at : at + 64] = content[at : at + 64] * 2
            case 4:
                content[at : at + 8] = rng.choice((b"\0" * 8, b"\xff" * 8, b"99999999", b"[[[[[[[["))
            case 5:
                content = content[: rng.randrange(len(content) + 1)] if rng.random() < 0.2 else content
    return bytes(content)


TARGETS = (
    "canonical.jsonl", "canonical.parquet", "canonical.arrow", "captions.csv", "interleaved.jsonl", "pairs.tar",
    "llava.json", "mmc4.jsonl", "text/a.txt", "pictures/0.png", "pictures/1.jpg", "pictures/2.png",
)  # fmt: skip


def fuzz(folder: Path, seeds: range) -> None:
    """Mutate one sample file per seed. Nothing is raised, reasons are given, and the neighbours come through."""
    for seed in seeds:
        rng = random.Random(seed)
        name = TARGETS[seed % len(TARGETS)]
        work = folder / str(seed)
        shutil.copytree(SAMPLES, work / "in")
        (work / "in" / name).write_bytes(mutate((SAMPLES / name).read_bytes(), rng))
        # The good neighbour: another file of the same kind, behind the damaged one.
        tested = work / "in" / ("canonical.jsonl" if name.startswith("pictures/") else name)
        neighbour = work / "neighbour" / "canonical.jsonl"
        shutil.copytree(SAMPLES / "pictures", work / "neighbour/pictures")
        shutil.copy(SAMPLES / "canonical.jsonl", neighbour)
        print(f"seed {seed}: {name}")
        started = time.monotonic()
        arguments = ["--input", str(tested), str(neighbour), "--out", str(work / "out"), "--workers", "0"]
        prepare.main(arguments if seed % 2 else [*arguments, "--decode"])
        assert time.monotonic() - started < 60, "hangs"
        source = Prepared(work / "out")
        ids = [source.document(k, pixels=False).id for k in range(len(source))]
        assert ids[-3:] == [f"pictures/{n}" for n in ("0.png", "1.jpg", "2.png")], seed
        for line in (work / "out/quarantine.jsonl").open():
            entry = json.loads(line)
            assert all(entry[key] for key in ("input", "where", "reason")), entry
            assert entry["input"] == str(tested)
            assert "\n" not in entry["reason"]
        if name.startswith("pictures/"):  # the other two pictures of the damaged set are as they were
            assert len(ids) >= 5
        assert [problem for problem in check_prepared(work / "out") if problem] == []
        shutil.rmtree(work)


def test_48_mutated_files(tmp_path) -> None:
    fuzz(tmp_path, range(48))


@pytest.mark.slow
def test_a_thousand_mutated_files(tmp_path) -> None:
    fuzz(tmp_path, range(48, 1048))


def test_the_dry_run_of_a_raw_set_says_the_same_as_prepare(tmp_path) -> None:
    shutil.copytree(SAMPLES / "pictures", tmp_path / "pictures")
    (tmp_path / "pictures/1.jpg").write_bytes(b"no picture")
    shutil.copy(SAMPLES / "canonical.jsonl", tmp_path)
    path = str(tmp_path / "canonical.jsonl")
    prepare.main(["--input", path, "--out", str(tmp_path / "out"), "--workers", "0"])
    entries = [json.loads(line) for line in (tmp_path / "out/quarantine.jsonl").open()]
    problems = list(check_raw(find_units([path])))
    assert [p for p in problems if p] == [f"{e['input']}: {e['where']}: {e['reason']}" for e in entries]
    assert len(entries) == 1
    assert problems.count(None) == 2
