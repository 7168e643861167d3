import numpy as np
import pytest
from sklearn.datasets import load_digits

from data.document import Image, Text
from data.source.digits import Digits, arrays, caption


def test_split_is_fixed_stratified_and_complete() -> None:
    (train, train_labels), (test, test_labels) = arrays("train"), arrays("test")
    assert (len(train), len(test)) == (1438, 359)
    share = np.bincount(test_labels) / (np.bincount(train_labels) + np.bincount(test_labels))
    assert share == pytest.approx(np.full(10, 0.2), abs=0.005)
    both = np.concatenate([train, test])[..., 0].reshape(-1, 64)
    original = np.rint(load_digits().data * 255 / 16).astype(np.uint8)
    assert sorted(map(bytes, both)) == sorted(map(bytes, original))
    assert test_labels[:8].tolist() == [7, 1, 6, 0, 5, 8, 0, 9]  # typed in: the split never changes


def test_documents_match_the_arrays_in_both_directions() -> None:
    source, (pixels, labels) = Digits("test"), arrays("test")
    assert len(source) == len(labels)
    read_first = 0
    for index in range(len(source)):
        segments = source.document(index).segments
        (image,) = (s for s in segments if isinstance(s, Image))
        (text,) = (s for s in segments if isinstance(s, Text))
        assert image.pixels is not None
        np.testing.assert_array_equal(image.pixels, pixels[index])
        assert text == Text(caption(int(labels[index])))
        assert image.learn == (segments[0] is text)
        read_first += segments[0] is image
    assert 0.4 < read_first / len(source) < 0.6
    assert source.document(5) == Digits("test").document(5)
    assert source.document(5, pixels=False).segments != source.document(5).segments
    assert all(isinstance(Digits("train", 0.0).document(index).segments[0], Text) for index in range(20))


def test_gray_levels_and_captions() -> None:
    pixels, _ = arrays("train")
    assert (pixels.dtype, pixels.shape[1:]) == (np.uint8, (8, 8, 3))
    assert set(np.unique(pixels)) == {round(v * 255 / 16) for v in range(17)}
    assert (pixels[..., :1] == pixels).all()
    assert caption(7) == "the digit 7"


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="split"):
        Digits("dev")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="caption_fraction"):
        Digits("train", caption_fraction=-0.1)
    with pytest.raises(IndexError):
        Digits("test").document(359)
