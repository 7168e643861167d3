"""The JSONL source against splitting the whole file at once."""

import json
import pickle

import numpy as np
import PIL.Image
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data.source.jsonl
from data.document import Document, Image, Text, to_json
from data.source import Source
from data.source.jsonl import Jsonl


def line(text: str) -> bytes:
    return json.dumps({"segments": [{"text": text}]}, ensure_ascii=False).encode()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from([b"", b" ", b"\r", line("a"), line("\u2028 é"), line("b" * 50) + b"\r"]), max_size=12),
    st.booleans(),
    st.integers(1, 40),
)
def test_lines_are_found(tmp_path, lines: list[bytes], final_break: bool, chunk: int) -> None:
    path = tmp_path / "file.jsonl"
    path.write_bytes(b"\n".join(lines) + (b"\n" if final_break else b""))
    expected = [json.loads(one)["segments"][0]["text"] for one in lines if one.strip()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.source.jsonl, "_CHUNK", chunk)
        if not expected:
            with pytest.raises(ValueError, match=r"file\.jsonl: holds no documents"):
                Jsonl(path)
            return
        source = Jsonl(path)
        assert [source.document(k) for k in range(len(source))] == [Document((Text(text),)) for text in expected]


def test_round_trip_with_images(tmp_path) -> None:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (4 + k, 6, 3), dtype=np.uint8) for k in range(5)]
    documents = [Document((Text("see "), Image(*p.shape[:2], p, learn=False)), str(k)) for k, p in enumerate(pictures)]
    (tmp_path / "set.jsonl").write_text("\n".join(to_json(d, tmp_path) for d in documents), encoding="utf-8")
    source: Source = Jsonl(tmp_path / "set.jsonl")
    assert source.name == "set"
    assert len(source) == 5
    copy = pickle.loads(pickle.dumps(source))
    for k in (4, 0, 2, 1, 3):
        assert source.document(k) == documents[k] == copy.document(k)
        assert source.document(k, pixels=False).segments[1] == Image(4 + k, 6, None, learn=False)


def test_byte_order_mark(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + line("x") + b"\n")
    assert Jsonl(tmp_path / "a.jsonl").document(0) == Document((Text("x"),))


def test_mistakes_name_file_line_and_segment(tmp_path, monkeypatch) -> None:
    path = tmp_path / "a.jsonl"
    PIL.Image.new("RGB", (3, 3)).save(tmp_path / "ok.png")
    path.write_bytes(
        b"\n".join([line("x"), b"", b'{"segments": [{"image": "ok.png"}, {"image": "no.png"}]}', b"{oops"])
    )
    source = Jsonl(path)
    assert len(source) == 3
    for chunk in (7, 2**24):
        monkeypatch.setattr(data.source.jsonl, "_CHUNK", chunk)
        with pytest.raises(ValueError, match=r"a\.jsonl:3: segment 2: .*no\.png: no such file$"):
            source.document(1)
        with pytest.raises(ValueError, match=r"a\.jsonl:4: not valid JSON"):
            source.document(2)
    for index in (-1, 3):
        with pytest.raises(IndexError, match=f"document {index} of 3"):
            source.document(index)
    with pytest.raises(ValueError, match=r"gone\.jsonl: cannot be read: No such file"):
        Jsonl(tmp_path / "gone.jsonl")
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        Jsonl(tmp_path)
