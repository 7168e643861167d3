"""What the commands of this package share: one clear line for a mistake, and its exit status."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


class OneLineParser(argparse.ArgumentParser):
    """A command line whose mistakes are reported as one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (see --help)", 2)


def fail(message: object, status: int) -> NoReturn:
    """End the process with one line. Status 2: the input is wrong; 1: something failed in the middle of work."""
    print("error:", " ".join(str(message).split()), file=sys.stderr, flush=True)
    raise SystemExit(status)


@contextmanager
def working(status: int) -> Iterator[None]:
    """End the process with one line if what is inside fails for a reason outside of the program. Memory that runs out,
    and Ctrl-C, are status 1."""
    try:
        yield
    except KeyboardInterrupt:
        fail("interrupted", 1)
    except (ValueError, OSError) as error:
        fail(error, status)
    except (RuntimeError, MemoryError) as error:
        if not (line := out_of_memory(error)):
            raise
        fail(line, 1)


def out_of_memory(error: BaseException) -> str | None:
    """One line of an error that says that memory ran out: Python's, a GPU's, or of PyTorch's allocator on a CPU."""
    if isinstance(error, MemoryError):
        return f"out of memory {error}".strip()
    said = re.search(r"(out of memory|can't allocate memory)[^.\n]*", str(error))
    return f"out of memory: {said[0]}" if said else None


def add_input(parser: argparse.ArgumentParser, kinds: tuple[str, ...]) -> None:
    """The options that say what is read, and how."""
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help="files, folders, or a column mapping")
    parser.add_argument("--format", choices=("auto", *kinds), default="auto", help="default: by the names of the files")
    parser.add_argument("--columns", metavar="FILE.yaml", help="which columns make a document (docs/data-format.md)")
    parser.add_argument("--image_folder", metavar="DIR", help="image paths lie in it (default: beside the file)")
