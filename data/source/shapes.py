"""Pictures drawn from a small grammar, with their captions: any number, any resolution, no download.

    scene   := object place                                          "a small red circle at the top left"
             | object relation object                                "a small red circle above a large blue ring"
             | object relation object ", which is" relation object   (the two relations differ)
    object  := "a" size color shape

Everything is a pure function of (seed, split, index). Lengths are fractions: centers of the picture's width and height,
radii of its shorter side, so that one scene drawn with one random stream looks the same at every resolution.
Every shape fills its bounding square, whose half side is the radius. A third of all scenes, chosen by a fixed hash that
no seed changes, is held out: `train` never draws them, `test` draws nothing else.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from data.document import Document, Image, Text

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 35),
    "orange": (245, 125, 15),
    "yellow": (250, 225, 35),
    "green": (35, 155, 60),
    "cyan": (30, 205, 225),
    "blue": (35, 70, 215),
    "purple": (140, 40, 170),
    "pink": (255, 130, 190),
    "brown": (120, 70, 30),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
# Radius / shorter side, each a third larger than the one before. Two large ones fit side by side.
SIZES = {"small": 0.125, "medium": 0.165, "large": 0.22}
PLACES: dict[str, tuple[float, float]] = {  # center (x, y)
    "at the top left": (0.25, 0.25),
    "at the top": (0.5, 0.25),
    "at the top right": (0.75, 0.25),
    "at the left": (0.25, 0.5),
    "at the center": (0.5, 0.5),
    "at the right": (0.75, 0.5),
    "at the bottom left": (0.25, 0.75),
    "at the bottom": (0.5, 0.75),
    "at the bottom right": (0.75, 0.75),
}
RELATIONS: dict[str, tuple[int, int]] = {  # direction (x, y) from the second object to the first
    "above": (0, -1),
    "below": (0, 1),
    "to the left of": (-1, 0),
    "to the right of": (1, 0),
}
BACKGROUND = (225, 255)  # gray level, drawn once per picture
MIN_SIDE = 16  # pixels; below this a small cross and a small diamond are the same few pixels
CROSS_ARM = 0.34  # half width of a cross's arm / radius
RING_HOLE = 0.52  # inner / outer radius of a ring
_POSITION_JITTER, _RADIUS_JITTER, _COLOR_JITTER = 0.03, 0.05, 8
_EDGE, _GAP = 0.008, 0.028  # least distance of an object to the picture's border, and to the border of its quarter
_CHAIN = ", which is "


@dataclass(frozen=True)
class Thing:
    """One drawn object: names from COLORS, SHAPES and SIZES."""

    color: str
    shape: str
    size: str

    def __str__(self) -> str:
        return f"a {self.size} {self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """One object with a place, or two or three different objects in a chain of relations.

    `relations[i]` says where `things[i]` is, seen from `things[i + 1]`.
    """

    things: tuple[Thing, ...]
    place: str | None = None
    relations: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        single = len(self.things) == 1
        if single != (self.place is not None) or len(self.relations) != len(self.things) - 1 or len(self.things) > 3:
            raise ValueError(f"a scene is one object with a place, or 2 or 3 objects and their relations, not {self}")
        if len(set(self.things)) < len(self.things):
            raise ValueError(f"the objects of a scene must differ, or no caption can tell them apart: {self.things}")
        if len(set(self.relations)) < len(self.relations):
            raise ValueError(f"a scene's two relations must differ, since three objects in a line do not fit: {self}")


def caption(scene: Scene) -> str:
    """The one caption of `scene`; `parse_caption` is the inverse."""
    if scene.place is not None:
        return f"{scene.things[0]} {scene.place}"
    first, *rest = (f" {r} {t}" for r, t in zip(scene.relations, scene.things[1:], strict=True))
    return str(scene.things[0]) + first + "".join(_CHAIN + r.lstrip() for r in rest)


_THING = f"a ({'|'.join(SIZES)}) ({'|'.join(COLORS)}) ({'|'.join(SHAPES)})"
_RELATION = f"({'|'.join(RELATIONS)})"
_SINGLE = re.compile(f"{_THING} ({'|'.join(PLACES)})")
_CHAINED = re.compile(f"{_THING} {_RELATION} {_THING}(?:{_CHAIN}{_RELATION} {_THING})?")


def parse_caption(text: str) -> Scene:
    """The scene that `text` describes. ValueError when `text` is not a caption of this grammar, letter for letter."""
    match = _SINGLE.fullmatch(text) or _CHAINED.fullmatch(text)
    if match:
        parts = [part for part in match.groups() if part is not None]
        things = tuple(Thing(parts[i + 1], parts[i + 2], parts[i]) for i in range(0, len(parts) - 2, 4))
        if len(things) == 1:
            return Scene(things, place=parts[3])
        return Scene(things, relations=tuple(parts[3::4]))
    raise ValueError(f"not a caption of the shapes grammar: {text!r}")


def held_out(scene: Scene) -> bool:
    """True for the third of all scenes that only the test split shows.

    Scenes that mean the same ("A above B", "B below A") share one key and thus one side of the split.
    """
    key = caption(scene)
    if scene.place is None:
        facts = []
        for relation, first, second in zip(scene.relations, scene.things, scene.things[1:], strict=False):
            if relation in ("below", "to the right of"):
                first, second = second, first
            facts.append(f"{first} {'above' if relation in ('above', 'below') else 'to the left of'} {second}")
        key = "; ".join(sorted(facts))
    return hashlib.blake2b(key.encode()).digest()[0] % 3 == 0


@cache
def _singles(test: bool) -> tuple[Scene, ...]:
    """All single-object scenes of one split, in a fixed shuffled order."""
    combinations = itertools.product(COLORS, SHAPES, SIZES, PLACES)
    scenes = [Scene((Thing(color, shape, size),), place) for color, shape, size, place in combinations]
    scenes.sort(key=lambda scene: hashlib.blake2b(b"order:" + caption(scene).encode()).digest())
    return tuple(scene for scene in scenes if held_out(scene) == test)


def held_out_captions() -> list[str]:
    """The captions of all single-object scenes that training never shows, each once, in a fixed shuffled order."""
    return [caption(scene) for scene in _singles(True)]


def coverage(shape: str, x: np.ndarray, y: np.ndarray, radius: float, edge: float = 1.0) -> np.ndarray:
    """How much of each pixel `shape` covers, 0..1: an anti-aliased picture without supersampling.

    `x`, `y`: pixel centers relative to the middle of the shape, in pixels, broadcast against each other; `radius` in
    pixels; `edge`: width of the transition in pixels (1 is a sharp picture, more is a blurred one).
    """
    if shape == "circle":
        distance = np.hypot(x, y) - radius
    elif shape == "square":
        distance = np.maximum(abs(x), abs(y)) - radius
    elif shape == "triangle":  # apex (0, -radius), base from (-radius, radius) to (radius, radius)
        distance = np.maximum(y - radius, (2 * abs(x) - y - radius) / 5**0.5)
    elif shape == "diamond":
        distance = (abs(x) + abs(y) - radius) / 2**0.5
    elif shape == "cross":
        ax, ay = abs(x), abs(y)
        arm = CROSS_ARM * radius
        distance = np.minimum(np.maximum(ax - radius, ay - arm), np.maximum(ay - radius, ax - arm))
    elif shape == "ring":
        distance = abs(np.hypot(x, y) - (1 + RING_HOLE) / 2 * radius) - (1 - RING_HOLE) / 2 * radius
    else:
        raise ValueError(f"unknown shape {shape!r}; one of {', '.join(SHAPES)}")
    return np.clip(0.5 - distance / edge, 0.0, 1.0)


@cache
def _arrangements(relations: tuple[str, ...]) -> tuple[tuple[tuple[int, int], ...], ...]:
    """All ways to put the objects into the picture's four quarters (column, row) such that every relation is true, and
    true directly: above means straight above, unless a later relation finds that place taken."""
    quarters = list(itertools.product((0, 1), (0, 1)))
    found: dict[tuple[bool, ...], list] = {}
    for cells in itertools.permutations(quarters, len(relations) + 1):
        steps = [(a[0] - b[0], a[1] - b[1]) for a, b in itertools.pairwise(cells)]
        wanted = [RELATIONS[relation] for relation in relations]
        if all(dx * x + dy * y == 1 for (dx, dy), (x, y) in zip(steps, wanted, strict=True)):
            found.setdefault(tuple(step == want for step, want in zip(steps, wanted, strict=True)), []).append(cells)
    return tuple(found[max(found)])


def _centers(scene: Scene, radii: np.ndarray, extent: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Centers (objects, 2) as x, y in units of the shorter side; `extent`: (width, height) of the picture."""
    if scene.place is not None:
        center = np.array(PLACES[scene.place]) * extent + rng.uniform(-_POSITION_JITTER, _POSITION_JITTER, 2)
        margin = radii[0] + _EDGE
        return np.clip(center, margin, extent - margin)[None]
    arrangements = _arrangements(scene.relations)
    cells = np.array(arrangements[rng.integers(len(arrangements))])
    # Every object stays inside its own quarter, hence nothing overlaps and every relation holds, without any retry.
    low = np.where(cells == 0, _EDGE, extent / 2 + _GAP) + radii[:, None]
    high = np.where(cells == 0, extent / 2 - _GAP, extent - _EDGE) - radii[:, None]
    return low + rng.random(cells.shape) * (high - low)


