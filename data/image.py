"""Image files to pixels, pixels to patches (docs/data-format.md), and the choice of a patch grid for any size."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import PIL.Image

# Above this a small file could make a worker allocate gigabytes.
MAX_PIXELS = 2**26

# No EPS and the like: their decoders start other programs.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

_EXIF_ORIENTATION = 0x0112
_TURNS = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}

ImageFile = str | os.PathLike[str] | bytes


def patchify(pixels: np.ndarray, patch_size: int) -> np.ndarray:
    """Cut pixels (rows*p, cols*p, 3) uint8 into patches (rows*cols, p*p*3) uint8, p = patch_size.

    Patches are in raster order; inside a patch the row is slowest and the channel fastest. No value is changed.
    Raises ValueError unless both sides are multiples of p.
    """
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"pixels are {pixels.dtype} {pixels.shape}; expected uint8 (height, width, 3)")
    height, width, _ = pixels.shape
    rows, cols = height // patch_size, width // patch_size
    if rows == 0 or cols == 0 or (rows * patch_size, cols * patch_size) != (height, width):
        raise ValueError(f"image of {height} x {width} pixels is not a whole number of {patch_size}-pixel patches")
    blocks = pixels.reshape(rows, patch_size, cols, patch_size, 3).transpose(0, 2, 1, 3, 4)
    return blocks.reshape(rows * cols, patch_size * patch_size * 3)


def unpatchify(patches: np.ndarray, rows: int, cols: int, patch_size: int) -> np.ndarray:
    """The inverse of `patchify`: (rows*cols, p*p*3) of any dtype to (rows*p, cols*p, 3). Raises ValueError on shape."""
    if rows < 1 or cols < 1 or patches.shape != (rows * cols, patch_size * patch_size * 3):
        expected = (rows * cols, patch_size * patch_size * 3)
        raise ValueError(f"patches are {patches.shape}; {rows} x {cols} patches of {patch_size} pixels are {expected}")
    blocks = patches.reshape(rows, cols, patch_size, patch_size, 3).transpose(0, 2, 1, 3, 4)
    return blocks.reshape(rows * patch_size, cols * patch_size, 3)


@lru_cache(maxsize=4096)
def fit_grid(
    height: int, width: int, patch_size: int, min_patches: int, max_patches: int, max_grid: int
) -> tuple[int, int]:
    """The grid (rows, cols) that an image of height x width pixels is brought to.

    min_patches <= rows*cols <= max_patches and both sides <= max_grid. An image that is such a grid already keeps its
    size. Otherwise the aspect ratio is kept as closely as whole patches allow, at about the image's own number of
    patches, or the nearest bound of the budget. Raises ValueError where no grid is within the bounds.
    """
    rows, cols = height // patch_size, width // patch_size
    exact = (rows * patch_size, cols * patch_size) == (height, width)
    if exact and max(rows, cols) <= max_grid and min_patches <= rows * cols <= max_patches:
        return rows, cols
    natural = height * width / patch_size**2
    log_count = math.log(min(max(natural, min_patches), max_patches))
    log_aspect = math.log(width / height)
    best: tuple[float, int, int] | None = None
    for rows in range(1, min(max_grid, max_patches) + 1):
        fewest, most = -(-min_patches // rows), min(max_patches // rows, max_grid)
        if fewest > most:
            continue
        # The cost below is a parabola in log(cols), so its best whole number is next to the real one.
        best_cols = math.exp((4 * (log_aspect + math.log(rows)) + log_count - math.log(rows)) / 5)
        for cols in {min(max(int(best_cols) + k, fewest), most) for k in (0, 1)}:
            aspect_error = math.log(cols / rows) - log_aspect
            count_error = math.log(cols * rows) - log_count
            # An aspect error weighs four times a count error of the same factor. Rounded so that the choice between
            # equals does not depend on the last digit of this machine's logarithm.
            candidate = (round(4 * aspect_error**2 + count_error**2, 9), rows, cols)
            best = candidate if best is None else min(best, candidate)
    if best is None:
        raise ValueError(
            f"no patch grid has {min_patches} to {max_patches} patches and sides of at most {max_grid}; widen the range"
        )
    return best[1], best[2]


def resize_to_grid(pixels: np.ndarray, rows: int, cols: int, patch_size: int) -> np.ndarray:
    """Pixels (H, W, 3) uint8 at (rows*p, cols*p, 3). Returned as they are, bit for bit, where the size fits already."""
    height, width = rows * patch_size, cols * patch_size
    if pixels.shape[:2] == (height, width):
        return pixels
    return np.asarray(_resized(PIL.Image.fromarray(pixels), height, width))


def image_size(source: ImageFile) -> tuple[int, int]:
    """(height, width) in pixels that `load_image` would give, from the file's header. Raises ValueError as it does."""
    try:
        with _open(source) as image:
            width, height = image.size
            return (width, height) if _orientation(image) in (5, 6, 7, 8) else (height, width)
    except Exception as error:
        raise _unreadable(source, error) from error


