"""What the commands of this package share: one clear line for a mistake, and its exit status."""

from __future__ import annotations

import argparse
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
def working(advice: str) -> Iterator[None]:
    """End the process with one line and status 1 if what is inside fails for a reason outside of the program.

    advice: what needs less memory.
    """
    try:
        yield
    except KeyboardInterrupt:
        fail("interrupted; what was written before stays", 1)
    except (ValueError, OSError) as error:
        fail(error, 1)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        fail(f"out of memory; {advice} ({_first_sentence(error)})", 1)


def is_out_of_memory(error: BaseException) -> bool:
    """Of Python, a GPU or PyTorch's allocator on a CPU."""
    return isinstance(error, MemoryError) or any(
        text in str(error) for text in ("out of memory", "can't allocate memory")
    )


def _first_sentence(error: BaseException) -> str:
    return str(error).partition(". ")[0].strip() or type(error).__name__


def add_input(parser: argparse.ArgumentParser, kinds: tuple[str, ...]) -> None:
    """The options that say what is read, and how."""
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help="files, folders, or a column mapping")
    parser.add_argument("--format", choices=("auto", *kinds), default="auto", help="default: by the names of the files")
    parser.add_argument("--columns", metavar="FILE.yaml", help="which columns make a document (docs/data-format.md)")
    parser.add_argument("--image_folder", metavar="DIR", help="image paths lie in it (default: beside the file)")
