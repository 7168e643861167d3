"""Every format prepares to the rows of the same documents in the canonical schema; the rules of each are typed in."""

import csv
import io
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data import prepare
from data.adapters import RawDocument, RawImage, Rejection, find_units, lines, read
from data.adapters.forms import load_columns
from data.document import Text
from data.encode import Encoder
from data.source.jsonl import Jsonl
from data.source.prepared import Prepared
from data.tokenizer import Tokenizer

SAMPLES = Path("tests/data/samples")
ENCODER = Encoder(Tokenizer.bytes(), 4, 1, 64)
COLUMNS = ("token", "index", "row", "col", "rows", "cols", "learn", "patches")


def prepared(out: Path, *options: str) -> Prepared:
    prepare.main(["--out", str(out), "--workers", "0", "--patch_size", "4", "--max_patches", "64", *options])
    return Prepared(out)


def same_rows(one: Any, other: Any) -> None:
    assert len(one) == len(other)
    for index in range(len(one)):
        a, b = (ENCODER.encode(source.document(index)) for source in (one, other))
        for name in COLUMNS:
            assert np.array_equal(getattr(a, name), getattr(b, name)), (index, name)


@pytest.mark.parametrize(
    ("sample", "canonical"),
    [
        *((name, "canonical.jsonl") for name in (
            "canonical.jsonl", "canonical.parquet", "canonical.arrow", "pictures", "captions.csv", "interleaved.jsonl",
            "pairs.tar", "hf.yaml",
        )),
        ("llava.json", "llava-canonical.jsonl"),
        ("mmc4.jsonl", "mmc4-canonical.jsonl"),
        ("text", "text-canonical.jsonl"),
    ],
)  # fmt: skip
def test_every_sample_prepares_to_the_rows_of_its_canonical_form(tmp_path, sample: str, canonical: str) -> None:
    """The other side is the JSONL source, which reads and tokenizes the files itself."""
    source = prepared(tmp_path / "out", "--input", str(SAMPLES / sample))
    same_rows(source, Jsonl(SAMPLES / canonical))
    assert (tmp_path / "out/quarantine.jsonl").read_bytes() == b""


def test_the_check_of_rows_can_fail(tmp_path) -> None:
    lines_ = (SAMPLES / "canonical.jsonl").read_text().replace("red", "rad")
    shutil.copytree(SAMPLES / "pictures", tmp_path / "pictures")
    (tmp_path / "a.jsonl").write_text(lines_)
    with pytest.raises(AssertionError, match="token"):
        same_rows(Jsonl(tmp_path / "a.jsonl"), Jsonl(SAMPLES / "canonical.jsonl"))


def test_an_image_folder_may_have_its_table_as_csv(tmp_path) -> None:
    shutil.copytree(SAMPLES / "pictures", tmp_path / "pictures", ignore=shutil.ignore_patterns("metadata*"))
    with open(SAMPLES / "captions.csv", encoding="utf-8", newline="") as file:
        rows = [(os.path.basename(path), caption) for path, caption in list(csv.reader(file))[1:]]
    with open(tmp_path / "pictures/metadata.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("file_name", "text"), *rows])
    (tmp_path / "pictures/README.txt").write_text("not a document")
    source = prepared(tmp_path / "out", "--input", str(tmp_path / "pictures"))
    same_rows(source, Jsonl(SAMPLES / "canonical.jsonl"))


def documents(path: Path | str, columns: str | None = None, **options: Any) -> list[RawDocument | Rejection]:
    mapping = load_columns(columns) if columns else None
    return [item for unit in find_units([str(path)], **options) for item in read(unit, mapping)]


def outline(document: RawDocument | Rejection) -> list[Any]:
    """Texts (empty ones left out) and images (as their size) with their learn flag, or the reason of a rejection."""
    if isinstance(document, Rejection):
        return [document.where, document.reason]
    return [
        (s.text, s.learn) if isinstance(s, Text) else (PIL.Image.open(io.BytesIO(s.data)).size, s.learn)
        for s in document.segments
        if not isinstance(s, Text) or s.text
    ]


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", (width, height)).save(file, "PNG")
    return file.getvalue()


def test_columns_give_order_and_learning(tmp_path) -> None:
    (tmp_path / "a.png").write_bytes(png(2, 3))
    record = {"pics": ["a.png", "a.png"], "ask": "what?", "say": "two", "n": 5}
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n" + json.dumps({"ask": "x"}) + "\n")
    (tmp_path / "columns.yaml").write_text(
        "segments: [{image: pics, learn: false}, {text: ask, learn: false}, {text: say}]\nid: n\n"
    )
    good, bad = documents(tmp_path / "a.jsonl", str(tmp_path / "columns.yaml"))
    assert outline(good) == [((2, 3), False), ((2, 3), False), ("what?", False), ("two", True)]
    assert isinstance(good, RawDocument)
    assert good.id == "5"
    assert outline(bad) == ["line 2", "there is no column 'pics'; there are ask"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("segments: 3", "`segments` must list columns"),
        ("other: 1", "must hold `segments`"),
        ("segments: [{text: a, image: b}]", "expected `text: COLUMN` or `image: COLUMN`"),
        ("segments: [{text: a, lern: true}]", "expected `text: COLUMN`"),
        ("segments: [{text: a}]\ndataset: {path: x, trust_remote_code: true}", "`dataset` must hold `path`; known are"),
        ("{", "not valid YAML"),
    ],
)
def test_mistakes_in_a_mapping(tmp_path, content: str, message: str) -> None:
    path = tmp_path / "columns.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"columns\.yaml: {message}"):
        load_columns(str(path))


