"""Samples of WebDataset archives: members with one key belong together. Read as a stream; nothing is extracted."""

from __future__ import annotations

import gzip
import json
import os
import re
import tarfile
from collections.abc import Iterator
from itertools import groupby
from typing import Any, BinaryIO, cast

from data.adapters.files import MAX_DOCUMENT_BYTES, MAX_IMAGE_BYTES, shorten

_BLOCK = 512
_CUT_OFF = "the archive is cut off"
_MAX_NAME_BYTES = 2**16
# A compressed archive may unfold to this many bytes per byte, beyond a first piece: pictures hardly compress.
_MAX_RATIO, _FREE_BYTES = 50, 2**26

_IMAGE = re.compile(r"(?:.*\.)?(?:jpe?g|png|webp|gif|bmp|tiff?|ppm)")
_PICKLED = re.compile(r"(?:.*\.)?(?:pyd|pickle|pkl|pt|pth|npy|npz|joblib)")
_FORMS = ("segments", "conversations", "texts", "text_list")

Member = tuple[str, "bytes | ValueError"]


def tar_records(path: str) -> Iterator[tuple[str, Any, dict[str, bytes]]]:
    """(place, record or ValueError, the sample's files by name and by extension) of every sample."""
    with open(path, "rb") as plain:
        packed = plain.read(2) == b"\x1f\x8b"
        plain.seek(0)
        file = cast(BinaryIO, gzip.GzipFile(fileobj=plain)) if packed else plain
        limit = _FREE_BYTES + _MAX_RATIO * os.path.getsize(path) if packed else None
        for key, members in groupby(_members(file, limit), key=lambda member: _split(member[0])[0]):
            files: dict[str, bytes] = {}
            refused: ValueError | None = None
            size = 0
            for name, data in members:
                if isinstance(data, ValueError):
                    refused = refused or data
                    continue
                size += len(data)
                if size > MAX_DOCUMENT_BYTES:
                    refused = refused or ValueError(f"a sample of more than {MAX_DOCUMENT_BYTES} bytes")
                if refused is None:
                    files[name] = data
            place = f"sample {shorten(key)}"
            if refused is not None:
                yield place, refused, {}
                continue
            members_by_extension = {_split(name)[1]: data for name, data in files.items()}
            try:
                record: Any = _record(key, members_by_extension)
            except (ValueError, RecursionError) as error:
                record = ValueError(str(error))
            yield place, record, members_by_extension | files


def _split(name: str) -> tuple[str, str]:
    """(key, extension): the name is cut at the first dot of its last part."""
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return folder + slash + stem, extension.lower()


def _record(key: str, members: dict[str, bytes]) -> dict[str, Any]:
    content = json.loads(members["json"]) if "json" in members else {}
    if not isinstance(content, dict):
        raise ValueError("the .json member is not an object")
    if any(form in content for form in _FORMS):
        return content
    record: dict[str, Any] = {"id": key, **content}
    images = []
    for extension, data in members.items():
        if _IMAGE.fullmatch(extension):
            record[extension] = data
            images.append(data)
        elif extension in ("txt", "text", "caption"):
            record[extension] = record["text"] = data.decode("utf-8")
    return record | {"image": images} if images else record


def _members(file: BinaryIO, limit: int | None) -> Iterator[Member]:
    """(name, content or why it is refused) of every member, links and devices included, folders left out.

    Written out, because tarfile reads names of any length into memory and takes a damaged header for the end.
    """
    name = long_name = damage = ""
    long_size = -1
    while block := file.read(_BLOCK):
        _check_ratio(file, limit)
        if block.count(0) == _BLOCK:  # ends an archive; another one may follow
            continue
        if len(block) < _BLOCK:
            raise ValueError(_CUT_OFF)
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            header = None
        if header is None or header.size < 0:
            if not damage:  # a member is lost, of the sample before or of the one that comes
                damage = f"the archive is damaged at byte {file.tell() - _BLOCK}, a member of the sample may be lost"
                yield name, ValueError(damage)
            continue
        size, kind = header.size, header.type
        if kind in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE):
            if size > _MAX_NAME_BYTES:
                raise ValueError(f"the archive has a name of {size} bytes")
            data = _content(file, size)
            if kind == tarfile.GNUTYPE_LONGNAME:
                long_name = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif kind == tarfile.XHDTYPE:
                pax = dict(re.findall(rb"(?:^|\n)\d+ (path|size)=([^\n]*)(?=\n)", data))
                long_name = pax.get(b"path", b"").decode("utf-8", "surrogateescape") or long_name
                long_size = int(pax.get(b"size", b"-1"))
            continue
        name, long_name = (long_name or header.name).removeprefix("./"), ""
        header.size, long_size = (header.size if long_size < 0 else long_size), -1
        size = header.size
        if kind == tarfile.DIRTYPE:
            continue
        reason, damage = damage or _refused(name, header), ""
        if reason:
            yield name, ValueError(f"{shorten(name)}: {reason}")
            if kind not in (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE):
                _skip(file, size, limit)
            continue
        try:
            data = _content(file, size)
        except ValueError as error:  # the samples before this one are whole
            yield name, error
            return
        yield name, data


def _refused(name: str, header: tarfile.TarInfo) -> str | None:
    if header.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        return "a link, a device or another special member; only plain files are read"
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        return "the path leaves the archive"
    if _PICKLED.fullmatch(_split(name)[1]):
        return "pickled data is never loaded; leave such members out of the archive"
    if header.size > MAX_IMAGE_BYTES:
        return f"{header.size} bytes are more than the limit of {MAX_IMAGE_BYTES}"
    return None


def _content(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise ValueError(_CUT_OFF)
    file.read(-size % _BLOCK)
    return data


def _skip(file: BinaryIO, size: int, limit: int | None) -> None:
    left = size + -size % _BLOCK
    if limit is None and left:
        file.seek(left - 1, os.SEEK_CUR)
        if not file.read(1):
            raise ValueError(_CUT_OFF)
        return
    while left > 0 and (piece := file.read(min(left, 2**20))):
        left -= len(piece)
        _check_ratio(file, limit)


def _check_ratio(file: BinaryIO, limit: int | None) -> None:
    if limit is not None and file.tell() > limit:
        raise ValueError(f"the archive unfolds to more than {limit} bytes, far more than pictures do; unpack it first")
