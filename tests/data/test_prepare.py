"""data.prepare: the set equals what the documents encode to, whoever makes it and however often it is killed."""

import io
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pytest

from data import prepare
from data.document import Image, Text
from data.encode import Encoder, drop_condition
from data.image import resize_to_grid
from data.source import Source
from data.source.jsonl import Jsonl
from data.source.prepared import Prepared
from data.tokenizer import Tokenizer
from data.tokenizer import main as tokenizer_main

SAMPLES = Path("tests/data/samples")
COLUMNS = ("token", "index", "row", "col", "rows", "cols", "learn", "patches")


def run(*options: Any) -> None:
    prepare.main([str(option) for option in ("--workers", 0, *options)])


def command(*options: Any, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "data.prepare", *map(str, options)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment},
    )  # fmt: skip


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def many(folder: Path, count: int, seed: int = 0) -> Path:
    """A JSONL file of `count` documents with a picture each, and a broken line now and then."""
    rng = np.random.default_rng(seed)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for k in range(5):
        pixels = rng.integers(0, 256, (8 + k, 9 + 3 * k, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"pictures/{k}.png")
    records = []
    for k in range(count):
        segments = [{"text": f"number {k} " * (k % 7)}, {"image": f"pictures/{k % 5}.png"}, {"text": "end"}]
        records.append("{broken" if k % 50 == 13 else json.dumps({"id": str(k), "segments": segments}))
    (folder / "many.jsonl").write_text("\n".join(records) + "\n")
    return folder / "many.jsonl"


def save(image: PIL.Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def fitted(segment: Text | Image, encoder: Encoder) -> Text | Image:
    """A picture in the size of its grid, as prepared sets give it."""
    if isinstance(segment, Text):
        return segment
    assert segment.pixels is not None
    pixels = resize_to_grid(segment.pixels, *encoder.grid(segment.height, segment.width), encoder.patch_size)
    return Image(*pixels.shape[:2], pixels, segment.learn)


def test_the_set_is_what_the_documents_encode_to(tmp_path) -> None:
    """Against the JSONL source, the encoder on it, and an index made by counting columns."""
    path = many(tmp_path, 12)
    path.write_text("".join(line for line in path.open() if "broken" not in line))
    run("--input", path, "--out", tmp_path / "out", "--shard_documents", 5, "--max_patches", 16)
    source, reference = Prepared(tmp_path / "out"), Jsonl(path)
    checked: Source = source
    assert checked.name == "out"
    encoder = Encoder(Tokenizer.bytes(), 8, 1, 16)
    source.check(encoder)
    assert len(source) == len(reference) == 12
    copy = pickle.loads(pickle.dumps(source))
    assert len(pickle.dumps(source)) < 3000
    for index in (7, 0, 11, 3, 4, 5, 1, 2, 6, 8, 9, 10):
        expected = reference.document(index)
        expected_columns = encoder.encode(expected)
        for one in (source, copy):
            document = one.document(index)
            kept = tuple(fitted(s, encoder) for s in expected.segments if not isinstance(s, Text) or s.text)
            assert (document.segments, document.id) == (kept, expected.id)
            for name in COLUMNS:
                assert np.array_equal(getattr(encoder.encode(document), name), getattr(expected_columns, name))
        dropped = encoder.encode(drop_condition(expected))
        assert source.slots[:, index].tolist() == [len(expected_columns.token), len(dropped.token)]
        assert source.patches[index] == len(expected_columns.patches)
        assert all(s.pixels is None for s in source.document(index, pixels=False).segments if isinstance(s, Image))
    assert source.slots.dtype == np.int32
    shards = sorted((tmp_path / "out/shards").iterdir())
    assert [shard.name for shard in shards] == ["00000.arrow", "00001.arrow", "00002.arrow"]
    statistics = json.loads((tmp_path / "out/statistics.json").read_text())
    columns = [encoder.encode(reference.document(k)) for k in range(12)]
    assert statistics["slots"] == sum(len(c.token) for c in columns)
    assert statistics["patches"] == sum(len(c.patches) for c in columns)
    assert statistics["tokens"] == sum(int((c.token < 256).sum()) for c in columns)
    assert sum(statistics["documents_by_slots_up_to"].values()) == 12
    for index in (-1, 12):
        with pytest.raises(IndexError, match=f"document {index} of 12"):
            source.document(index)


def test_the_texts_are_not_tokenized_again(tmp_path, monkeypatch) -> None:
    run("--input", SAMPLES / "canonical.jsonl", "--out", tmp_path / "out")
    source, encoder = Prepared(tmp_path / "out"), Encoder(Tokenizer.bytes(), 8, 1, 1024)
    expected = encoder.encode(Jsonl(SAMPLES / "canonical.jsonl").document(2))
    monkeypatch.setattr(Tokenizer, "encode_array", None)
    monkeypatch.setattr(Tokenizer, "count", None)
    assert np.array_equal(encoder.encode(source.document(2)).token, expected.token)
    assert encoder.length(source.document(2, pixels=False)) == len(expected.token)


def test_another_tokenizer_or_patch_is_refused(tmp_path) -> None:
    run("--input", SAMPLES / "canonical.jsonl", "--out", tmp_path / "out", "--patch_size", 4, "--max_patches", 64)
    source, tokenizer = Prepared(tmp_path / "out"), Tokenizer.bytes()
    source.check(Encoder(Tokenizer.load(tmp_path / "out/tokenizer.json"), 4, 1, 64))
    for encoder, message in (
        (Encoder(tokenizer, 8, 1, 64), "was prepared with patch_size 4, the run has 8"),
        (Encoder(tokenizer, 4, 2, 64), "was prepared with min_patches 1, the run has 2"),
        (Encoder(tokenizer, 4, 1, 65), "was prepared with max_patches 64, the run has 65"),
        (Encoder(Tokenizer.bytes(32), 4, 1, 64), "was prepared with another tokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            source.check(encoder)


@pytest.mark.parametrize(
    ("kind", "size", "expected"),
    [
        ("exif", (6, 10), (10, 6)), ("alpha", (6, 10), (6, 10)), ("gray", (6, 10), (6, 10)), ("deep", (6, 10), (6, 10)),
        ("cmyk", (6, 10), (6, 10)), ("palette", (6, 10), (6, 10)), ("dot", (1, 1), (1, 1)), ("patch", (8, 8), (8, 8)),
        ("narrow", (3, 4000), (3, 4000)), ("low", (5000, 2), (5000, 2)),
    ],
)  # fmt: skip
def test_pictures_of_all_kinds(tmp_path, kind: str, size: tuple[int, int], expected: tuple[int, int]) -> None:
    """Sizes are (height, width); the pixels behind a prepared set are those of the same file read directly."""
    height, width = size
    rgb = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    exif = PIL.Image.Exif()
    exif[0x0112] = 8
    deep = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 65536, (height, width), dtype=np.uint16))
    content = {
        "exif": lambda: save(rgb, "JPEG", exif=exif), "alpha": lambda: save(rgb.convert("RGBA"), "PNG"),
        "gray": lambda: save(rgb.convert("L"), "PNG"), "deep": lambda: save(deep, "PNG"),
        "cmyk": lambda: save(rgb.convert("CMYK"), "JPEG"), "palette": lambda: save(rgb.convert("P"), "GIF"),
    }.get(kind, lambda: save(rgb, "PNG"))()  # fmt: skip
    (tmp_path / "a.img").write_bytes(content)
    (tmp_path / "a.jsonl").write_text(json.dumps({"segments": [{"image": "a.img"}]}) + "\n")
    run("--input", tmp_path / "a.jsonl", "--out", tmp_path / "out", "--max_patches", 256, "--decode")
    source, encoder = Prepared(tmp_path / "out"), Encoder(Tokenizer.bytes(), 8, 1, 256)
    (outline,) = source.document(0, pixels=False).segments
    assert isinstance(outline, Image)
    assert (outline.height, outline.width) == expected
    assert source.document(0).segments == (fitted(Jsonl(tmp_path / "a.jsonl").document(0).segments[0], encoder),)
    columns = encoder.encode(source.document(0))
    rows, cols = int(columns.rows.max()), int(columns.cols.max())
    assert source.slots[0, 0] == 2 + 4 + rows * cols
    grids = {"dot": (1, 1), "patch": (1, 1), "narrow": (1, 64), "low": (64, 1)}
    if kind in grids:
        assert (rows, cols) == grids[kind]


def test_only_text_only_images_and_empty_segments(tmp_path) -> None:
    shutil.copytree(SAMPLES / "pictures", tmp_path / "pictures")
    picture, empty = {"image": "pictures/0.png"}, {"text": ""}
    documents = [[{"text": "x"}], [picture, picture], [empty, picture, empty], [empty], [{"text": " "}]]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"segments": d}) + "\n" for d in documents))
    run("--input", tmp_path / "a.jsonl", "--out", tmp_path / "out")
    source = Prepared(tmp_path / "out")
    kinds = [[type(s).__name__ for s in source.document(k).segments] for k in range(len(source))]
    assert kinds == [["Text"], ["Image", "Image"], ["Image"], ["Text"]]
    assert [json.loads(line) for line in (tmp_path / "out/quarantine.jsonl").open()] == [
        {"input": str(tmp_path / "a.jsonl"), "where": "line 4", "reason": "holds neither text nor image"}
    ]


