import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.document import Image, Text
from data.source.shapes import (
    COLORS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    Shapes,
    Thing,
    caption,
    coverage,
    held_out,
    held_out_captions,
    parse_caption,
    render,
)
from data.source.shapes_oracle import read, score

THINGS = st.builds(Thing, st.sampled_from(list(COLORS)), st.sampled_from(SHAPES), st.sampled_from(list(SIZES)))
SINGLES = st.builds(lambda thing, place: Scene((thing,), place), THINGS, st.sampled_from(list(PLACES)))
CHAINS = st.integers(2, 3).flatmap(
    lambda count: st.builds(
        lambda things, relations: Scene(tuple(things), relations=tuple(relations)),
        st.lists(THINGS, min_size=count, max_size=count, unique=True),
        st.lists(st.sampled_from(list(RELATIONS)), min_size=count - 1, max_size=count - 1, unique=True),
    )
)
CANVASES = ((48, 48), (64, 64), (40, 72), (96, 48))


def drawn(source: Shapes, index: int) -> tuple[np.ndarray, str]:
    image = next(s for s in source.document(index).segments if isinstance(s, Image))
    assert image.pixels is not None
    return image.pixels, caption(source.sample(index)[0])


def soften(pixels: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur, edges repeated."""
    offsets = np.arange(-4, 5)
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
    result = np.pad(pixels.astype(float), ((4, 4), (4, 4), (0, 0)), mode="edge")
    for axis in (0, 1):
        result = np.apply_along_axis(np.convolve, axis, result, kernel / kernel.sum(), "valid")
    return result


def as_pixels(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


# --- the grammar ---


@given(st.one_of(SINGLES, CHAINS))
def test_caption_and_parser_are_inverse(scene: Scene) -> None:
    assert parse_caption(caption(scene)) == scene


def test_captions_read_as_english() -> None:
    first, second, third = (
        Thing("red", "circle", "small"),
        Thing("blue", "ring", "large"),
        Thing("black", "cross", "medium"),
    )
    assert caption(Scene((first,), "at the top left")) == "a small red circle at the top left"
    chain = Scene((first, second, third), relations=("above", "to the left of"))
    assert caption(chain) == (
        "a small red circle above a large blue ring, which is to the left of a medium black cross"
    )


@pytest.mark.parametrize(
    "text",
    ["", "a small red circle", "a small red circle at the top left ", "a red small circle at the top",
     "a small red circle above a small red circle", "a small mauve circle at the top"],
)  # fmt: skip
def test_parser_refuses_what_is_not_in_the_grammar(text: str) -> None:
    with pytest.raises(ValueError, match="caption"):
        parse_caption(text)


def test_scene_refuses_contradictions() -> None:
    red, blue = Thing("red", "circle", "small"), Thing("blue", "ring", "large")
    for things, place, relations in (
        ((red,), None, ()),
        ((red, blue), "at the top", ("above",)),
        ((red, blue), None, ()),
    ):
        with pytest.raises(ValueError, match="one object with a place"):
            Scene(things, place, relations)
    with pytest.raises(ValueError, match="do not fit"):
        Scene((red, blue, Thing("black", "ring", "large")), relations=("above", "above"))


@pytest.mark.parametrize("relation", RELATIONS)
def test_objects_stand_straight_above_or_beside_each_other(relation: str) -> None:
    scene = parse_caption(f"a small red circle {relation} a small blue square")
    for seed in range(8):
        first, second = sorted(read(render(scene, 48, 48, np.random.default_rng(seed))), key=lambda f: f.color != "red")
        horizontal = RELATIONS[relation][0] != 0
        across = abs(first.y - second.y) if horizontal else abs(first.x - second.x)
        along = abs(first.x - second.x) if horizontal else abs(first.y - second.y)
        assert across < 0.3 < along + 0.1  # the same half of the picture


# --- the split ---


def test_more_than_500_single_captions_are_held_out_and_none_is_trained_on() -> None:
    unseen = held_out_captions()
    assert len(unseen) == len(set(unseen)) >= 500
    train = Shapes(0, "train", 3000)
    seen = {caption(train.sample(index)[0]) for index in range(len(train))}
    assert len(seen) > 900
    assert seen.isdisjoint(unseen)


def test_every_word_pair_is_trained_on() -> None:
    """A held-out caption is a new combination of things that were all seen in pairs."""
    pairs: set[tuple[str, str]] = set()
    for color, shape, size, place in itertools.product(COLORS, SHAPES, SIZES, PLACES):
        if not held_out(Scene((Thing(color, shape, size),), place)):
            pairs |= set(itertools.combinations((color, shape, size, place), 2))
    assert len(pairs) == 10 * 6 + 10 * 3 + 10 * 9 + 6 * 3 + 6 * 9 + 3 * 9


def test_the_test_split_holds_held_out_scenes_only_and_does_not_repeat_early() -> None:
    test = Shapes(0, "test", 10**6)
    captions = [caption(test.sample(index)[0]) for index in range(500)]
    assert len(set(captions)) == 500
    assert set(captions) <= set(held_out_captions())
    for split in ("train", "test"):
        scenes = Shapes(0, split, 300, max_objects=3)
        assert all(held_out(scenes.sample(index)[0]) == (split == "test") for index in range(300))


@given(CHAINS)
def test_two_ways_to_say_one_relation_are_on_the_same_side(scene: Scene) -> None:
    opposite = {
        "above": "below",
        "below": "above",
        "to the left of": "to the right of",
        "to the right of": "to the left of",
    }
    relations = tuple(opposite[relation] for relation in reversed(scene.relations))
    assert held_out(scene) == held_out(Scene(scene.things[::-1], relations=relations))


# --- the documents ---


def test_documents_are_a_pure_function_of_seed_split_and_index() -> None:
    first, second = (Shapes(5, "train", 100, CANVASES, 3) for _ in range(2))
    backwards = [second.document(index) for index in reversed(range(100))][::-1]
    assert [first.document(index) for index in range(100)] == backwards
    assert first.document(3) != Shapes(6, "train", 100, CANVASES, 3).document(3)
    assert Shapes(5, "train", 7, CANVASES, 3).document(3) == first.document(3)  # the number of documents changes none


def test_both_directions_and_outlines() -> None:
    source = Shapes(0, "train", 400, CANVASES)
    read_first = 0
    for index in range(len(source)):
        one, two = source.document(index, pixels=False).segments
        if isinstance(one, Image):
            one, two, learn = two, one, False
            read_first += 1
        else:
            learn = True
        assert isinstance(one, Text) and isinstance(two, Image)  # noqa: PT018
        assert (one.learn, two.learn, two.pixels) == (True, learn, None)
        assert (two.height, two.width) in CANVASES
    assert 150 < read_first < 250
    for fraction, kind in ((0.0, Text), (1.0, Image)):
        source = Shapes(0, "train", 50, caption_fraction=fraction)
        assert all(isinstance(source.document(index).segments[0], kind) for index in range(50))


@pytest.mark.parametrize(
    "wrong",
    [{"split": "dev"}, {"seed": -1}, {"size": 0}, {"canvases": ()}, {"canvases": ((8, 32),)}, {"max_objects": 4},
     {"caption_fraction": 1.5}],
)  # fmt: skip
def test_bad_arguments_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="shapes: "):
        Shapes(**({"seed": 0, "split": "train", "size": 1} | wrong))
    with pytest.raises(IndexError):
        Shapes(0, "train", 10).document(10)


# --- the pictures ---


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_is_the_shapes_area_and_fills_its_bounding_square(shape: str) -> None:
    areas = {"circle": np.pi, "square": 4, "triangle": 2, "diamond": 2, "cross": 4 * 0.68 - 0.68**2,
             "ring": np.pi * (1 - 0.52**2)}  # fmt: skip
    grid = np.arange(-39.5, 40)
    weight = coverage(shape, grid, grid[:, None], 30.0)
    assert weight.sum() / 30**2 == pytest.approx(areas[shape], rel=0.01)
    for axis in (0, 1):
        inside = grid[weight.max(axis) > 0.2]
        assert (inside.min(), inside.max()) == (-29.5, 29.5)


def test_a_picture_does_not_depend_on_its_resolution() -> None:
    scene = parse_caption("a small red circle above a large blue square, which is to the left of a medium green ring")
    low, high = (render(scene, 2 * k, 3 * k, np.random.default_rng(1)).astype(float) for k in (32, 128))
    pooled = high.reshape(64, 4, 96, 4, 3).mean((1, 3))
    assert abs(low - pooled).mean() < 0.5
    assert abs(low - pooled).max() < 40  # anti-aliased edges differ by a fraction of a pixel's coverage


def test_nothing_leaves_the_picture_or_touches() -> None:
    source = Shapes(2, "train", 24, ((256, 256), (256, 400)), max_objects=3)
    for index in range(len(source)):
        pixels, _ = drawn(source, index)
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert (border == border[0]).all()
        assert len(read(pixels)) == len(source.sample(index)[0].things)


# --- the oracle ---


@pytest.mark.parametrize("number", [300, pytest.param(4000, marks=pytest.mark.slow)])
def test_oracle_reads_every_single_object(number: int) -> None:
    source = Shapes(1, "test", number)
    wrong = [text for pixels, text in (drawn(source, i) for i in range(number)) if not score(pixels, text)["all"]]
    assert wrong == []


@pytest.mark.parametrize("number", [120, pytest.param(3000, marks=pytest.mark.slow)])
def test_oracle_reads_scenes_at_any_aspect_ratio(number: int) -> None:
    source = Shapes(2, "test", number, CANVASES, max_objects=3)
    wrong = [text for pixels, text in (drawn(source, i) for i in range(number)) if not score(pixels, text)["all"]]
    assert len(wrong) <= number // 1000, wrong


def test_oracle_measures_position_and_radius() -> None:
    source = Shapes(3, "test", 60)
    for index in range(60):
        scene, _ = source.sample(index)
        pixels, _ = drawn(source, index)
        (found,) = read(pixels)
        assert found.radius == pytest.approx(SIZES[scene.things[0].size], rel=0.08)
        assert found.place == scene.place
        assert found.error < 0.03


@pytest.mark.parametrize(("sigma", "noise"), [(0.0, 8.0), (0.7, 0.0), (0.5, 8.0)])
def test_oracle_tolerates_mild_noise_and_blur(sigma: float, noise: float) -> None:
    source, rng = Shapes(4, "test", 120), np.random.default_rng(0)
    wrong = 0
    for index in range(len(source)):
        pixels, text = drawn(source, index)
        values = soften(pixels, sigma) if sigma else pixels.astype(float)
        wrong += not score(as_pixels(values + rng.normal(0, noise, values.shape)), text)["all"]
    assert wrong <= 1


@settings(max_examples=60, deadline=None)
@given(SINGLES, SINGLES)
def test_oracle_names_exactly_the_differing_attributes(scene: Scene, other: Scene) -> None:
    right = score(render(scene, 32, 32, np.random.default_rng(0)), caption(other))
    agree = {a: getattr(scene.things[0], a) == getattr(other.things[0], a) for a in ("color", "shape", "size")}
    agree["place"] = scene.place == other.place
    assert right == agree | {"all": scene == other}


def test_oracle_checks_relations_and_objects_apart() -> None:
    pixels = render(parse_caption("a small red circle above a large blue square"), 48, 48, np.random.default_rng(0))
    turned = score(pixels, "a small red circle below a large blue square")
    assert turned["objects"]
    assert not turned["relations"]
    assert not turned["all"]
    swapped = score(pixels, "a large red circle above a small blue square")
    assert swapped == {"color": True, "shape": True, "size": False, "objects": False, "relations": True, "all": False}
    assert score(pixels, "a large blue square below a small red circle")["all"]
    assert not any(score(pixels, "a small red circle at the top").values())  # one object was asked for, two are there


def test_oracle_sees_nothing_in_empty_and_noisy_pictures() -> None:
    rng = np.random.default_rng(0)
    texts = itertools.cycle(held_out_captions())
    assert read(np.full((32, 32, 3), 240, np.uint8)) == []
    assert read(np.zeros((32, 32, 3), np.uint8)) == []
    for _ in range(100):
        uniform = rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)
        light = as_pixels(rng.normal(240, rng.uniform(5, 80), (32, 32, 3)))
        for pixels in (uniform, light):
            assert [found.shape for found in read(pixels) if found.shape] == []
            assert not score(pixels, next(texts))["all"]


@pytest.mark.filterwarnings("error")
def test_oracle_survives_any_picture() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        height, width = rng.integers(1, 40, 2)
        levels = rng.choice(
            [0, 128, 190, 200, 240, 255], (1 + height // 3, 1 + width // 3, 3), p=[0.1] * 4 + [0.5, 0.1]
        )
        pixels = levels.repeat(3, 0).repeat(3, 1)[:height, :width].astype(np.uint8)
        assert all(np.isfinite([f.x, f.y, f.radius, f.error]).all() for f in read(pixels))


@pytest.mark.parametrize("rest", ["background", "black", "noise"])
def test_oracle_refuses_half_drawn_pictures(rest: str) -> None:
    source, rng = Shapes(5, "test", 72), np.random.default_rng(0)
    for index in range(len(source)):
        pixels, text = drawn(source, index)
        (found,) = read(pixels)
        row = round(found.y * 32)
        half = pixels.copy()
        fill = {"background": pixels[0, 0], "black": 0, "noise": rng.integers(0, 256, half[row:].shape)}[rest]
        half[row:] = fill
        assert not score(half, text)["all"], text


def test_oracle_refuses_other_arrays() -> None:
    with pytest.raises(ValueError, match="uint8"):
        read(np.zeros((32, 32, 3)))
    with pytest.raises(ValueError, match="not a caption"):
        score(np.zeros((32, 32, 3), np.uint8), "a cat")
