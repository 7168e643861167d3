"""Documents: strict parsing with one clear line per mistake, and the round trip through JSON."""

import json
import re

import numpy as np
import PIL.Image
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.document import Document, Image, Text, from_json, parse_document, to_json

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)
TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@st.composite
def images(draw) -> Image:
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    values = draw(st.binary(min_size=height * width * 3, max_size=height * width * 3))
    return Image(height, width, np.frombuffer(values, np.uint8).reshape(height, width, 3), draw(st.booleans()))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.builds(Text, TEXT, st.booleans()) | images(), min_size=1, max_size=5), TEXT, TEXT)
def test_json_round_trip(tmp_path, segments: list[Text | Image], id: str, source: str) -> None:
    document = Document(tuple(segments), id, source)
    line = to_json(document, tmp_path)
    assert "\n" not in line
    assert from_json(line, tmp_path) == document == from_json(line.encode(), tmp_path)
    assert parse_document(json.loads(line), tmp_path) == document
    outline = from_json(line, tmp_path, pixels=False)
    for with_pixels, without in zip(document.segments, outline.segments, strict=True):
        if isinstance(with_pixels, Image):
            assert without == Image(with_pixels.height, with_pixels.width, None, with_pixels.learn)
        else:
            assert without == with_pixels


def test_defaults_and_paths(tmp_path) -> None:
    PIL.Image.fromarray(PIXELS).save(tmp_path / "a.png")
    document = parse_document({"segments": [{"text": "x"}, {"image": "a.png"}]}, tmp_path)
    assert document == Document((Text("x", True), Image(6, 4, PIXELS, True)), "", "")
    absolute = parse_document({"segments": [{"image": str(tmp_path / "a.png"), "learn": False}]}, tmp_path / "other")
    assert absolute.segments == (Image(6, 4, PIXELS, False),)


def test_images_of_equal_content_share_a_file(tmp_path) -> None:
    image = Image(6, 4, PIXELS)
    to_json(Document((image, image, Image(4, 6, PIXELS.reshape(4, 6, 3)))), tmp_path)
    assert len(list((tmp_path / "images").iterdir())) == 2


@pytest.mark.parametrize(
    ("obj", "message"),
    [
        ([], "f:3: expected a JSON object, got a list"),
        ({}, 'f:3: "segments" must be a non-empty list'),
        ({"segments": []}, 'f:3: "segments" must be a non-empty list'),
        ({"segments": {"text": "x"}}, 'f:3: "segments" must be a non-empty list'),
        ({"segments": [{"text": "x"}], "Id": "1"}, "f:3: unknown key 'Id'; known are id, segments, source"),
        ({"segments": [{"text": "x"}], "id": 1}, 'f:3: "id" must be a string, got a number'),
        ({"segments": [{"text": "x"}], "source": None}, 'f:3: "source" must be a string, got null'),
        ({"segments": ["x"]}, 'f:3: segment 1: expected an object with one of "text", "image"'),
        ({"segments": [{"text": "x"}, {}]}, 'f:3: segment 2: expected an object with one of "text", "image"'),
        ({"segments": [{"text": "x", "image": "a"}]}, 'f:3: segment 1: expected an object with one of "text", "ima'),
        ({"segments": [{"text": "x", "lern": True}]}, "f:3: segment 1: unknown key 'lern'; known are image, learn, t"),
        ({"segments": [{"text": "x", "learn": 1}]}, 'f:3: segment 1: "learn" must be true or false, got a number'),
        ({"segments": [{"text": ["x"]}]}, 'f:3: segment 1: "text" must be a string, got a list'),
        ({"segments": [{"text": "x\ud800"}]}, 'f:3: segment 1: "text" is not valid Unicode (lone surrogate at 1)'),
        ({"segments": [{"image": ""}]}, 'f:3: segment 1: "image" is an empty path'),
        ({"segments": [{"text": "x"}, {"image": "no.png"}]}, "f:3: segment 2: FOLDER/no.png: no such file"),
        ({"segments": [{"image": "bad.png"}]}, "f:3: segment 1: FOLDER/bad.png: not an image of a known kind"),
        ({"segments": [{"image": "nul\0.png"}]}, "f:3: segment 1: FOLDER/nul"),
    ],
)
def test_mistakes_are_named(tmp_path, obj, message: str) -> None:
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    for pixels in (True, False):
        expected = "^" + re.escape(message.replace("FOLDER", str(tmp_path)))
        with pytest.raises(ValueError, match=expected) as caught:
            parse_document(obj, tmp_path, pixels, where="f:3")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("line", ["", "{", '{"segments": [{"text": "x"}]} tail', b"\xff\xfe", "[" * 100000])
def test_broken_json(tmp_path, line: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"^f:3: not valid JSON"):
        from_json(line, tmp_path, where="f:3")


def test_image_checks_its_pixels() -> None:
    with pytest.raises(ValueError, match=r"expected uint8 \(4, 6, 3\)"):
        Image(4, 6, PIXELS)
    with pytest.raises(ValueError, match="float64"):
        Image(6, 4, PIXELS.astype(float))
    with pytest.raises(ValueError, match="at least 1"):
        Image(0, 4)
    with pytest.raises(ValueError, match="no pixels to write"):
        to_json(Document((Image(6, 4),)), "/nowhere")
    assert Image(6, 4, PIXELS) != Image(6, 4, 255 - PIXELS)
    assert Image(6, 4) != Image(6, 4, PIXELS)
    assert Image(6, 4) != Text("x")
    assert Image(6, 4) == Image(6, 4)
