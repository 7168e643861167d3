"""Position layouts against the vectors of the articles and a slow loop written from their prose."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import positions
from model.positions import LAYOUTS, Grid, centred, parse_document
from tests.model.support import Words, batch_of, build

Shape = list[int | tuple[int, int]]
"""A document: an integer is that many text tokens, a pair an image of (rows, columns) patches."""


def slow(layout: str, document: Shape) -> list[tuple[float, float]]:
    """Positions of one document, slot by slot, as the articles describe them."""
    placed, out = 0, []
    for part in document:
        if isinstance(part, int):
            for _ in range(part):
                placed += 1
                out.append((float(placed), float(placed)))
            continue
        h, w = part
        for x in range(1, h + 1):
            for y in range(1, w + 1):
                if layout == "flatten":
                    i = placed + (x - 1) * w + y
                    out.append((i, i))
                elif layout == "tie":
                    out.append((placed + x * (w + 1), placed + y * (h + 1)))
                elif layout == "tie_frac":
                    out.append((placed + x * (w * h + 1) / (h + 1), placed + y * (w * h + 1) / (w + 1)))
                elif layout == "tv":
                    out.append((placed + (w * h - h) / 2 + x, placed + (w * h - w) / 2 + y))
                elif layout == "mrope":
                    out.append((placed + x, placed + y))
        placed += {"tie": (w + 1) * (h + 1) - 1, "mrope": max(h, w)}.get(layout, w * h)
    return [(float(a), float(b)) for a, b in out]


def grid_of(*rows: list[Shape], padding: int = 0) -> Grid:
    """Columns of packed rows."""
    table = []
    for row in rows:
        values = []
        for document in row:
            index = 0
            for part in document:
                h, w = (0, 0) if isinstance(part, int) else part
                for k in range(part if isinstance(part, int) else h * w):
                    index += 1
                    values.append((index, *((k // w + 1, k % w + 1) if w else (0, 0)), h, w))
        table.append(values)
    longest = max(map(len, table)) + padding
    padded = [values + [(0, 0, 0, 0, 0)] * (longest - len(values)) for values in table]
    return Grid(*torch.tensor(padded).permute(2, 0, 1))


def positions_of(layout: str, document: Shape) -> list[tuple[float, float]]:
    return [tuple(pair) for pair in LAYOUTS[layout](grid_of([document]))[0].tolist()]


shapes = st.lists(st.integers(1, 6) | st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=5)


@pytest.mark.parametrize(
    ("before", "height", "width", "first", "last", "following"),
    [
        (5, 2, 3, (8, 7.5), (9, 9.5), 12),
        (4, 3, 3, (8, 8), (10, 10), 14),
        (0, 1, 1, (1, 1), (1, 1), 2),
        (3, 1, 4, (5.5, 4), (5.5, 7), 8),
        (10, 2, 4, (14, 13), (15, 16), 19),
        (4, 3, 5, (11, 10), (13, 14), 20),
        (7, 16, 16, (128, 128), (143, 143), 264),
    ],
)
def test_tv_vectors(before, height, width, first, last, following) -> None:
    found = positions_of("tv", [before, (height, width), 1])
    assert (found[before], found[-2], found[-1]) == (first, last, (following, following))


def test_tv_mixed_sequences() -> None:
    assert positions_of("tv", [2, (2, 2), 1, (1, 3), 2]) == [
        (1, 1), (2, 2), (4, 4), (4, 5), (5, 4), (5, 5), (7, 7), (9, 8), (9, 9), (9, 10), (11, 11), (12, 12),
    ]  # fmt: skip
    assert positions_of("tv", [3, (2, 3), 1]) == [
        (1, 1), (2, 2), (3, 3), (6, 5.5), (6, 6.5), (6, 7.5), (7, 5.5), (7, 6.5), (7, 7.5), (10, 10),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "first", "last", "following"),
    [
        ("tie", (9, 8), (13, 14), 17),
        ("tie_frac", (5 + 7 / 3, 6.75), (9 + 2 / 3, 10.25), 12),
        ("tv", (8, 7.5), (9, 9.5), 12),
        ("flatten", (6, 6), (11, 11), 12),
        ("mrope", (6, 6), (7, 8), 9),
    ],
)
def test_every_layout_after_five_tokens_and_two_by_three_patches(layout, first, last, following) -> None:
    found = positions_of(layout, [5, (2, 3), 1])
    assert found[5] == pytest.approx(first, abs=1e-5)
    assert found[10] == pytest.approx(last, abs=1e-5)
    assert found[11] == (following, following)


def test_tv_of_a_video() -> None:
    """Three coordinates, behind 5 tokens: 4 frames of 2 x 3 patches."""
    sides = [torch.tensor(side) for side in (2, 3, 4)]
    first = centred(torch.tensor(5), [torch.tensor(1)] * 3, sides)
    last = centred(torch.tensor(5), sides, sides)
    assert [float(p) for p in first] == [17, 16.5, 16]
    assert [float(p) for p in last] == [18, 18.5, 19]
    assert float(centred(torch.tensor(5 + 2 * 3 * 4), [torch.tensor(1)], [torch.tensor(1)])[0]) == 30


def test_tv_gaps_are_equal_on_both_sides() -> None:
    found = np.array(positions_of("tv", [5, (2, 3), 1]))
    assert (found[5] - found[4]).tolist() == (found[11] - found[10]).tolist() == [3, 2.5]


def test_tv_image_is_centred_on_its_share_of_the_sequence() -> None:
    assert np.mean(positions_of("tv", [2, (5, 7)])[2:], axis=0).tolist() == [20, 20]


@pytest.mark.parametrize("layout", ["flatten", "tie", "tie_frac", "tv", "mrope"])
@given(rows=st.lists(st.lists(shapes, min_size=1, max_size=4), min_size=1, max_size=3), padding=st.integers(0, 3))
def test_packed_rows_equal_the_slow_loop_document_by_document(layout, rows, padding) -> None:
    found = LAYOUTS[layout](grid_of(*rows, padding=padding))
    for row, values in zip(rows, found.tolist(), strict=True):
        expected = [pair for document in row for pair in slow(layout, document)]
        np.testing.assert_allclose(values[: len(expected)], expected, rtol=3e-7)


@pytest.mark.parametrize("layout", LAYOUTS)
class TestContract:
    """What holds for every layout, also for one that is added later."""

    @given(shapes)
    def test_float32_and_finite(self, layout, document) -> None:
        found = LAYOUTS[layout](grid_of([document], padding=2))
        assert found.dtype == torch.float32
        assert found.shape[-1] == 2
        assert found.isfinite().all()

    @given(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    def test_text_alone_is_rope_1d(self, layout, lengths) -> None:
        grid = grid_of([[length] for length in lengths])
        expected = [n for length in lengths for n in range(1, length + 1)]
        assert LAYOUTS[layout](grid)[0].tolist() == [[n, n] for n in expected]

    @given(shapes, shapes)
    def test_positions_restart_with_each_document(self, layout, first, second) -> None:
        packed = LAYOUTS[layout](grid_of([first, second]))[0]
        alone = LAYOUTS[layout](grid_of([second]))[0]
        assert torch.equal(packed[-len(alone) :], alone)

    @given(shapes, st.integers(1, 40))
    def test_more_text_before_shifts_everything_equally(self, layout, document, added) -> None:
        here, there = (np.array(positions_of(layout, [n, *document])) for n in (1, 1 + added))
        np.testing.assert_allclose(there[added:], here + added, rtol=1e-6)

    @settings(max_examples=20)
    @given(shapes)
    def test_later_slots_change_no_earlier_position(self, layout, document) -> None:
        grid = grid_of([document])
        whole = LAYOUTS[layout](grid)
        # Cut inside an image too: generation asks for positions while the image is being written.
        for length in range(1, whole.shape[1] + 1):
            assert torch.equal(LAYOUTS[layout](Grid(*(c[:, :length] for c in grid))), whole[:, :length])

    @given(shapes)
    def test_text_is_on_the_diagonal_and_increases(self, layout, document) -> None:
        grid = grid_of([document])
        text = LAYOUTS[layout](grid)[0][grid.rows_BS[0] == 0]
        assert torch.equal(text[:, 0], text[:, 1])
        assert (text[:, 0].diff() > 0).all()


@given(shapes)
def test_tv_text_sits_at_its_index(document) -> None:
    grid = grid_of([document])
    is_text = grid.rows_BS == 0
    assert torch.equal(LAYOUTS["tv"](grid)[is_text][:, 0], grid.index_BS[is_text].float())


@given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 9))
def test_tv_symmetry_mean_and_half_integers(before, height, width) -> None:
    found = np.array(positions_of("tv", [before, (height, width), 1]))
    patches, after = found[before:-1], found[-1]
    area = height * width
    gap = [1 + (area - height) / 2, 1 + (area - width) / 2]
    assert (patches[0] - found[before - 1]).tolist() == gap
    assert (after - patches[-1]).tolist() == gap
    # The mean position is the mean index of the patches, on both axes.
    np.testing.assert_allclose(patches.mean(0), before + (area + 1) / 2, rtol=1e-12)
    index = np.arange(before + 1, before + area + 1)[:, None]
    assert np.abs(patches - index).max(axis=0).tolist() == [(area - height) / 2, (area - width) / 2]
    half = (patches % 1 == 0.5).all(axis=0).tolist()
    assert half == [height % 2 == 1 and width % 2 == 0, width % 2 == 1 and height % 2 == 0]
    assert ((patches * 2) % 1 == 0).all()


def test_tv_single_row_of_patches_is_text_like_on_the_second_axis() -> None:
    assert [p2 for _, p2 in positions_of("tv", [4, (1, 6)])[4:]] == [5, 6, 7, 8, 9, 10]


def test_tv_one_patch_is_one_token() -> None:
    assert positions_of("tv", [3, (1, 1), 2]) == positions_of("tv", [6])


def test_tv_adjacent_images_need_no_text_between() -> None:
    assert positions_of("tv", [(2, 2), (2, 2)])[4:] == [(p + 4, q + 4) for p, q in positions_of("tv", [(2, 2)])]


def test_large_positions_stay_exact() -> None:
    # 2^24 is where float32 integers end; half-integers end at 2^23.
    found = positions_of("tv", [100_000, (1, 2), 1])
    assert found[-3:] == [(100_001.5, 100_001), (100_001.5, 100_002), (100_003, 100_003)]


def test_text_logits_are_the_same_in_every_layout() -> None:
    batch = batch_of([[Words([1, 2, 3, 4])], [Words([5, 6])]], length=16)
    model, logits = build(), []
    for name in LAYOUTS:
        object.__setattr__(model.config, "positions", name)
        with torch.no_grad():
            logits.append(model.text_head.logits(model.hidden(batch)))
    assert all(torch.equal(logits[0], other) for other in logits[1:])


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "model.positions", *arguments], capture_output=True, text=True, check=False
    )


def test_command_prints_a_table() -> None:
    result = run("--layout", "tv", "T2 I1x2 T1")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.split("\n") == [
        "slot kind p1 p2", "1 text 1 1", "2 text 2 2", "3 image 3.5 3", "4 image 3.5 4", "5 text 5 5", "",
    ]  # fmt: skip


def test_command_refuses_an_unknown_layout(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["model.positions", "--layout", "nonsense", "T2"])
    with pytest.raises(SystemExit) as stopped:
        positions.main()
    assert stopped.value.code == 2
    assert "tie_frac" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "T2 X3", "I2", "I2x", "T-1", "I0x3", "I3x0 T1", "T0"])
def test_command_refuses_a_bad_document(text, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["model.positions", text])
    with pytest.raises(SystemExit) as stopped:
        positions.main()
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1


def test_command_refuses_a_bad_document_in_a_process() -> None:
    result = run("T2 banana")
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")


def test_parsed_document_has_the_columns_of_a_row() -> None:
    for parsed, expected in zip(parse_document("T2 I2x3 T1"), grid_of([[2, (2, 3), 1]]), strict=True):
        assert torch.equal(parsed, expected)
    assert math.prod(parse_document("I8x8").index_BS.shape) == 64
