"""Pictures and captions that are drawn while training, from held-out documents, with the sampler that users run."""

import itertools
from pathlib import Path

import numpy as np
from PIL import Image as Picture

from data.document import Document, Image, Text
from data.mixture import Mixture
from model.sampling import Sampling
from train.config import Config
from train.generator import Generator, sampling_of


def draw_samples(generator: Generator, mixture: Mixture, config: Config, folder: Path, step: int) -> None:
    """Write step-N.png (upper row drawn from captions, lower row the real pictures) and step-N.txt (captions)."""
    folder.mkdir(parents=True, exist_ok=True)
    count, sampling = config.eval.samples, sampling_of(config)
    documents = _first_documents(mixture, 8 * count)
    lines = []
    to_draw = [pair for pair in map(text_then_image, documents) if pair][:count]
    if to_draw:
        patch = generator.encoder.patch_size
        grids = [generator.encoder.grid(image.height, image.width) for _, image in to_draw]
        sizes = [(rows * patch, cols * patch) for rows, cols in grids]
        pictures = generator.pictures([text.text for text, _ in to_draw], sizes, sampling)
        real = [image.pixels for _, image in to_draw if image.pixels is not None]
        save_grid([*pictures, *real], len(to_draw), folder / f"step-{step:08d}.png")
        lines += [f"drawn (guidance {config.eval.guidance:g}): {text.text}" for text, _ in to_draw]
    to_read = [pair for pair in map(image_then_text, documents) if pair][:count]
    if to_read:
        captions = generator.captions([image.pixels for image, _ in to_read if image.pixels is not None],
                                      Sampling(temperature=0))  # fmt: skip
        lines += [f"read: {said!r} of {text.text!r}" for said, (_, text) in zip(captions, to_read, strict=True)]
    if lines:
        (folder / f"step-{step:08d}.txt").write_text("\n".join(lines) + "\n")


def _first_documents(mixture: Mixture, count: int) -> list[Document]:
    """`count` documents, or all of one epoch."""
    documents: list[Document] = []
    for row in itertools.count():
        stream, number = mixture.locate(row)
        epoch, ids = stream.plan.row(number)
        if epoch or len(documents) >= count:
            return documents[:count]
        documents += stream.documents(epoch, ids)[0]
    raise AssertionError("unreachable")


def save_grid(pictures: list[np.ndarray], columns: int, path: Path, gap: int = 2) -> None:
    """Write pictures, (height, width, 3) uint8 of any sizes, as one PNG of `columns` columns on white."""
    height = max(picture.shape[0] for picture in pictures) + gap
    width = max(picture.shape[1] for picture in pictures) + gap
    rows = -(-len(pictures) // columns)
    sheet = np.full((rows * height + gap, columns * width + gap, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        top, left = gap + i // columns * height, gap + i % columns * width
        sheet[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    # Nearest-neighbour enlargement: small pictures must be seen as they are.
    factor = max(1, 512 // max(height, width) // 4)
    sheet = sheet.repeat(factor, 0).repeat(factor, 1)
    save_png(sheet, path)


def save_png(pixels: np.ndarray, path: Path, **metadata: str) -> None:
    """Write a PNG with text entries, whole or not at all."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in metadata.items():
        info.add_itxt(key, value)
    partial = path.with_name(path.name + ".tmp")
    Picture.fromarray(pixels).save(partial, format="PNG", pnginfo=info)
    partial.replace(path)


def text_then_image(document: Document) -> tuple[Text, Image] | None:
    """The caption and picture of a document that is just these two."""
    match document.segments:
        case (Text() as text, Image() as image):
            return text, image
    return None


def image_then_text(document: Document) -> tuple[Image, Text] | None:
    """The picture and caption of a document that is just these two."""
    match document.segments:
        case (Image() as image, Text() as text):
            return image, text
    return None
