"""Frames of a video as pictures between two special tokens: schema, tokenizer, encoder, prepared sets."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import prepare
from data.document import Document, Image, Text, continues, from_json, to_json
from data.encode import Encoder, cut, drop_condition
from data.source.prepared import Prepared
from data.tokenizer import Tokenizer

PLAIN = Tokenizer.bytes(max_grid=8)
VIDEO = PLAIN.with_video()
ENCODER = Encoder(VIDEO, 8, 1, 16)
RNG = np.random.default_rng(0)


def frames(*numbers: int, learn: bool = True) -> tuple[Image, ...]:
    """Frames of 8 x 16 pixels, with these numbers."""
    return tuple(Image(8, 16, RNG.integers(0, 256, (8, 16, 3), np.uint8), learn, n) for n in numbers)


def tokens(document: Document) -> str:
    """The sequence in short: one letter of text, special tokens by name, patches as a dot."""
    names = {VIDEO.inner.token_to_id(f"<|{name}|>"): f"<{name}>" for name in ("bos", "eos", "boi", "eoi", "bov", "eov")}
    names |= {VIDEO.patch: ".", VIDEO.row(1): "1", VIDEO.col(2): "2"}
    return "".join(names.get(t) or chr(t) for t in ENCODER.encode(document).token.tolist())


FRAME = "<boi>12..<eoi>"


def test_ids_of_a_tokenizer_stay_and_two_are_appended() -> None:
    assert (PLAIN.bov, PLAIN.eov) == (None, None)
    assert (VIDEO.bov, VIDEO.eov, VIDEO.vocab_size) == (PLAIN.vocab_size, PLAIN.vocab_size + 1, PLAIN.vocab_size + 2)
    old, new = PLAIN.inner.get_vocab(), VIDEO.inner.get_vocab()
    assert {token: new[token] for token in old} == old
    assert VIDEO.with_video().inner.to_str() == VIDEO.inner.to_str()
    assert VIDEO.encode("<|bov|>") == list(b"<|bov|>")
    assert VIDEO.decode([VIDEO.bov, 65, VIDEO.eov]) == "A"


def test_frames_stand_between_two_tokens() -> None:
    picture = replace(frames(1)[0], frame=0)
    cases: list[tuple[tuple[Text | Image, ...], str]] = [
        ((*frames(1, 2, 3), Text("x")), f"<bos><bov>{FRAME * 3}<eov>x<eos>"),
        ((picture, *frames(1), picture), f"<bos>{FRAME}<bov>{FRAME}<eov>{FRAME}<eos>"),
        # Two videos side by side, and one that begins in the middle (a piece of a document that was cut).
        ((*frames(1), *frames(1, 2)), f"<bos><bov>{FRAME}<eov><bov>{FRAME * 2}<eov><eos>"),
        ((Text("x"), *frames(4, 5)), f"<bos>x<bov>{FRAME * 2}<eov><eos>"),
    ]
    for segments, expected in cases:
        document = Document(segments)
        assert tokens(document) == expected
        assert ENCODER.length(document) == len(ENCODER.encode(document).token)
    columns = ENCODER.encode(Document((Text("x"), *frames(1, 2, learn=False))))
    learned = [False, True, *[False] * (len(columns.token) - 3), True]
    assert columns.learn.tolist() == learned
    # The brackets are text: no place in a grid, and the patches are those of the frames.
    assert int((columns.rows > 0).sum()) == len(columns.patches) == 4


def test_dropping_the_condition_keeps_brackets() -> None:
    document = Document((Text("x"), *frames(1, 2), Text("y")))
    assert tokens(drop_condition(document)) == f"<bos><bov>{FRAME * 2}<eov>y<eos>"


def test_a_video_longer_than_a_row_is_cut_between_frames() -> None:
    document = Document((Text("abc"), *frames(*range(1, 8)), Text("d")))
    for row_length in range(10, 70):
        pieces = cut(document, row_length, ENCODER)
        lengths = [len(ENCODER.encode(piece).token) for piece in pieces]
        assert max(lengths) <= row_length
        assert tuple(s for piece in pieces for s in piece.segments) == document.segments
        for piece, after, length in zip(pieces, pieces[1:], lengths, strict=False):  # no piece could have held more
            larger = replace(piece, segments=(*piece.segments, after.segments[0]))
            assert len(ENCODER.encode(larger).token) > row_length >= length
    with pytest.raises(ValueError, match="segment 2 takes 10 slots"):
        cut(document, 9, ENCODER)


def test_json_and_back(tmp_path: Path) -> None:
    picture = replace(frames(1)[0], frame=0)
    document = Document((Text("x"), *frames(1, 2, learn=False), *frames(1), picture, *frames(1)), "a", "b")
    line = to_json(document, tmp_path)
    kinds = [next(key for key in segment if key != "learn") for segment in json.loads(line)["segments"]]
    assert kinds == ["text", "video", "video", "image", "video"]
    assert from_json(line, tmp_path) == document
    for wrong in ('{"video": []}', '{"video": "a.png"}', '{"video": ["a.png"], "image": "b.png"}', '{"video": [3]}'):
        with pytest.raises(ValueError, match=r"^document: segment 1: "):
            from_json(f'{{"segments": [{wrong}]}}', tmp_path)


def raw(tmp_path: Path) -> Path:
    for k in range(3):
        PIL.Image.fromarray(RNG.integers(0, 256, (8, 16, 3), np.uint8)).save(tmp_path / f"{k}.png")
    segments = [{"video": ["0.png", "1.png"], "learn": False}, {"text": "x"}, {"video": ["2.png"]}]
    documents = [{"id": "v", "segments": segments}, {"id": "t", "segments": [{"text": "y"}]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    return tmp_path / "a.jsonl"


def test_prepared(tmp_path: Path) -> None:
    """From JSONL and from Parquet, and read as the JSONL file is."""
    path = raw(tmp_path)
    expected = from_json(path.read_text().splitlines()[0], tmp_path)
    table = pa.Table.from_pylist([json.loads(line) for line in path.open()])
    pq.write_table(table, tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        out = tmp_path / f"out-{name}"
        prepare.main(["--input", str(tmp_path / name), "--out", str(out), "--video", "--max_grid=8", "--workers=0"])
        source = Prepared(out)
        assert source.document(0).segments == expected.segments
        columns = ENCODER.encode(expected)
        assert source.slots[0, 0] == len(columns.token)
        assert [s.frame for s in source.document(0, pixels=False).segments if isinstance(s, Image)] == [1, 2, 1]
        assert Tokenizer.load(out / "tokenizer.json").bov == VIDEO.bov


def test_without_the_tokens_a_video_is_refused_in_one_line(tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare.main(["--input", str(raw(tmp_path)), "--out", str(out), "--workers=0"])
    assert [document.id for document in map(Prepared(out).document, range(len(Prepared(out))))] == ["t"]
    (line,) = (out / "quarantine.jsonl").read_text().splitlines()
    assert "the tokenizer has no <|bov|> and <|eov|> for a video" in json.loads(line)["reason"]
    with pytest.raises(ValueError, match=r"has no <\|bov\|>"):
        Encoder(PLAIN, 8, 1, 16).encode(Document(frames(1)))


def test_a_set_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """One whose segments have no field `frame`."""
    out = tmp_path / "out"
    (tmp_path / "a.jsonl").write_text(json.dumps({"segments": [{"image": "0.png"}, {"text": "x"}]}) + "\n")
    PIL.Image.fromarray(RNG.integers(0, 256, (8, 16, 3), np.uint8)).save(tmp_path / "0.png")
    prepare.main(["--input", str(tmp_path / "a.jsonl"), "--out", str(out), "--workers=0"])
    expected = Prepared(out).document(0)
    shard = out / "shards/00000.arrow"
    table = pa.ipc.open_file(shard.read_bytes()).read_all()
    rows = [{**row, "segments": [{k: v for k, v in s.items() if k != "frame"} for s in row["segments"]]}
            for row in table.to_pylist()]  # fmt: skip
    struct = table.schema.field("segments").type.value_type
    fields = [field for field in struct if field.name != "frame"]
    schema = table.schema.set(
        table.schema.get_field_index("segments"), pa.field("segments", pa.list_(pa.struct(fields)))
    )
    with pa.ipc.new_file(shard, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_pylist(rows, schema))
    assert Prepared(out).document(0) == expected
    assert not continues(None, expected.segments[0])