def load_image(source: ImageFile, fit: Callable[[int, int], tuple[int, int]] | None = None) -> np.ndarray:
    """Read a file (a path, or its bytes) as (height, width, 3) uint8 RGB, read-only, the way a viewer would show it.

    With `fit` it comes in the (height, width) that this gives for its own, as `resize_to_grid` would make it, but
    without the copies of the large array.

    EXIF orientation is applied, transparency is laid on white, gray and palette become RGB, 16-bit gray is scaled to
    8 bits, CMYK is converted; of an animation the first frame is taken. Colour profiles are ignored. Raises
    ValueError, one line naming the file, for a file that is missing, broken, of an unknown kind, or of more than
    MAX_PIXELS pixels.
    """
    try:
        with _open(source) as image:
            turn = _TURNS.get(_orientation(image))
            rgb = _to_rgb(image)
            rgb = rgb if turn is None else rgb.transpose(turn)
            return np.asarray(_resized(rgb, *fit(rgb.height, rgb.width)) if fit else rgb)
    except Exception as error:
        raise _unreadable(source, error) from error


def _resized(image: PIL.Image.Image, height: int, width: int) -> PIL.Image.Image:
    if (image.height, image.width) == (height, width):
        return image
    return image.resize((width, height), PIL.Image.Resampling.LANCZOS)


def _open(source: ImageFile) -> PIL.Image.Image:
    image = PIL.Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_FORMATS)
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise ValueError(f"{image.width} x {image.height} pixels are more than the limit of {MAX_PIXELS}")
    return image


def _orientation(image: PIL.Image.Image) -> int:
    """EXIF orientation 1..8 that is still to be applied, from the header alone."""
    if image.format == "TIFF":  # Pillow turns these by itself, in `size` and on loading
        return 1
    if image.format == "PNG" and not {"exif", "Raw profile type exif"} & set(image.info):
        return 1  # getexif() would decode the whole picture to look for EXIF data behind it
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # broken EXIF data does not make the picture unreadable
        return 1
    return orientation if isinstance(orientation, int) else 1


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit gray; Pillow's own conversion would clip it
        gray = np.asarray(image)
        if image.mode == "F" or gray.min() < 0 or gray.max() > 65535:
            raise ValueError(f"pixels of mode {image.mode} have no fixed range; save it with 8 or 16 bits")
        return PIL.Image.fromarray(((gray.astype(np.int64) * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    rgba = image.convert("RGBA")
    white = PIL.Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return PIL.Image.alpha_composite(white, rgba).convert("RGB")


def _unreadable(source: ImageFile, error: Exception) -> ValueError:
    """Decoders raise all kinds of exceptions on broken files (OSError, SyntaxError, struct.error, ...)."""
    name = f"image data of {len(source)} bytes" if isinstance(source, bytes) else os.fspath(source)
    if isinstance(error, FileNotFoundError):
        return ValueError(f"{name}: no such file")
    if isinstance(error, PIL.UnidentifiedImageError):
        return ValueError(f"{name}: not an image of a known kind ({', '.join(_FORMATS)})")
    reason = " ".join(str(error).split()) or type(error).__name__
    return ValueError(f"{name}: unreadable image: {reason}")
