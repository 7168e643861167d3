"""`python -m data.validate PATH`: what is wrong with a prepared set, or what `data.prepare` would reject of raw data.

Exit status 0: nothing; 1: problems, one per line; 2: the path or an option is wrong.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.adapters import KINDS, RawDocument, Unit, find_units, read
from data.adapters.files import one_line
from data.adapters.forms import Columns, load_columns
from data.command import OneLineParser, working
from data.document import Document, Image
from data.encode import Encoder, drop_condition
from data.shard import measure, sha256_of
from data.source.prepared import Prepared
from data.tokenizer import Tokenizer


def main(argv: Sequence[str] | None = None) -> None:
    """Print the problems, at most --show of them, and their number."""
    parser = OneLineParser(prog="python -m data.validate", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("path", nargs="+", help="a prepared set, or files and folders of raw data")
    parser.add_argument("--format", choices=("auto", *KINDS), default="auto", help="of raw data; default: by the names")
    parser.add_argument("--columns", metavar="FILE.yaml", help="of raw data: which columns make a document")
    parser.add_argument("--image_folder", metavar="DIR", help="of raw data: the folder that image paths lie in")
    parser.add_argument("--decode", action="store_true", help="decode every image, not only its header")
    parser.add_argument("--show", type=int, default=20, help="problems to print at most (default: 20)")
    arguments = parser.parse_args(argv)
    with working(2):
        if len(arguments.path) == 1 and Path(arguments.path[0], "manifest.json").is_file():
            found = check_prepared(Path(arguments.path[0]), arguments.decode)
        else:
            columns = load_columns(arguments.columns) if arguments.columns else None
            units = find_units(arguments.path, arguments.format)
            found = check_raw(units, columns, arguments.image_folder, arguments.decode)
        kept = problems = 0
        for problem in tqdm(found, unit="document", file=sys.stderr, disable=not sys.stderr.isatty()):
            kept += problem is None
            if problem is not None:
                problems += 1
                if problems <= arguments.show:
                    print("".join(c if c.isprintable() else ascii(c)[1:-1] for c in problem))  # names are the data's
    print(f"{kept} documents, {problems} problems" + (f", {arguments.show} shown" if problems > arguments.show else ""))
    raise SystemExit(1 if problems else 0)


def check_prepared(path: Path, decode: bool = False) -> Iterator[str | None]:
    """None for every sound document of a prepared set, and each problem as a line."""
    manifest = json.loads((path / "manifest.json").read_bytes())
    prepared = Prepared(path)
    listed = {**manifest["files"], **{shard["file"]: shard for shard in manifest["shards"]}}
    damaged = False
    for name, entry in listed.items():
        try:
            if (path / name).stat().st_size != entry["bytes"] or sha256_of(path / name) != entry["sha256"]:
                raise ValueError("is not what the manifest says; prepare it again")
        except (ValueError, OSError) as error:
            damaged = True
            yield f"{path / name}: {one_line(error)}"
    if damaged:
        return  # of files that have been altered nothing else can be said, and reading them is not safe
    options = prepared.options
    encoder = Encoder(
        Tokenizer.load(path / "tokenizer.json"), options["patch_size"], options["min_patches"], options["max_patches"]
    )
    for index in range(len(prepared)):
        try:
            document = prepared.document(index, pixels=decode)
            _check_document(document, encoder, [*prepared.slots[:, index].tolist(), prepared.patches[index]])
            yield None
        except Exception as error:  # whatever it is, it is the document's
            yield f"{path}: document {index}: {one_line(error)}"


def _check_document(document: Document, encoder: Encoder, lengths: list[int]) -> None:
    for number, segment in enumerate(document.segments, 1):
        if isinstance(segment, Image) or segment.ids is None:
            continue
        if not np.array_equal(segment.ids, encoder.tokenizer.encode_array(segment.text)):
            raise ValueError(f"segment {number}: its ids are not those of its text")
    found = [encoder.length(document), encoder.length(drop_condition(document)), encoder.patches(document)]
    if found != lengths:
        raise ValueError("its length is not what lengths.npy says")


def check_raw(
    units: list[Unit], columns: Columns | None = None, image_folder: str | None = None, decode: bool = False
) -> Iterator[str | None]:
    """None for every document that would be kept, and each rejection as a line."""
    for item in (item for unit in units for item in read(unit, columns, image_folder)):
        if not isinstance(item, RawDocument):
            yield f"{item.input}: {item.where}: {item.reason}"
            continue
        try:
            measure(item, decode)
            yield None
        except ValueError as error:
            yield f"{item.input}: {item.where}: {one_line(error)}"


if __name__ == "__main__":
    main()