def test_processes_make_the_same_files_and_a_second_run_changes_nothing(tmp_path) -> None:
    path = many(tmp_path, 120)
    run("--input", path, "--out", tmp_path / "one", "--shard_documents", 30)
    process = command("--input", path, "--out", tmp_path / "two", "--shard_documents", 30, "--workers", 2)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "kept 117 documents" in output
    assert "rejected 3" in output
    assert "4/4" in errors
    first = files(tmp_path / "one")
    assert first == files(tmp_path / "two")
    assert len([name for name in first if name.startswith("shards/")]) == 4
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "one/shards").iterdir()}
    run("--input", path, "--out", tmp_path / "one", "--shard_documents", 30)
    assert files(tmp_path / "one") == first
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "one/shards").iterdir()}


def test_other_options_or_input_are_refused(tmp_path, capsys) -> None:
    path = many(tmp_path, 10)
    run("--input", path, "--out", tmp_path / "out")
    before = files(tmp_path / "out")
    cases: list[tuple[list[Any], str]] = [
        (["--patch_size", 4], "patch_size was 8"),
        (["--max_grid", 32], "tokenizer_sha256 was"),
        (["--decode"], "decode was False"),
    ]
    for options, message in cases:
        with pytest.raises(SystemExit, match="2"):
            run("--input", path, "--out", tmp_path / "out", *options)
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ")
        assert message in error
    path.write_text(path.read_text() + "\n")
    with pytest.raises(SystemExit, match="2"):
        run("--input", path, "--out", tmp_path / "out")
    assert "the input files have changed" in capsys.readouterr().err
    assert files(tmp_path / "out") == before
    with pytest.raises(SystemExit, match="2"):
        run("--input", path, "--out", tmp_path)
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--input", "gone.jsonl"], "gone.jsonl: no such file or folder"),
        (["--input", "{path}", "--patch_size", "0"], "patch_size is 0"),
        (["--input", "{path}", "--min_patches", "5", "--max_patches", "4"], "min_patches 5 and max_patches 4"),
        (["--input", "{path}", "--tokenizer", "gone.json"], "gone.json: not a usable tokenizer: no such file"),
        (["--input", "{path}", "--columns", "gone.yaml"], "gone.yaml: cannot be read: No such file"),
        (["--input", "{path}", "--image_folder", "gone"], "gone: no such folder"),
        (["--input", "{path}", "--bogus"], "unrecognized arguments: --bogus"),
        (["--input", "{path}", "--workers", "-1"], "--workers must be at least 0"),
    ],
)
def test_mistakes_are_one_line_and_status_2(tmp_path, capsys, options: list[str], message: str) -> None:
    path = many(tmp_path / "in", 3)
    with pytest.raises(SystemExit, match="2"):
        run("--out", tmp_path / "out", *(option.format(path=path) for option in options))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "out").exists()


