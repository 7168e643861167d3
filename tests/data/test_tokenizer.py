"""The tokenizer against UTF-8 itself, and its special tokens."""

import pickle

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from data.document import Text
from data.source.shapes import Shapes
from data.tokenizer import Tokenizer

BYTES = Tokenizer.bytes(max_grid=8)
TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@given(TEXT)
def test_byte_tokenizer_is_utf8(text: str) -> None:
    ids = BYTES.encode(text)
    assert ids == list(text.encode("utf-8"))
    assert BYTES.inner.encode(text, add_special_tokens=False).ids == ids  # the fast path is the Hugging Face result
    assert BYTES.count(text) == len(ids)
    assert BYTES.encode_array(text).tolist() == ids
    assert BYTES.encode_array(text).dtype == np.int32
    assert BYTES.decode(ids) == text == BYTES.inner.decode(ids)


@given(st.lists(st.integers(0, BYTES.vocab_size - 1)))
def test_decode_skips_specials_and_replaces_invalid_utf8(ids: list[int]) -> None:
    assert BYTES.decode(ids) == bytes(i for i in ids if i < 256).decode("utf-8", "replace")


def test_special_tokens_follow_the_bytes() -> None:
    t = BYTES
    assert [t.pad, t.bos, t.eos, t.boi, t.eoi, t.patch] == list(range(256, 262))
    assert [t.row(h) for h in range(1, 9)] == list(range(262, 270))
    assert [t.col(w) for w in range(1, 9)] == list(range(270, 278))
    assert (t.first_row, t.first_col, t.max_grid, t.vocab_size) == (262, 270, 8, 278)
    for name, id in (("<|bos|>", t.bos), ("<|patch|>", t.patch), ("<|rows:3|>", t.row(3)), ("<|cols:8|>", t.col(8))):
        assert t.inner.token_to_id(name) == id


@pytest.mark.parametrize("text", ["<|bos|>", "a<|eoi|>b", "<|rows:3|><|cols:8|>", "<|patch|>" * 3])
def test_text_never_gives_special_ids(text: str, tmp_path) -> None:
    BYTES.save(tmp_path / "tokenizer.json")
    for tokenizer in (BYTES, Tokenizer.load(tmp_path / "tokenizer.json"), pickle.loads(pickle.dumps(BYTES))):
        assert tokenizer.encode(text) == list(text.encode())
        assert tokenizer._inner_ids(text) == list(text.encode())


def test_save_and_load(tmp_path) -> None:
    BYTES.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.inner.to_str() == BYTES.inner.to_str()
    assert (loaded.pad, loaded.first_col, loaded.max_grid, loaded.vocab_size) == (256, 270, 8, 278)
    assert loaded._is_bytes


def trained() -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(["a small red circle at the top left <|bos|>"] * 3, trainer)
    return inner


@given(TEXT)
def test_merged_tokenizer_round_trips(text: str) -> None:
    ids = MERGED.encode(text)
    assert MERGED.decode([MERGED.bos, *ids, MERGED.eos]) == text
    assert MERGED.count(text) == len(ids)
    assert all(id < MERGED.pad for id in ids)


MERGED = Tokenizer.with_specials(trained(), max_grid=4)


def test_merged_tokenizer_merges() -> None:
    assert MERGED.count("small red circle") < 16
    assert MERGED.vocab_size == MERGED.pad + 6 + 8
    assert not MERGED._is_bytes
    assert all(id < MERGED.pad for id in MERGED.encode("<|bos|> <|rows:2|>"))


def test_tokenizer_that_reads_control_tokens_from_text_is_refused() -> None:
    words = {"<|bos|>": 0, "[UNK]": 1}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    with pytest.raises(ValueError, match="control token"):
        Tokenizer.with_specials(inner)


def test_clear_errors(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"no <\|pad\|> token"):
        Tokenizer(trained())
    with pytest.raises(ValueError, match=r"missing\.json"):
        Tokenizer.load(tmp_path / "missing.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json"):
        Tokenizer.load(tmp_path / "broken.json")
    with pytest.raises(ValueError, match="lone surrogate at character 1"):
        BYTES.encode("a\ud800")
    for size in (0, 9):
        with pytest.raises(ValueError, match=r"1\.\.8"):
            BYTES.row(size)
        with pytest.raises(ValueError, match=r"1\.\.8"):
            BYTES.col(size)
    for id in (-1, 278):
        with pytest.raises(ValueError, match=r"0\.\.277"):
            BYTES.decode([id])
    with pytest.raises(ValueError, match="at least 1"):
        Tokenizer.bytes(max_grid=0)


def test_committed_tokenizer_of_the_shapes_captions_is_what_training_gives() -> None:
    """configs/shapes-tokenizer.json can be made again, and every word of the grammar is one token."""
    source = Shapes(0, "train", 4000, ((48, 48),), 3)
    documents = [source.document(index, pixels=False) for index in range(len(source))]
    texts = [segment.text for document in documents for segment in document.segments if isinstance(segment, Text)]
    committed = Tokenizer.load("configs/shapes-tokenizer.json")
    assert Tokenizer.train(texts, vocab_size=1000).inner.to_str() == committed.inner.to_str()
    for text in texts[:200]:
        assert committed.count(text) == len(text.replace(",", " ,").split())
        assert committed.decode(committed.encode(text)) == text
    assert committed.decode(committed.encode("héllo 你好 🙂")) == "héllo 你好 🙂"