def test_forms_and_their_rejections(tmp_path) -> None:
    (tmp_path / "a.png").write_bytes(png(2, 3))
    talk = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "yes"}]
    cases: list[tuple[Any, list[Any]]] = [
        ({"text": "only"}, [("only", True)]),
        ({"image": "a.png"}, [((2, 3), True)]),
        ({"file_names": ["a.png", "a.png"], "caption": "c"}, [("c", True), ((2, 3), True), ((2, 3), True)]),
        ({"segments": [{"text": ""}, {"image": "a.png"}, {"text": ""}]}, [((2, 3), True)]),
        ({"segments": [{"text": ""}]}, ["holds neither text nor image"]),
        ({"text": None}, ["no known form has the keys text; name the columns with --columns"]),
        ({"a": 1, "b": 2}, ["no known form has the keys a, b; name the columns with --columns"]),
        ({"segments": [{"text": "x", "lern": 1}]}, [
            "document: segment 1: unknown key 'lern'; known are image, learn, text, video"]),
        ({"text": 5}, ["'text' must be text, got int"]),
        ({"image": 5}, ["segment 1: an image must be a path or the bytes of a file, not int"]),
        ({"text": "x", "image": "b.png"}, ["segment 2: b.png: no such file"]),
        ({"image": "https://x.org/a.png"}, ["segment 1: https://x.org/a.png: is a URL; nothing is downloaded"]),
        ({"texts": ["a", None], "images": [None, "a.png"]}, [("a", True), ((2, 3), True)]),
        ({"texts": ["a"], "images": []}, ["1 texts and 0 images; the lists must be of one length"]),
        ({"texts": ["a"], "images": ["a.png"]}, ["place 1: expected either a text or an image, the other null"]),
        ({"conversations": talk, "image": "a.png"}, [((2, 3), False), ("\n", False), ("yes", True)]),
        ({"conversations": talk}, ["1 <image> marks for 0 images"]),
        ({"conversations": [{"from": "cat", "value": "x"}]}, ["turn 1: unknown speaker 'cat'"]),
        ({"text_list": ["a"], "image_info": [{"matched_text_index": 1}]}, [
            '"matched_text_index" 1 is not a place in "text_list"']),
        ([1], ["expected an object, got list"]),
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record, _ in cases))
    for (record, expected), found in zip(cases, documents(tmp_path / "a.jsonl"), strict=True):
        got = outline(found)
        assert (got[1:] if isinstance(found, Rejection) else got) == expected, record


