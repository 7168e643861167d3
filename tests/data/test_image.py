"""Patches against slow loops and the specification's vectors, image files against Pillow, grids against a search."""

import io
import math
import struct
import zlib

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data.image
from data.image import fit_grid, image_size, load_image, patchify, resize_to_grid, unpatchify


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(image: PIL.Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_patchify_vectors() -> None:
    """The numbers worked out by hand for a 4 x 6 image with patches of 2."""
    patches = patchify(np.arange(72, dtype=np.uint8).reshape(4, 6, 3), 2)
    assert patches.shape == (6, 12)
    assert patches[0].tolist() == [*range(6), *range(18, 24)]
    assert patches[1].tolist() == [*range(6, 12), *range(24, 30)]
    assert patches[5].tolist() == [*range(48, 54), *range(66, 72)]


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.integers(0, 9))
def test_patchify_is_pillow_crops_in_raster_order(rows: int, cols: int, p: int, seed: int) -> None:
    pixels = noise(rows * p, cols * p, seed=seed)
    picture = PIL.Image.fromarray(pixels)
    patches = patchify(pixels, p)
    for k in range(rows * cols):
        x, y = k // cols, k % cols
        assert patches[k].tobytes() == picture.crop((y * p, x * p, y * p + p, x * p + p)).tobytes()
    back = unpatchify(patches, rows, cols, p)
    assert back.dtype == np.uint8
    assert np.array_equal(back, pixels)


def test_patchify_refuses() -> None:
    with pytest.raises(ValueError, match="10 x 8 pixels is not a whole number of 4-pixel"):
        patchify(noise(10, 8), 4)
    with pytest.raises(ValueError, match="whole number"):
        patchify(noise(3, 8), 4)
    with pytest.raises(ValueError, match="float64"):
        patchify(np.zeros((4, 4, 3)), 4)
    with pytest.raises(ValueError, match="expected uint8"):
        patchify(noise(4, 4, 4), 4)
    with pytest.raises(ValueError, match=r"2 x 3 patches of 2 pixels are \(6, 12\)"):
        unpatchify(np.zeros((5, 12), np.uint8), 2, 3, 2)


def slow_fit(height: int, width: int, p: int, fewest: int, most: int, max_grid: int) -> tuple[int, int] | None:
    """Every grid there is, by the documented cost."""
    rows, cols = height // p, width // p
    if (height % p, width % p) == (0, 0) and max(rows, cols) <= max_grid and fewest <= rows * cols <= most:
        return rows, cols
    count = min(max(height * width / p**2, fewest), most)
    grids = [(r, c) for r in range(1, max_grid + 1) for c in range(1, max_grid + 1) if fewest <= r * c <= most]

    def cost(grid: tuple[int, int]) -> tuple[float, int, int]:
        r, c = grid
        aspect, size = math.log(c / r) - math.log(width / height), math.log(r * c) - math.log(count)
        return round(4 * aspect**2 + size**2, 9), r, c

    return min(grids, key=cost, default=None)


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 300), st.integers(1, 300), st.integers(1, 17), st.integers(1, 40), st.integers(0, 60),
    st.integers(1, 14),
)  # fmt: skip
def test_fit_grid_is_the_best_of_all(h: int, w: int, p: int, fewest: int, extra: int, max_grid: int) -> None:
    expected = slow_fit(h, w, p, fewest, fewest + extra, max_grid)
    if expected is None:
        with pytest.raises(ValueError, match="no patch grid"):
            fit_grid(h, w, p, fewest, fewest + extra, max_grid)
    else:
        assert fit_grid(h, w, p, fewest, fewest + extra, max_grid) == expected


@given(st.integers(1, 16), st.integers(1, 16))
def test_fit_grid_leaves_exact_grids_alone(rows: int, cols: int) -> None:
    assert fit_grid(rows * 8, cols * 8, 8, 1, 256, 64) == (rows, cols)


@pytest.mark.parametrize(
    ("size", "grid"),
    [((1080, 1920), (12, 21)), ((1920, 1080), (21, 12)), ((100, 100), (6, 6)), ((10, 5000), (1, 64)), ((3, 3), (1, 1))],
)
def test_fit_grid_examples(size: tuple[int, int], grid: tuple[int, int]) -> None:
    assert fit_grid(*size, 16, 1, 256, 64) == grid


@given(st.integers(200, 2000), st.integers(200, 2000))
def test_fit_grid_keeps_the_aspect_ratio(height: int, width: int) -> None:
    rows, cols = fit_grid(height, width, 16, 64, 256, 64)
    assert abs(math.log(cols / rows * height / width)) < 0.12
    assert 64 <= rows * cols <= 256


def test_resize() -> None:
    pixels = noise(32, 48)
    assert resize_to_grid(pixels, 4, 6, 8) is pixels
    smaller = resize_to_grid(pixels, 2, 3, 8)
    assert smaller.shape == (16, 24, 3)
    assert smaller.dtype == np.uint8
    assert resize_to_grid(np.full((10, 7, 3), 200, np.uint8), 2, 2, 8).tolist() == np.full((16, 16, 3), 200).tolist()