def render(scene: Scene, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Draw `scene`: (height, width, 3) uint8 RGB. `rng` gives background, positions, sizes and colors their jitter."""
    side = min(height, width)
    if side < MIN_SIDE:
        raise ValueError(f"a {height}x{width} picture is too small to tell shapes apart; use {MIN_SIDE} pixels or more")
    canvas = np.full((height, width, 3), float(rng.integers(BACKGROUND[0], BACKGROUND[1] + 1)))
    count = len(scene.things)
    radii = np.array([SIZES[t.size] for t in scene.things]) * rng.uniform(1 - _RADIUS_JITTER, 1 + _RADIUS_JITTER, count)
    shift = rng.integers(-_COLOR_JITTER, _COLOR_JITTER + 1, (count, 3))
    colors = np.clip(np.array([COLORS[t.color] for t in scene.things]) + shift, 0, 255)
    centers = _centers(scene, radii, np.array([width, height]) / side, rng) * side
    for thing, (x, y), radius, color in zip(scene.things, centers, radii * side, colors, strict=True):
        left, top = max(int(x - radius) - 1, 0), max(int(y - radius) - 1, 0)
        right, bottom = min(int(x + radius) + 2, width), min(int(y + radius) + 2, height)
        xs, ys = np.arange(left, right) + 0.5 - x, np.arange(top, bottom)[:, None] + 0.5 - y
        region = canvas[top:bottom, left:right]
        region += coverage(thing.shape, xs, ys, radius)[..., None] * (color - region)
    return np.rint(canvas).astype(np.uint8)


class Shapes:
    """Captioned pictures; see the top of this file for what is drawn and what the split means.

    Arguments: `seed` >= 0; `split`; `size`: documents per epoch; `canvases`: (height, width) in pixels, one drawn per
    document; `max_objects` 1..3: each document has 1..max_objects objects; `caption_fraction` 0..1: this part of the
    documents shows the picture first, as read-only context, and learns the caption (image to text); in the others the
    caption comes first and both are learned (text to image).
    """

    name = "shapes"

    def __init__(
        self,
        seed: int,
        split: Literal["train", "test"],
        size: int,
        canvases: Sequence[tuple[int, int]] = ((32, 32),),
        max_objects: int = 1,
        caption_fraction: float = 0.5,
    ) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"shapes: split must be 'train' or 'test', not {split!r}")
        if seed < 0 or size < 1:
            raise ValueError(f"shapes: seed must be >= 0 and size >= 1, not {seed} and {size}")
        if not canvases or any(len(canvas) != 2 or min(canvas) < MIN_SIDE for canvas in canvases):
            raise ValueError(f"shapes: canvases must be (height, width) pairs, {MIN_SIDE} pixels or more: {canvases}")
        if max_objects not in (1, 2, 3):
            raise ValueError(f"shapes: max_objects must be 1, 2 or 3, not {max_objects}")
        if not 0.0 <= caption_fraction <= 1.0:
            raise ValueError(f"shapes: caption_fraction must be in 0..1, not {caption_fraction}")
        self.seed, self.split, self.size = seed, split, size
        self.canvases = tuple((int(height), int(width)) for height, width in canvases)
        self.max_objects, self.caption_fraction = max_objects, caption_fraction

    def __len__(self) -> int:
        return self.size

    def sample(self, index: int) -> tuple[Scene, tuple[int, int]]:
        """The scene and the (height, width) of document `index`, without drawing it."""
        rng = self._rng(index, 0)
        canvas = self.canvases[rng.integers(len(self.canvases))]
        return self._scene(index, rng), canvas

    def document(self, index: int, pixels: bool = True) -> Document:
        """Document `index` in 0..len-1; `pixels=False` leaves the picture undrawn (lengths need only its outline)."""
        scene, (height, width) = self.sample(index)
        drawn = render(scene, height, width, self._rng(index, 1)) if pixels else None
        read = self._rng(index, 2).random() < self.caption_fraction
        text, image = Text(caption(scene)), Image(height, width, drawn, learn=not read)
        return Document((image, text) if read else (text, image), id=f"{self.split}/{index}", source=self.name)

    def _rng(self, index: int, purpose: int) -> np.random.Generator:
        """An independent stream per document and purpose, so that asking for one thing never shifts another."""
        if not 0 <= index < self.size:
            raise IndexError(f"shapes: document {index} of {self.size}")
        return np.random.default_rng((self.seed, self.split == "test", index, purpose))

    def _scene(self, index: int, rng: np.random.Generator) -> Scene:
        test = self.split == "test"
        count = int(rng.integers(1, self.max_objects + 1))
        if count == 1:  # the test split walks through its scenes, so that a small test set does not repeat itself
            scenes = _singles(test)
            return scenes[index % len(scenes) if test else rng.integers(len(scenes))]
        colors, shapes, sizes, relations = list(COLORS), SHAPES, list(SIZES), list(RELATIONS)
        kinds = list(itertools.product(colors, shapes, sizes))
        while True:  # a third of all scenes is on the test side: a few tries at most
            things = tuple(Thing(*kinds[i]) for i in rng.choice(len(kinds), count, replace=False))
            chosen = tuple(relations[i] for i in rng.choice(len(relations), count - 1, replace=False))
            scene = Scene(things, relations=chosen)
            if held_out(scene) == test:
                return scene
