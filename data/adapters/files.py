"""Reading files that a stranger may have made: never out of the folder, never more than a limit, never a device."""

from __future__ import annotations

import io
import os
import re
import stat
import zipfile
from typing import Any

# Bytes of one image file, of one JSON line or CSV record, and of all images of one document, at most.
MAX_IMAGE_BYTES = 2**26
MAX_RECORD_BYTES = 2**25
MAX_DOCUMENT_BYTES = 2**28

_URL = re.compile(r"(?i)(data:|[a-z][a-z0-9+.-]*://)")


def is_inside(path: str, root: str) -> bool:
    """Whether `path`, links followed, lies in the folder `root` (a real path)."""
    return os.path.commonpath([os.path.realpath(path), root]) == root


def read_inside(name: str, folder: str, root: str) -> bytes:
    """The bytes of the file `name`, relative to `folder`. Raises ValueError if it leaves `root` or is not wanted."""
    if _URL.match(name):
        raise ValueError(f"{shorten(name)}: is a URL; nothing is downloaded")
    if not name:
        raise ValueError("the path of the image is empty")
    try:
        path = os.path.join(folder, name)
        if not is_inside(path, root):
            raise ValueError(f"{shorten(name)}: lies outside the input folder")
        # Not blocking: opening a named pipe would wait for a writer.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ValueError(f"{shorten(name)}: not a regular file")
            refuse_size(name, status.st_size)
            return file.readall()
    except FileNotFoundError:
        raise ValueError(f"{shorten(name)}: no such file") from None
    except OSError as error:
        raise ValueError(f"{shorten(name)}: cannot be read: {error.strerror}") from None


def image_bytes(value: Any, folder: str, root: str) -> bytes:
    """An image as it stands in a record: a path, the bytes of a file, or {"bytes", "path"}. Raises ValueError."""
    if isinstance(value, dict) and set(value) <= {"bytes", "path"}:
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, str):
        value = read_inside(value, folder, root)
    if not isinstance(value, bytes):
        raise ValueError(f"an image must be a path or the bytes of a file, not {type(value).__name__}")
    refuse_size("image", len(value))
    if _holds_zip(value):
        raise ValueError("the image file holds a ZIP archive")
    return value


def refuse_size(name: str, size: int) -> None:
    """Raises ValueError for an image file of more than MAX_IMAGE_BYTES bytes."""
    if size > MAX_IMAGE_BYTES:
        raise ValueError(f"{shorten(name)}: {size} bytes are more than the limit of {MAX_IMAGE_BYTES} for images")


def _holds_zip(data: bytes) -> bool:
    """Whether the bytes end in a readable ZIP directory, alone or behind a picture."""
    if b"PK\5\6" not in data[-66000:]:
        return False
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return bool(archive.infolist())
    except Exception:  # four bytes that look alike by chance
        return False


def shorten(text: str, limit: int = 200) -> str:
    """For messages: names and keys come from the data and can be of any length."""
    return text if len(text) <= limit else f"{text[:limit]}..."


def one_line(error: BaseException) -> str:
    """The message of an error as one line."""
    return shorten(" ".join(str(error).split()) or type(error).__name__, 500)