def test_webdataset_samples(tmp_path) -> None:
    members = [
        ("d/1.jpg", png(2, 3)), ("d/1.json", b'{"caption": "from json"}'), ("d/1.cls", b"7"),
        ("d/2.1.png", png(4, 1)), ("d/2.0.png", png(5, 1)), ("d/2.txt", b"two"),
        ("d/3.json", b'{"segments": [{"image": "a.png"}, {"text": "x"}]}'), ("d/3.a.png", png(6, 1)),
        ("d/4.txt", b"\xff"), ("d/5.json", b"{"), ("d/" + "n" * 150 + ".txt", b"long name"),
    ]  # fmt: skip
    for format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        for suffix, mode in (("tar", "w"), ("tgz", "w:gz")):
            path = tmp_path / f"a{format}.{suffix}"
            with tarfile.open(path, mode, format=format) as archive:  # type: ignore[call-overload]
                for name, data in members:
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
            found = documents(path)
            assert [outline(item) for item in found[:3]] == [
                [("from json", True), ((2, 3), True)],
                [("two", True), ((4, 1), True), ((5, 1), True)],
                [((6, 1), True), ("x", True)],
            ]
            assert outline(found[3])[0] == "sample d/4"
            assert "can't decode byte 0xff" in outline(found[3])[1]
            assert outline(found[4])[0] == "sample d/5"
            assert outline(found[5]) == [("long name", True)]
            assert isinstance(found[5], RawDocument)
            assert found[5].id == "d/" + "n" * 150


LINE = st.sampled_from(["", " ", '{"text": "a"}', '{"text": "' + "b" * 60 + '"}', "{oops", '{"text": "é"}\r'])


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(LINE, max_size=12), st.booleans(), st.integers(1, 5), st.integers(3, 40), st.integers(20, 200))
def test_parts_of_a_jsonl_file_are_the_whole(
    tmp_path, rows: list[str], final_break: bool, documents_: int, chunk: int, most: int
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(("\n".join(rows) + ("\n" if final_break and rows else "")).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "_CHUNK", chunk)
        patch.setattr(lines, "_MAX_PART_BYTES", most)
        parts = [list(lines.jsonl_records(str(path), *part)) for part in lines.divide_jsonl(str(path), documents_)]
    found = [item for part in parts for item in part]
    expected = [(f"line {n}", row) for n, row in enumerate(rows, 1) if row.strip()]
    assert [where for where, _ in found] == [where for where, _ in expected]
    for (_, record), (_, row) in zip(found, expected, strict=True):
        assert isinstance(record, ValueError) if row == "{oops" else record == json.loads(row)
    assert all(len(part) <= documents_ for part in parts)


CELL = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=6)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(CELL, CELL), max_size=9), st.integers(1, 4))
def test_parts_of_a_csv_file_are_the_whole(tmp_path, rows: list[tuple[str, str]], documents_: int) -> None:
    path = tmp_path / "a.csv"
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("text", "other"), *rows])
    parts = [list(lines.csv_records(str(path), *part)) for part in lines.divide_csv(str(path), documents_)]
    found = [item for part in parts for item in part]
    assert found == [(f"row {n}", {"text": a, "other": b}) for n, (a, b) in enumerate(rows, 1)]
    assert all(len(part) <= documents_ for part in parts)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.sampled_from("ab \n\r"), max_size=200), st.integers(1, 30))
def test_a_text_file_is_its_paragraphs(tmp_path, content: str, size: int) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "_TEXT_DOCUMENT", size)
        records = [record for _, record in lines.text_records(str(path))]
    pieces = [segment["text"] for record in records for segment in record["segments"]]
    assert "".join(pieces) == content
    assert all(pieces)
    assert all(sum(len(s["text"]) for s in record["segments"]) <= 4 * size + 2 for record in records)