def test_nothing_kept_is_a_failure_with_reasons(tmp_path, capsys) -> None:
    (tmp_path / "a.jsonl").write_text("{oops\n")
    with pytest.raises(SystemExit, match="1"):
        run("--input", tmp_path / "a.jsonl", "--out", tmp_path / "out")
    assert "no document was kept" in capsys.readouterr().err
    assert json.loads((tmp_path / "out/quarantine.jsonl").read_text())["where"] == "line 1"


def kill_and_finish(folder: Path, kills: int, seed: int, documents: int) -> None:
    """Prepare under SIGKILL at random moments, then to the end; the files must be those of an undisturbed run."""
    path = many(folder, documents)
    options = ("--input", path, "--shard_documents", max(1, documents // 24), "--workers", 2)
    started = time.monotonic()
    assert command(*options, "--out", folder / "whole").wait() == 0
    whole = time.monotonic() - started
    rng = random.Random(seed)
    print(f"seed {seed}")
    hit = finished = 0
    while hit < kills:
        process = command(*options, "--out", folder / "killed")
        time.sleep(rng.uniform(whole / 5, whole))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            hit += 1
        else:
            assert process.returncode == 0, process.communicate()[1]
            finished += 1
        process.communicate()
        if (folder / "killed/manifest.json").exists():
            assert files(folder / "killed").keys() >= files(folder / "whole").keys()
            if hit < kills:
                shutil.rmtree(folder / "killed")
    process = command(*options, "--out", folder / "killed")
    assert process.wait() == 0, process.communicate()[1]
    process.communicate()
    assert files(folder / "killed") == files(folder / "whole")


def test_killed_at_three_moments(tmp_path) -> None:
    kill_and_finish(tmp_path, 3, seed=1, documents=240)


@pytest.mark.slow
def test_killed_at_twenty_moments(tmp_path) -> None:
    kill_and_finish(tmp_path, 20, seed=2, documents=4800)


def evil(folder: Path) -> str:
    """A PYTHONPATH that makes the decoder die of pictures of 13 x 13 pixels, and hang on 17 x 17."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import os, time\n"
        "import data.image\n"
        "inner = data.image.image_size\n"
        "def image_size(source):\n"
        "    size = inner(source)\n"
        "    if size == (13, 13): os.abort()\n"
        "    if size == (17, 17): time.sleep(1000)\n"
        "    return size\n"
        "data.image.image_size = image_size\n"
    )
    return f"{folder}{os.pathsep}{os.getcwd()}"


def test_a_decoder_that_dies_or_hangs_costs_one_document(tmp_path) -> None:
    sizes = [8, 13, 9, 17, 10, 13]
    for k, size in enumerate(sizes):
        PIL.Image.new("RGB", (size, size)).save(tmp_path / f"{k}.png")
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"id": str(k), "segments": [{"image": f"{k}.png"}]}) + "\n" for k in range(6))
    )
    process = command(
        "--input", tmp_path / "a.jsonl", "--out", tmp_path / "out", "--workers", 1, "--timeout", 3,
        PYTHONPATH=evil(tmp_path / "evil"),
    )  # fmt: skip
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    source = Prepared(tmp_path / "out")
    assert [source.document(k).id for k in range(len(source))] == ["0", "2", "4"]
    reasons = [json.loads(line) for line in (tmp_path / "out/quarantine.jsonl").open()]
    assert [(r["where"], r["reason"]) for r in reasons] == [
        ("line 2", "the process that read it ended with status -6"),
        ("line 4", "took more than 3 seconds"),
        ("line 6", "the process that read it ended with status -6"),
    ]


def test_memory_does_not_grow_with_the_data(tmp_path) -> None:
    """Peak memory of two runs, one with eight times the data of the other (16 MB and 128 MB of pictures)."""
    noise = np.random.default_rng(0).integers(0, 256, (290, 300, 3), dtype=np.uint8)
    (tmp_path / "a.png").write_bytes(save(PIL.Image.fromarray(noise), "PNG"))
    peaks = []
    for count in (64, 512):
        path = tmp_path / f"{count}.jsonl"
        path.write_text(json.dumps({"segments": [{"image": "a.png"}]}) + "\n" * 1)
        path.write_text(path.read_text() * count)
        code = (
            "import resource, sys; from data import prepare; prepare.main(sys.argv[1:]);"
            "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        options = ["--input", path, "--out", tmp_path / f"out{count}", "--workers", 0]
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, options)], capture_output=True, text=True, check=True
        )
        peaks.append(int(done.stdout.split()[-1]) * (1 if sys.platform == "linux" else 1 / 1024))
        assert (tmp_path / f"out{count}/shards/00000.arrow").stat().st_size > count * 250_000
    assert peaks[1] < peaks[0] + 60_000, peaks  # KiB; the data grew by 112 MiB


def test_only_one_process_prepares_a_folder(tmp_path, capsys) -> None:
    import fcntl

    path = many(tmp_path, 3)
    (tmp_path / "out/work").mkdir(parents=True)
    with open(tmp_path / "out/work/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit, match="2"):
            run("--input", path, "--out", tmp_path / "out")
    assert "another process is preparing it" in capsys.readouterr().err
    run("--input", path, "--out", tmp_path / "out")


def test_a_broken_picture_is_found_at_once_or_when_read(tmp_path, capsys) -> None:
    content = save(PIL.Image.fromarray(np.zeros((40, 40, 3), np.uint8)), "PNG")
    (tmp_path / "cut.png").write_bytes(content[:-30])
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"id": "c", "segments": [{"image": "cut.png"}]}\n')
    run("--input", tmp_path / "a.jsonl", "--out", tmp_path / "header")
    run("--input", tmp_path / "a.jsonl", "--out", tmp_path / "decoded", "--decode")
    assert (len(Prepared(tmp_path / "header")), len(Prepared(tmp_path / "decoded"))) == (2, 1)
    with pytest.raises(ValueError, match=r"header: document 1 \('c'\): segment 1: image data of \d+ bytes: unreadable"):
        Prepared(tmp_path / "header").document(1)


def test_damaged_sets_are_refused_by_name(tmp_path) -> None:
    with pytest.raises(ValueError, match="no prepared set"):
        Prepared(tmp_path)
    run("--input", SAMPLES / "canonical.jsonl", "--out", tmp_path / "out")
    np.save(tmp_path / "out/lengths.npy", np.zeros((3, 7), np.int32))
    with pytest.raises(ValueError, match="does not fit manifest"):
        Prepared(tmp_path / "out")
    (tmp_path / "out/lengths.npy").unlink()
    with pytest.raises(ValueError, match=r"lengths\.npy"):
        Prepared(tmp_path / "out")
    (tmp_path / "out/manifest.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="is not of format 1"):
        Prepared(tmp_path / "out")


def test_tokenizers_by_name(tmp_path) -> None:
    texts = SAMPLES / "text"
    tokenizer_main(["train", "--input", str(texts), "--vocab_size", "270", "--out", str(tmp_path / "own.json")])
    own = Tokenizer.load(tmp_path / "own.json")
    contents = [path.read_text() for path in sorted(texts.iterdir())]
    # The same paragraphs in the same order, split by hand.
    paragraphs = ["The first paragraph.\nIts second line.\n\n\n", "The second.", contents[1]]
    assert own.inner.to_str() == Tokenizer.train(paragraphs, 270).inner.to_str()
    assert own.pad == 270
    assert all(own.decode(own.encode(content)) == content for content in contents)
    run("--input", texts, "--out", tmp_path / "out", "--tokenizer", tmp_path / "own.json")
    source = Prepared(tmp_path / "out")
    source.check(Encoder(own, 8, 1, 1024))
    for k, content in enumerate(contents):
        assert own.decode(i for s in source.document(k).segments for i in s.ids.tolist()) == content

    # A file of another model: no special tokens of ours, and settings that would shorten and fill texts.
    foreign = json.loads(own.inner.to_str())
    foreign["added_tokens"] = []
    (tmp_path / "foreign.json").write_text(json.dumps(foreign))
    import tokenizers

    inner = tokenizers.Tokenizer.from_file(str(tmp_path / "foreign.json"))
    inner.enable_truncation(3)
    inner.enable_padding(length=9)
    inner.save(str(tmp_path / "foreign.json"))
    named = Tokenizer.named(str(tmp_path / "foreign.json"), max_grid=16)
    assert named.max_grid == 16
    assert named.decode(named.encode(contents[0])) == contents[0]


def test_auto_tokenizer(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    inner = Tokenizer.train(["a small red circle"] * 3, 280).inner
    inner = type(inner).from_str(json.dumps({**json.loads(inner.to_str()), "added_tokens": []}))
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(tmp_path / "hub")
    named = Tokenizer.named(str(tmp_path / "hub"), max_grid=8)
    assert named.max_grid == 8
    assert named.encode("a small red circle é") == inner.encode("a small red circle é").ids
    with pytest.raises(ValueError, match="no/such: not a usable tokenizer"):
        Tokenizer.named("no/such")


def test_shards_are_arrow_files_that_others_can_read(tmp_path) -> None:
    run("--input", SAMPLES / "llava.json", "--out", tmp_path / "out")
    table = pa.ipc.open_file(str(tmp_path / "out/shards/00000.arrow")).read_all()
    (row,) = table.to_pylist()
    assert [s["text"] for s in row["segments"] if s["image"] is None] == [
        "\nWhat is ", "?\n", "A picture.\n", "Thanks.\n", "Yes."]  # fmt: skip
    assert row["segments"][0]["image"] == (SAMPLES / "pictures/0.png").read_bytes()
    assert [s["learn"] for s in row["segments"]] == [False, False, False, False, True, False, True]
    assert row["segments"][1]["ids"] == list(b"\nWhat is ")