def test_lossless_files_come_back_bit_exact(tmp_path) -> None:
    pixels = noise(7, 5)
    for kind, options in (("PNG", {}), ("BMP", {}), ("PPM", {}), ("TIFF", {}), ("WEBP", {"lossless": True})):
        data_bytes = encoded(PIL.Image.fromarray(pixels), kind, **options)
        assert np.array_equal(load_image(data_bytes), pixels), kind
        path = tmp_path / f"picture.{kind.lower()}"
        path.write_bytes(data_bytes)
        assert np.array_equal(load_image(path), pixels)
        assert np.array_equal(load_image(str(path)), pixels)
        assert image_size(path) == (7, 5)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(kind: str, orientation: int) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    file = encoded(PIL.Image.fromarray(noise(6, 4)), kind, exif=exif)
    expected = np.asarray(PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(file))).convert("RGB"))
    assert expected.shape[:2] == ((4, 6) if orientation >= 5 else (6, 4))
    assert np.array_equal(load_image(file), expected)
    assert image_size(file) == expected.shape[:2]


def test_broken_exif_is_ignored() -> None:
    picture = PIL.Image.fromarray(noise(6, 4))
    file = encoded(picture, "PNG", exif=b"Exif\x00\x00rubbish that is no TIFF header")
    assert load_image(file).shape == (6, 4, 3)
    assert image_size(file) == (6, 4)


def test_alpha_on_white() -> None:
    rgba = noise(9, 8, 4)
    alpha = rgba[..., 3:].astype(float) / 255
    expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(load_image(encoded(PIL.Image.fromarray(rgba))) - expected).max() <= 1
    gray_alpha = np.array([[[0, 0], [0, 255], [100, 0]]], np.uint8)
    assert load_image(encoded(PIL.Image.fromarray(gray_alpha, "LA")))[0, :, 0].tolist() == [255, 0, 255]


def test_palette_and_keyed_transparency() -> None:
    palette = PIL.Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    opaque = [[[10, 20, 30], [40, 50, 60]], [[70, 80, 90], [40, 50, 60]]]
    assert load_image(encoded(palette)).tolist() == opaque
    assert load_image(encoded(palette, transparency=1))[:, 1].tolist() == [[255] * 3, [255] * 3]
    keyed = PIL.Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    assert load_image(encoded(keyed, transparency=(4, 5, 6))).tolist() == [[[1, 2, 3], [255, 255, 255]]]


def test_gray_16_bit_and_cmyk() -> None:
    gray = noise(4, 4, 1)[..., 0]
    assert np.array_equal(load_image(encoded(PIL.Image.fromarray(gray))), np.repeat(gray[..., None], 3, axis=2))
    bilevel = PIL.Image.fromarray(gray).convert("1")
    assert np.array_equal(load_image(encoded(bilevel)), np.asarray(bilevel.convert("RGB")))
    deep = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    for kind in ("PNG", "TIFF"):
        file = encoded(PIL.Image.fromarray(deep), kind)
        assert load_image(file)[0, :, 1].tolist() == np.round(deep[0] / 257).astype(int).tolist()
    cmyk = PIL.Image.new("CMYK", (3, 2), (0, 255, 255, 0))
    assert np.abs(load_image(encoded(cmyk, "TIFF")).astype(int) - [255, 0, 0]).max() <= 1
    assert np.abs(load_image(encoded(cmyk, "JPEG", quality=100)).astype(int) - [255, 0, 0]).max() <= 8
    floating = encoded(PIL.Image.fromarray(np.ones((2, 2), np.float32)), "TIFF")
    with pytest.raises(ValueError, match="mode F"):
        load_image(floating)


def test_first_frame_of_an_animation() -> None:
    frames = [PIL.Image.new("RGB", (4, 3), colour) for colour in ("red", "blue")]
    file = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert load_image(file)[0, 0].tolist() == [255, 0, 0]


def test_unreadable_files_name_themselves(tmp_path, monkeypatch) -> None:
    path = tmp_path / "bad.png"
    whole = encoded(PIL.Image.fromarray(noise(64, 64)))
    cases = {b"": "not an image", b"hello": "not an image", whole[:200]: "unreadable", whole[:20]: "bad.png"}
    for content, message in cases.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"bad.png: .*{message}|{message}") as caught:
            load_image(path)
        assert "bad.png" in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"gone.png: no such file"):
        load_image(tmp_path / "gone.png")
    with pytest.raises(ValueError, match="image data of 5 bytes"):
        load_image(b"hello")
    with pytest.raises(ValueError, match="unreadable"):
        load_image(tmp_path)
    with pytest.raises(ValueError, match="not an image of a known kind"):
        load_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    monkeypatch.setattr(data.image, "MAX_PIXELS", 64 * 64 - 1)
    for read in (load_image, image_size):
        with pytest.raises(ValueError, match="64 x 64 pixels are more than the limit"):
            read(whole)


def test_decompression_bomb_is_refused_from_the_header() -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    fields = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    header = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", fields) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    for read in (load_image, image_size):
        with pytest.raises(ValueError, match=r"limit|bomb"):
            read(header)