def test_json_lists_are_streamed(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(lines, "_CHUNK", 7)
    items = [{"text": "é" * n, "deep": [[n]]} for n in range(20)]
    for content, expected in (
        (json.dumps(items), items), (json.dumps(items, indent=2), items), ("[]", []), ("", []),
        (json.dumps(items[5]), items[5:6]), ("\n".join(map(json.dumps, items)), items),
    ):  # fmt: skip
        (tmp_path / "a.json").write_text(content)
        assert [record for _, record in lines.json_records(str(tmp_path / "a.json"))] == expected
    (tmp_path / "a.json").write_text(json.dumps(items)[:-9])
    found = documents(tmp_path / "a.json")
    assert len(found) == 20  # the one without text, 18 good ones, and where it breaks off
    assert isinstance(found[-1], Rejection)
    assert found[-1].where == "after item 19"


def test_units_are_the_same_every_time_and_hold_what_was_asked(tmp_path) -> None:
    for name in ("b", "a", "sub/c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.jsonl").write_text('{"text": "x"}\n' * 10)
    units = find_units([str(tmp_path)], documents=4)
    assert [(os.path.relpath(u.paths[0], tmp_path), u.first) for u in units] == [
        (name, first) for name in ("a.jsonl", "b.jsonl", "sub/c.jsonl") for first in (1, 5, 9)
    ]
    assert units == find_units([str(tmp_path)], documents=4)
    (tmp_path / "x.csv").write_text("text\nx\n")
    with pytest.raises(ValueError, match="several kinds"):
        find_units([str(tmp_path)])
    assert len(find_units([str(tmp_path)], format="csv")) == 1
    with pytest.raises(ValueError, match="holds no parquet data files"):
        find_units([str(tmp_path)], format="parquet")
    with pytest.raises(ValueError, match="no such file or folder"):
        find_units([str(tmp_path / "gone")])
    (tmp_path / "x.xyz").write_text("x")
    with pytest.raises(ValueError, match="unknown kind of file"):
        find_units([str(tmp_path / "x.xyz")])


def test_the_raw_image_is_the_file(tmp_path) -> None:
    found = documents(SAMPLES / "canonical.jsonl")
    images = [
        s.data for item in found if isinstance(item, RawDocument) for s in item.segments if isinstance(s, RawImage)
    ]
    assert images == [(SAMPLES / "pictures" / name).read_bytes() for name in ("0.png", "1.jpg", "2.png")]


def test_a_streamed_dataset_is_what_the_loaded_one_is(tmp_path, monkeypatch) -> None:
    """Three files of a local dataset through the streaming API, also when it is stopped between two of them."""
    for number in range(3):
        rows = [{"n": f"{number}-{k}", "t": f"text {k}", "i": {"bytes": (SAMPLES / "pictures/0.png").read_bytes()}}
                for k in range(4)]  # fmt: skip
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{number}.parquet")
    files = json.dumps([str(tmp_path / f"{number}.parquet") for number in range(3)])
    for name, streaming in (("loaded", "false"), ("streamed", "true")):
        (tmp_path / f"{name}.yaml").write_text(
            f"dataset: {{path: parquet, data_files: {files}, streaming: {streaming}}}\n"
            "segments: [{text: t}, {image: i, learn: false}]\nid: n\n"
        )

    def options(name: str, out: str) -> list[str]:
        return ["--input", str(tmp_path / f"{name}.yaml"), "--out", str(tmp_path / out), "--workers=0"]

    for name in ("loaded", "streamed"):
        prepare.main(options(name, name))
    loaded, streamed = Prepared(tmp_path / "loaded"), Prepared(tmp_path / "streamed")
    assert len(streamed) == len(loaded) == 12
    assert [streamed.document(k) for k in range(12)] == [loaded.document(k) for k in range(12)]
    assert [document.id for document in map(streamed.document, (0, 4, 11))] == ["0-0", "1-0", "2-3"]
    assert len(list((tmp_path / "streamed/shards").iterdir())) == 3

    stop = prepare.make_shard

    def once(job, unit, number, *rest) -> None:
        if number == 1:
            raise OSError("stopped")
        stop(job, unit, number, *rest)

    monkeypatch.setattr(prepare, "make_shard", once)
    with pytest.raises(SystemExit):
        prepare.main(options("streamed", "again"))
    monkeypatch.undo()
    prepare.main(options("streamed", "again"))
    for file in ("lengths.npy", "statistics.json", *(f"shards/0000{k}.arrow" for k in range(3))):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "streamed" / file).read_bytes()


def test_streaming_is_true_or_false(tmp_path) -> None:
    (tmp_path / "a.yaml").write_text("dataset: {path: parquet, streaming: 1}\nsegments: [{text: t}]\n")
    with pytest.raises(ValueError, match="`streaming` must be true or false"):
        load_columns(str(tmp_path / "a.yaml"))
