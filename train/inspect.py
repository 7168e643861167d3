"""`python -m train.inspect --config FILE`: a row or a document as the model sees it, slot by slot, and its pictures."""

import signal
from pathlib import Path

import numpy as np

from data.command import OneLineParser, working
from data.encode import Columns, Encoder
from data.image import unpatchify
from data.tokenizer import Tokenizer
from model.batch import Batch
from model.positions import LAYOUTS
from train import pipeline, settings
from train.config import Config
from train.samples import save_png


def run(config: Config, row: int, document: int | None, out: Path | None) -> None:
    """Print one line per slot of a row of the run or of a document, and write the pictures if `out` is given.

    Raises ValueError or OSError for wrong input.
    """
    tokenizer = pipeline.make_tokenizer(config.data)
    encoder = pipeline.make_encoder(config, tokenizer)
    columns = _row(config, encoder, row) if document is None else _document(config, encoder, document)
    print("\n".join(lines(columns, tokenizer, config.model.positions)))
    if out:
        for path in write_pictures(columns, config.model.patch_size, out):
            print(path)


def _row(config: Config, encoder: Encoder, row: int) -> Columns:
    mixture = pipeline.make_mixture(config, encoder, "train")
    stream, number = mixture.locate(row)
    epoch, ids = stream.plan.row(number)
    documents, replaced = stream.documents(epoch, ids)
    print(f"row {row}, epoch {epoch}: " + ", ".join(f"{one.source}:{one.id}" for one in documents))
    for reason in replaced:
        print(f"another document takes the place of one that cannot be read: {reason}")
    return mixture.row(row)


def _document(config: Config, encoder: Encoder, document: int) -> Columns:
    """A document as it is written, without condition dropout."""
    left = document
    for source in (source for _, found in pipeline.make_sources(config.data, "train") for source, _ in found):
        if 0 <= left < len(source):
            one = source.document(left)
            part = encoder.encode(one)
            print(f"document {left} of {source.name} ({one.id}): {len(part.token)} slots of the "
                  f"{config.data.row_length} of a row")  # fmt: skip
            return part
        left -= len(source)
    raise ValueError(f"there is no document {document}; the sources hold documents 0 to {document - left - 1}")


def lines(columns: Columns, tokenizer: Tokenizer, layout: str) -> list[str]:
    """A heading and a line for every slot up to the padding."""
    batch = Batch.collate([columns], [0])
    positions = LAYOUTS[layout](batch.grid)[0]
    found = ["slot document index content p1 p2 learn"]
    filled = int(np.count_nonzero(columns.document))
    for slot in range(filled):
        p1, p2 = positions[slot].tolist()
        found.append(
            f"{slot} {columns.document[slot]} {columns.index[slot]} {_content(columns, slot, tokenizer)} "
            f"{p1:g} {p2:g} {'learn' if columns.learn[slot] else 'read'}"
        )
    if padding := len(columns.token) - filled:
        found.append(f"{padding} slots of padding")
    return found


def _content(columns: Columns, slot: int, tokenizer: Tokenizer) -> str:
    if columns.rows[slot]:
        place = f"{columns.row[slot]},{columns.col[slot]}"
        return f"<|patch|>[{place} of {columns.rows[slot]}x{columns.cols[slot]}]"
    token = int(columns.token[slot])
    text = repr(tokenizer.decode([token])) if token < tokenizer.pad else ""
    # A special token, or a part of a character, which has no text of its own.
    return text if text and "\ufffd" not in text else str(tokenizer.inner.id_to_token(token))


def write_pictures(columns: Columns, patch_size: int, out: Path) -> list[Path]:
    """Every picture of a row as PNG, exactly the pixels that the model reads, in order."""
    out.mkdir(parents=True, exist_ok=True)
    paths, start = [], 0
    slots = np.flatnonzero(columns.rows)
    while start < len(slots):
        rows, cols = int(columns.rows[slots[start]]), int(columns.cols[slots[start]])
        pixels = unpatchify(columns.patches[start : start + rows * cols], rows, cols, patch_size)
        paths.append(out / f"document-{columns.document[slots[start]]}-slot-{slots[start]}.png")
        save_png(pixels, paths[-1])
        start += rows * cols
    return paths


def main() -> None:
    """Exit status 2: the configuration, the data or the choice is wrong."""
    parser = OneLineParser(prog="python -m train.inspect", description=__doc__)
    parser.add_argument("--config", required=True, help="YAML file of a run; --section.key value overrides it")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--row", type=int, default=0, help="row of the run, counted from 0 (default: 0)")
    choice.add_argument("--document", type=int, help="instead of a row: a document, counted through all sources from 0")
    parser.add_argument("--out", type=Path, help="folder to write the pictures to, as the model sees them")
    chosen, others = parser.parse_known_args()
    with working(2):
        run(settings.parse(["--config", chosen.config, *others])[0], chosen.row, chosen.document, chosen.out)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `... | head` ends it quietly, as other commands
    main()
