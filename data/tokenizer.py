"""Text to token ids and back, together with the special tokens that frame documents and images.

`python -m data.tokenizer train --input FILES --vocab_size N --out tokenizer.json` learns one from the text of any data
that `python -m data.prepare` reads.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

_NAMES = ("pad", "bos", "eos", "boi", "eoi", "patch")
# Behind all others and only where asked for, so that the ids of tokenizers without them are the same.
_VIDEO_NAMES = ("bov", "eov")


def _byte_alphabet() -> list[str]:
    """The printable character that the byte-level pre-tokenizer uses for each of the 256 bytes (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    return [table[byte] for byte in range(256)]


class Tokenizer:
    """A Hugging Face `tokenizers.Tokenizer` that has Ropeway's special tokens.

    Attributes `pad, bos, eos, boi, eoi, patch` are the ids of `<|pad|>` ... `<|patch|>`. `<|rows:h|>` and `<|cols:w|>`
    for h, w = 1..max_grid have the consecutive ids `first_row + h - 1` and `first_col + w - 1`. `bov` and `eov` are the
    ids of the brackets of a video, None where the tokenizer has none.
    """

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        """Use `inner` as it is. Raises ValueError where a special token is missing or would come out of plain text."""
        # Without this a user who types "<|bos|>" would smuggle a control token in. It is not kept in the JSON form.
        inner.encode_special_tokens = True
        inner.no_truncation()  # files made for other models carry these settings; they would silently change the text
        inner.no_padding()
        self.inner = inner
        vocabulary = inner.get_vocab(with_added_tokens=True)
        for name in _NAMES:
            if f"<|{name}|>" not in vocabulary:
                raise ValueError(f"tokenizer has no <|{name}|> token; make it with Tokenizer.with_specials(...)")
        self.pad, self.bos, self.eos, self.boi, self.eoi, self.patch = (vocabulary[f"<|{name}|>"] for name in _NAMES)
        self.first_row, row_count = _sizes(vocabulary, "rows")
        self.first_col, col_count = _sizes(vocabulary, "cols")
        if row_count != col_count:
            raise ValueError(f"tokenizer has {row_count} <|rows:h|> but {col_count} <|cols:w|> tokens; need as many")
        self.max_grid = row_count
        self.vocab_size = max(vocabulary.values()) + 1
        sizes = [first + n for first in (self.first_row, self.first_col) for n in range(self.max_grid)]
        self.bov, self.eov = (vocabulary.get(f"<|{name}|>") for name in _VIDEO_NAMES)
        if (self.bov is None) != (self.eov is None):
            raise ValueError("tokenizer has one of <|bov|> and <|eov|>; it needs both or none")
        named = [vocabulary[token] for name in (*_NAMES, *_VIDEO_NAMES) if (token := f"<|{name}|>") in vocabulary]
        self._specials = frozenset([*named, *sizes])
        self._is_bytes = _is_plain_bytes(inner)
        typed = " ".join(f"<|{name}|>" for name in (*_NAMES, *_VIDEO_NAMES, "rows:1"))
        if not self._specials.isdisjoint(self._inner_ids(typed)):
            raise ValueError("tokenizer turns the text '<|bos|>' into a control token; use a byte-level BPE model")

    @classmethod
    def with_specials(cls, inner: tokenizers.Tokenizer, max_grid: int = 64) -> Tokenizer:
        """Append the special tokens to `inner` (changed in place), for images of up to max_grid x max_grid patches."""
        if max_grid < 1:
            raise ValueError(f"max_grid is {max_grid}; it must be at least 1")
        names = [*_NAMES, *(f"{axis}:{size}" for axis in ("rows", "cols") for size in range(1, max_grid + 1))]
        inner.add_special_tokens([AddedToken(f"<|{name}|>", special=True, normalized=False) for name in names])
        return cls(inner)

    def with_video(self) -> Tokenizer:
        """The tokenizer with the brackets of a video, appended where there are none."""
        tokens = [AddedToken(f"<|{name}|>", special=True, normalized=False) for name in _VIDEO_NAMES]
        inner = tokenizers.Tokenizer.from_str(self.inner.to_str())
        inner.add_special_tokens(tokens)
        return Tokenizer(inner)

    @classmethod
    def bytes(cls, max_grid: int = 64) -> Tokenizer:
        """Ids 0..255 are the bytes of UTF-8; the special tokens follow. Needs no training and no file."""
        inner = tokenizers.Tokenizer(models.BPE(vocab={c: byte for byte, c in enumerate(_byte_alphabet())}, merges=[]))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.decoder = decoders.ByteLevel()
        return cls.with_specials(inner, max_grid)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, max_grid: int = 64) -> Tokenizer:
        """Learn a byte-level BPE of at most vocab_size text ids (256 bytes, then merges); lossless on any text.

        The same texts give the same tokenizer.
        """
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        inner.train_from_iterator(
            texts, trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
        )
        return cls.with_specials(inner, max_grid)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Read a `tokenizer.json` that already has the special tokens. Raises ValueError naming the file."""
        try:
            return cls(tokenizers.Tokenizer.from_file(os.fspath(path)))
        except Exception as error:  # the Rust side raises plain Exception for missing and malformed files alike
            raise ValueError(f"{os.fspath(path)}: not a usable tokenizer file: {error}") from error

    @classmethod
    def named(cls, name: str, max_grid: int = 64) -> Tokenizer:
        """The tokenizer that a user names: "bytes", a `tokenizer.json`, or what `transformers.AutoTokenizer` loads.

        Special tokens are appended where there are none, for images of up to max_grid x max_grid patches. Raises
        ValueError naming what cannot be used.
        """
        if name == "bytes":
            return cls.bytes(max_grid)
        try:
            if os.path.isfile(name):
                inner = tokenizers.Tokenizer.from_file(name)
            else:
                inner = _auto_tokenizer(name)
            return cls(inner) if inner.token_to_id("<|pad|>") is not None else cls.with_specials(inner, max_grid)
        except Exception as error:  # the Rust side raises plain Exception, transformers all kinds
            raise ValueError(f"{name}: not a usable tokenizer: {' '.join(str(error).split())}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `tokenizer.json`, readable by `tokenizers` and `transformers`. Raises OSError."""
        Path(path).write_text(self.inner.to_str(pretty=True), encoding="utf-8")  # its own `save` raises Exception

    def __reduce__(self) -> tuple[object, tuple[str]]:
        # Pickling the inner tokenizer would lose encode_special_tokens, so that data workers encoded differently.
        return _from_json, (self.inner.to_str(),)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`. Never a special id, whatever the text contains. Raises ValueError on lone surrogates."""
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """`encode` as int32 array of shape (number of ids,)."""
        if self._is_bytes:
            return np.frombuffer(_utf8(text), dtype=np.uint8).astype(np.int32)
        return np.array(self._inner_ids(text), dtype=np.int32)

    def count(self, text: str) -> int:
        """Number of ids of `text`, without building them where that is possible."""
        return len(_utf8(text)) if self._is_bytes else len(self._inner_ids(text))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`. Special tokens are skipped and invalid UTF-8 becomes U+FFFD.

        Raises ValueError for an id outside 0..vocab_size-1.
        """
        kept = []
        for id in map(int, ids):
            if not 0 <= id < self.vocab_size:
                raise ValueError(f"token id {id} is outside 0..{self.vocab_size - 1}")
            if id not in self._specials:
                kept.append(id)
        return bytes(kept).decode("utf-8", "replace") if self._is_bytes else self.inner.decode(kept)

    def row(self, rows: int) -> int:
        """Id of `<|rows:h|>` for h = 1..max_grid."""
        return self.first_row + self._size(rows) - 1

    def col(self, cols: int) -> int:
        """Id of `<|cols:w|>` for w = 1..max_grid."""
        return self.first_col + self._size(cols) - 1

    def _size(self, size: int) -> int:
        if not 1 <= size <= self.max_grid:
            raise ValueError(f"an image of {size} patches along one side is outside the tokenizer's 1..{self.max_grid}")
        return size

    def _inner_ids(self, text: str) -> list[int]:
        _utf8(text)
        return self.inner.encode(text, add_special_tokens=False).ids


def _auto_tokenizer(name: str) -> tokenizers.Tokenizer:
    """From a folder or the Hub. Code that comes with a tokenizer is never run."""
    if name.endswith(".json"):
        raise ValueError("no such file")
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise ValueError("no such file; ids of the Hub need pip install -e '.[hf]' -c constraints.txt") from None
    inner = getattr(AutoTokenizer.from_pretrained(name), "backend_tokenizer", None)
    if not isinstance(inner, tokenizers.Tokenizer):
        raise ValueError("has no fast form (tokenizer.json)")
    return tokenizers.Tokenizer.from_str(inner.to_str())


def _from_json(json: str) -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(json))


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"text is not valid Unicode (lone surrogate at character {error.start})") from error


def _sizes(vocabulary: dict[str, int], axis: str) -> tuple[int, int]:
    """(id of size 1, number of sizes) of the `<|axis:n|>` tokens. Raises ValueError unless the ids are consecutive."""
    found = {int(m[1]): id for token, id in vocabulary.items() if (m := re.fullmatch(rf"<\|{axis}:(\d+)\|>", token))}
    first = found.get(1, 0)
    if not found or any(found.get(size) != first + size - 1 for size in range(1, len(found) + 1)):
        raise ValueError(f"tokenizer's <|{axis}:1|>, <|{axis}:2|>, ... are missing or not consecutive ids")
    return first, len(found)


def _is_plain_bytes(inner: tokenizers.Tokenizer) -> bool:
    """Whether encoding is exactly `list(text.encode())`, which NumPy does about ten times faster."""
    if not isinstance(inner.model, models.BPE) or inner.normalizer is not None or inner.post_processor is not None:
        return False
    vocabulary = inner.get_vocab(with_added_tokens=False)
    byte_level = isinstance(inner.pre_tokenizer, pre_tokenizers.ByteLevel) and not inner.pre_tokenizer.add_prefix_space
    return byte_level and vocabulary == {c: byte for byte, c in enumerate(_byte_alphabet())}


def main(argv: Sequence[str] | None = None) -> None:
    """Exit status 0: done; 2: the input or an option is wrong."""
    from data.adapters import KINDS, RawDocument, find_units, read
    from data.adapters.forms import load_columns
    from data.command import OneLineParser, add_input, working
    from data.document import Text

    parser = OneLineParser(prog="python -m data.tokenizer", description="Tokenizers of one's own.", allow_abbrev=False)
    train = parser.add_subparsers(required=True, metavar="train").add_parser("train", help="learn a byte-level BPE")
    add_input(train, KINDS)
    train.add_argument("--vocab_size", type=int, required=True, help="text ids at most: 256 bytes, then merges")
    train.add_argument("--max_grid", type=int, default=64, help="most patch rows or columns of an image")
    train.add_argument("--video", action="store_true", help="with the tokens that bracket the frames of a video")
    train.add_argument("--out", required=True, metavar="FILE", help="the tokenizer.json to write")
    arguments = parser.parse_args(argv)
    with working(2):
        if arguments.vocab_size < 256:
            raise ValueError(f"--vocab_size is {arguments.vocab_size}; it must be at least 256")
        columns = load_columns(arguments.columns) if arguments.columns else None
        units = find_units(arguments.input, arguments.format)
        documents = (
            item
            for unit in units
            for item in read(unit, columns, arguments.image_folder)
            if isinstance(item, RawDocument)
        )
        texts = (segment.text for document in documents for segment in document.segments if isinstance(segment, Text))
        tokenizer = Tokenizer.train(texts, arguments.vocab_size, arguments.max_grid)
        tokenizer = tokenizer.with_video() if arguments.video else tokenizer
        partial = f"{arguments.out}.tmp"
        tokenizer.save(partial)
        os.replace(partial, arguments.out)
    print(f"{arguments.out}: {tokenizer.pad} text ids and {tokenizer.vocab_size - tokenizer.pad} special tokens")


if __name__ == "__main__":
    main()
