"""Records of JSONL, JSON, CSV and plain-text files, read as a stream of bounded pieces."""

from __future__ import annotations

import codecs
import csv
import json
import os
from collections.abc import Iterator
from typing import Any, BinaryIO

from data.adapters.files import MAX_RECORD_BYTES

Found = Iterator[tuple[str, Any]]
Part = tuple[int, int | None, int]

_CHUNK = 2**20
# A part ends after this many bytes even if it holds fewer documents than wanted.
_MAX_PART_BYTES = 2**26
# A text file is cut into documents at the first blank line after this many characters.
_TEXT_DOCUMENT = 2**16


def divide_jsonl(path: str, documents: int) -> list[Part]:
    """Byte ranges of about `documents` lines: (start, end, number of the first line)."""
    parts: list[Part] = []
    start, line, lines, place = 0, 1, 0, 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            at = 0
            # Cut at the first line break at which the part is large enough.
            while True:
                cut = _nth(chunk, at, documents - lines)
                if place + len(chunk) - start > _MAX_PART_BYTES and cut < 0:
                    cut = chunk.find(b"\n", max(at, start + _MAX_PART_BYTES - place))
                if cut < 0:
                    lines += chunk.count(b"\n", at)
                    break
                lines += chunk.count(b"\n", at, cut + 1)
                parts.append((start, place + cut + 1, line))
                start, line, lines, at = place + cut + 1, line + lines, 0, cut + 1
            place += len(chunk)
    if place > start:
        parts.append((start, place, line))
    return parts


def _nth(chunk: bytes, start: int, count: int) -> int:
    """Where the count-th line break from `start` on is, or -1."""
    if chunk.count(b"\n", start) < count:
        return -1
    for _ in range(count):
        start = chunk.index(b"\n", start) + 1
    return start - 1


def jsonl_records(path: str, start: int, stop: int | None, line: int) -> Found:
    """The lines of a byte range, decoded; a ValueError in the place of one that is not JSON."""
    with open(path, "rb") as file:
        file.seek(start)
        stop = os.path.getsize(path) if stop is None else stop
        while file.tell() < stop:
            where, content = f"line {line}", file.readline(MAX_RECORD_BYTES + 1)
            line += 1
            if len(content) > MAX_RECORD_BYTES:
                while content and not content.endswith(b"\n"):
                    content = file.readline(_CHUNK)
                yield where, ValueError(f"a line of more than {MAX_RECORD_BYTES} bytes")
            elif content.strip():
                try:
                    record = json.loads(content)
                except (ValueError, RecursionError) as error:
                    record = ValueError(f"not valid JSON: {error}")
                yield where, record


def json_records(path: str) -> Found:
    """The items of a file that holds a list of objects, or objects one after the other."""
    decoder, buffer, at, number, ended = json.JSONDecoder(), "", 0, 1, False
    with open(path, encoding="utf-8-sig") as file:

        def more() -> None:
            nonlocal buffer, at, ended
            piece = file.read(max(_CHUNK, len(buffer) - at))
            ended = not piece
            buffer, at = buffer[at:] + piece, 0

        more()
        at = len(buffer) - len(buffer.lstrip())
        is_list = buffer.startswith("[", at)
        at += is_list
        while True:
            while at < len(buffer) and buffer[at] in " \t\r\n,":
                at += 1
            if at == len(buffer) and not ended:
                more()
                continue
            if at == len(buffer) or (is_list and buffer[at] == "]"):
                break
            try:
                record, end = decoder.raw_decode(buffer, at)
            except json.JSONDecodeError as error:
                if ended:
                    raise ValueError(f"not valid JSON: {error.msg}") from None
                if len(buffer) - at > MAX_RECORD_BYTES:
                    raise ValueError(
                        f"not valid JSON, or more than {MAX_RECORD_BYTES} characters: {error.msg}"
                    ) from None
                more()
                continue
            yield f"item {number}", record
            number, at = number + 1, end
        if is_list and at == len(buffer):
            raise ValueError("the list does not end: the file is cut off")


def divide_csv(path: str, documents: int) -> list[Part]:
    """Byte ranges of `documents` records behind the header: (start, end, number of the first record)."""
    parts: list[Part] = []
    with open(path, "rb") as file:
        records = _csv_reader(file, path)
        next(records, None)
        start, first, number = file.tell(), 1, 0
        try:
            for number, _ in enumerate(records, 1):
                if number - first + 1 == documents:
                    parts.append((start, file.tell(), first))
                    start, first = file.tell(), number + 1
        except (csv.Error, ValueError):
            pass  # the rest is one part, and reading it tells why
        if os.path.getsize(path) > start:
            parts.append((start, None, first))
    return parts


def csv_records(path: str, start: int, stop: int | None, number: int) -> Found:
    """The records of a byte range as objects by the names in the header."""
    with open(path, "rb") as file:
        header = next(_csv_reader(file, path), None)
        if not header:
            raise ValueError("the file has no header")
        if start:
            file.seek(start)
        stop = os.path.getsize(path) if stop is None else stop
        if file.tell() >= stop:
            raise ValueError("holds no rows behind its header")
        for values in _csv_reader(file, path):
            if len(values) == len(header):
                yield f"row {number}", dict(zip(header, values, strict=True))
            elif values:
                yield f"row {number}", ValueError(f"{len(values)} fields where the header has {len(header)}")
            number += 1
            if file.tell() >= stop:
                return


def _csv_reader(file: BinaryIO, path: str) -> Any:
    csv.field_size_limit(MAX_RECORD_BYTES)

    def decoded() -> Iterator[str]:
        while line := file.readline(MAX_RECORD_BYTES + 1):
            if len(line) > MAX_RECORD_BYTES:
                raise ValueError(f"a line of more than {MAX_RECORD_BYTES} bytes")
            # What is not UTF-8 becomes lone surrogates, which are refused per record.
            yield line.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")

    return csv.reader(decoded(), delimiter="\t" if path.lower().endswith(".tsv") else ",")


def text_records(path: str) -> Found:
    """A text file as documents of paragraphs: together they are the file, character by character."""
    paragraphs: list[str] = []
    current: list[str] = []
    size, number, line_number, first = 0, 1, 0, 1
    blank = False
    with open(path, encoding="utf-8-sig", newline="") as file:
        while line := file.readline(_TEXT_DOCUMENT):
            # Also where no blank line is found far and wide.
            if (blank and line.strip()) or size >= 2 * _TEXT_DOCUMENT:
                paragraphs.append("".join(current))
                current = []
                if size >= _TEXT_DOCUMENT:
                    yield f"line {first}", _text_record(path, number, paragraphs)
                    paragraphs, size, number, first = [], 0, number + 1, line_number + 1
            current.append(line)
            size += len(line)
            line_number += line.endswith("\n")
            blank = not line.strip()
    if current:
        paragraphs.append("".join(current))
    if paragraphs:
        yield f"line {first}", _text_record(path, number, paragraphs)


def _text_record(path: str, number: int, paragraphs: list[str]) -> dict[str, Any]:
    name = os.path.basename(path)
    return {"id": name if number == 1 else f"{name}#{number}", "segments": [{"text": p} for p in paragraphs]}
