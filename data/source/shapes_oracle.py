"""Reads color, shape, size and place of every object back out of a picture of the `shapes` grammar.

Exact scoring of text-to-image and image-to-text without weights from elsewhere: the oracle sees pixels only. It finds
the even light background, splits what differs from it into connected parts, takes position and radius of each part
from its moments, and redraws the part as each shape with the renderer of `shapes`: the best redrawing names the shape,
its least-squares color names the color. A part that no shape explains keeps `shape=None`, so that empty, noisy and
half-drawn pictures score as wrong. Meant for 32 pixels on the shorter side and more.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache

import numpy as np

from data.source.shapes import COLORS, PLACES, RELATIONS, SHAPES, SIZES, Thing, coverage, parse_caption

_CONTRAST = 45.0  # RGB distance to the background at which a pixel belongs to an object: above 5 sigma of mild noise
_LIGHT, _NEUTRAL, _EVEN = 190, 45, 0.2  # a background pixel: least channel, largest spread; least part of the picture
_SPECK = 0.004  # parts smaller than this fraction of the squared shorter side are dirt (the smallest object has 0.02)
_MAX_PARTS = 8  # more parts than this are no scene
_MAX_ERROR = 0.06  # unexplained part of an object's energy above which it is none of the shapes
_MAX_COLOR = 70.0  # RGB distance above which a color is none of the palette (two palette colors are 100 apart)
_MAX_PLACE = 0.1  # distance from a place's center, per axis, above which an object is at none of the places
_SIZE_LIMITS = (0.08, 0.28)  # radius / shorter side; outside it is none of the sizes
_BLURS = (0.5, 0.0, 0.8)  # pixels, Gaussian sigma: a picture as rendered (0) and blurred ones; the first ranks shapes
_TINY = 1e-6  # keeps divisions finite for parts that are no object at all
_MAX_NOISE = 12.0  # gray levels: up to this much noise, measured on the background, is not held against an object


@dataclass(frozen=True)
class Found:
    """One object read from a picture; None where an attribute is none of the grammar's.

    `x`, `y`: center as fractions of width and height; `radius`: fraction of the shorter side; `error`: part of the
    object's energy that the best redrawing leaves unexplained, 0 (perfect) .. 1.
    """

    color: str | None
    shape: str | None
    size: str | None
    x: float
    y: float
    radius: float
    error: float

    @property
    def place(self) -> str | None:
        """The nearest place of the grammar, None when the object lies between two places."""
        off = {name: max(abs(self.x - x), abs(self.y - y)) for name, (x, y) in PLACES.items()}
        name = min(off, key=off.__getitem__)
        return name if off[name] <= _MAX_PLACE else None


def read(pixels: np.ndarray) -> list[Found]:
    """All objects of a (height, width, 3) uint8 picture, top to bottom; [] when it has no even light background,
    nothing on it, or more parts than any scene."""
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"the oracle reads (height, width, 3) uint8 pictures, not {pixels.shape} {pixels.dtype}")
    background = _background(pixels)
    if background is None:
        return []
    difference = pixels.astype(np.float64) - background
    labels, areas = _components((difference**2).sum(2) > _CONTRAST**2)
    noise = min(float(np.median(difference[labels == 0] ** 2)) / 0.4549, _MAX_NOISE**2)  # median of chi square
    side = min(pixels.shape[:2])
    parts = [label for label, area in enumerate(areas, 1) if area >= _SPECK * side**2]
    if len(parts) > _MAX_PARTS:
        return []
    found = [_identify(difference, labels, part, background, noise) for part in parts]
    return sorted(found, key=lambda thing: (thing.y, thing.x))


def score(pixels: np.ndarray, caption: str) -> dict[str, bool]:
    """What of `caption` is true in the picture.

    Keys for one object: color, shape, size, place, all. For two and three objects: color, shape, size (right for every
    object), objects (these three together), relations, all. Everything is False when the number of objects is wrong;
    else the objects are matched to the caption's such that most attributes agree. ValueError for a text that is no
    caption of the grammar.
    """
    scene = parse_caption(caption)
    attributes = ("color", "shape", "size")
    keys = (*attributes, "place", "all") if scene.place is not None else (*attributes, "objects", "relations", "all")
    found = read(pixels)
    if len(found) != len(scene.things):
        return dict.fromkeys(keys, False)

    def matches(order: tuple[Found, ...], attribute: str) -> list[bool]:
        return [getattr(f, attribute) == getattr(t, attribute) for f, t in zip(order, scene.things, strict=True)]

    order = max(itertools.permutations(found), key=lambda order: sum(sum(matches(order, a)) for a in attributes))
    right = {attribute: all(matches(order, attribute)) for attribute in attributes}
    if scene.place is not None:
        right["place"] = order[0].place == scene.place
    else:
        right["objects"] = all(right.values())
        shape = (pixels.shape[0], pixels.shape[1])
        pairs = zip(scene.relations, order, order[1:], strict=False)
        right["relations"] = all(_related(relation, first, second, shape) for relation, first, second in pairs)
    return right | {"all": all(right.values())}


def things(found: list[Found]) -> list[Thing]:
    """The fully readable objects of `read`, without their positions."""
    return [Thing(f.color, f.shape, f.size) for f in found if f.color and f.shape and f.size]


def _related(relation: str, first: Found, second: Found, shape: tuple[int, int]) -> bool:
    """True when `first` lies beyond `second` in the relation's direction, their bounding squares (nearly) apart."""
    height, width = shape
    dx, dy = RELATIONS[relation]
    distance = dx * (first.x - second.x) * width + dy * (first.y - second.y) * height
    return distance > 0.8 * (first.radius + second.radius) * min(shape)


def _background(pixels: np.ndarray) -> np.ndarray | None:
    """The (3,) color of an even light neutral background, None when there is none."""
    least, most = pixels.min(2), pixels.max(2)
    light = pixels[(least >= _LIGHT) & (most - least <= _NEUTRAL)]
    if len(light) < _EVEN * least.size:
        return None
    middle: np.ndarray = np.median(light, axis=0)
    return middle


def _components(mask: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Connected parts (by sides, not corners) of a boolean picture: labels 0 (none), 1, 2, ... and each part's area."""
    steps = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(steps == 1)
    ends = np.nonzero(steps == -1)[1]
    runs = list(zip(rows.tolist(), starts.tolist(), ends.tolist(), strict=True))
    parent = list(range(len(runs)))

    def root(run: int) -> int:
        while parent[run] != run:
            parent[run] = parent[parent[run]]
            run = parent[run]
        return run

    above = 0  # the first run that can still touch the current one from the row above
    for current, (row, start, end) in enumerate(runs):
        while runs[above][0] < row - 1 or (runs[above][0] == row - 1 and runs[above][2] <= start):
            above += 1
        other = above
        while runs[other][0] == row - 1 and runs[other][1] < end:
            parent[root(current)] = root(other)
            other += 1
    labels = np.zeros(mask.shape, np.int32)
    number: dict[int, int] = {}
    areas: list[int] = []
    for run, (row, start, end) in enumerate(runs):
        label = number.setdefault(root(run), len(number) + 1)
        if label > len(areas):
            areas.append(0)
        areas[label - 1] += end - start
        labels[row, start:end] = label
    return labels, areas


@cache
def _moments(shape: str) -> tuple[float, float]:
    """Of a shape of radius 1: its centroid's y, and the mean squared distance of its points to the centroid."""
    grid = np.arange(-127.5, 128)
    weight = coverage(shape, grid, grid[:, None], 120.0)
    y = (weight * grid[:, None]).sum() / weight.sum()
    spread = (weight * (grid**2 + (grid[:, None] - y) ** 2)).sum() / weight.sum()
    return float(y / 120), float(spread / 120**2)


@cache
def _blur(size: int, sigma: float) -> np.ndarray:
    """(size, size) matrix that blurs along one axis with a Gaussian; the identity for sigma 0."""
    if sigma == 0:
        return np.eye(size)
    distance = np.arange(size) - np.arange(size)[:, None]
    weight = np.exp(-0.5 * (distance / sigma) ** 2)
    return np.asarray(weight / np.exp(-0.5 * (np.arange(-9, 10) / sigma) ** 2).sum())


@dataclass(frozen=True)
class _Part:
    """One connected part, cut out: `crop` (rows, columns, 3) is picture minus background, zero away from the part;
    `xs` (columns,), `ys` (rows, 1): pixel centers; `energy`: squared sum of `crop` less what noise adds to it."""

    crop: np.ndarray
    xs: np.ndarray
    ys: np.ndarray
    energy: float

    def draw(self, shape: str, blur: float, x: float, y: float, radius: float) -> np.ndarray:
        drawn = coverage(shape, self.xs - x, self.ys - y, radius)
        if blur:
            drawn = _blur(len(self.ys), blur) @ drawn @ _blur(len(self.xs), blur)
        return drawn

    def explain(self, drawn: np.ndarray) -> tuple[float, np.ndarray]:
        """The part of the energy that `drawn` in its best color leaves over, and that color minus the background."""
        power = max(float((drawn**2).sum()), _TINY)
        color = drawn.ravel() @ self.crop.reshape(-1, 3) / power
        return max(0.0, 1 - float((color**2).sum() * power) / self.energy), color

    def refine(self, shape: str, blur: float, at: np.ndarray) -> np.ndarray:
        """One Gauss-Newton step on `at` = (x, y, radius): noise moves moments more than it moves the best redrawing."""
        drawn = self.draw(shape, blur, *at)
        _, color = self.explain(drawn)
        step = 0.2  # pixels
        slopes = np.stack([(self.draw(shape, blur, *(at + step * unit)) - drawn).ravel() / step for unit in np.eye(3)])
        target = (self.crop @ color / max(float(color @ color), _TINY) - drawn).ravel()
        move = np.linalg.solve(slopes @ slopes.T + _TINY * np.eye(3), slopes @ target)
        return at + np.clip(move, -1.0, 1.0)


def _identify(difference: np.ndarray, labels: np.ndarray, part: int, background: np.ndarray, noise: float) -> Found:
    """Name one connected part; `difference`: picture minus background (height, width, 3); `noise`: its variance."""
    height, width = labels.shape
    inside, others = labels == part, (labels != part) & (labels > 0)
    rows, columns = np.nonzero(inside.any(1))[0], np.nonzero(inside.any(0))[0]
    top, bottom = max(rows[0] - 2, 0), min(rows[-1] + 3, height)
    left, right = max(columns[0] - 2, 0), min(columns[-1] + 3, width)
    inside = inside[top:bottom, left:right]
    near = _near(inside) & ~others[top:bottom, left:right]
    crop = difference[top:bottom, left:right] * near[..., None]
    xs, ys = np.arange(left, right) + 0.5, np.arange(top, bottom)[:, None] + 0.5
    energy = float((crop**2).sum())
    cut = _Part(crop, xs, ys, max(energy - 3 * noise * float(near.sum()), energy / 2))
    direction = crop[inside].mean(0)
    weight = crop @ direction  # signed, so that noise around the object cancels out
    weight /= max(float(weight.sum()), _TINY)
    x, y = (weight * xs).sum(), (weight * ys).sum()
    spread = max(float((weight * ((xs - x) ** 2 + (ys - y) ** 2)).sum()), 2.0)

    def start(shape: str, blur: float) -> np.ndarray:
        offset, second = _moments(shape)
        radius = ((spread - 2 * blur**2) / second) ** 0.5
        return np.array([x, y - offset * radius, radius])

    def likeness(shape: str, blur: float) -> float:  # on one channel, which ranks as three do in a third of the time
        drawn = cut.draw(shape, blur, *start(shape, blur)).ravel()
        return float((drawn @ weight.ravel()) ** 2 / max(float(drawn @ drawn), _TINY))

    fits = []
    for shape in sorted(SHAPES, key=lambda shape: -likeness(shape, _BLURS[0]))[:2]:
        blur = max(_BLURS, key=lambda blur: likeness(shape, blur))
        at = cut.refine(shape, blur, start(shape, blur))
        fits.append((*cut.explain(cut.draw(shape, blur, *at)), shape, at))
    error, color, shape, (x, y, radius) = min(fits, key=lambda f: f[0])
    return _named(shape, error, x / width, y / height, radius / min(height, width), background + color)


def _near(inside: np.ndarray) -> np.ndarray:
    """The part and the pixels up to two steps around it, where its soft edge lies."""
    padded = np.pad(inside, 2)
    height, width = inside.shape
    near = np.zeros_like(inside)
    for dy, dx in itertools.product(range(5), range(5)):
        near |= padded[dy : dy + height, dx : dx + width]
    return near


def _named(shape: str, error: float, x: float, y: float, radius: float, color: np.ndarray) -> Found:
    """The names of what was measured, None where nothing of the grammar is near enough."""
    distances = {name: float(np.linalg.norm(color - value)) for name, value in COLORS.items()}
    nearest = min(distances, key=distances.__getitem__)
    low, high = _SIZE_LIMITS
    return Found(
        color=nearest if distances[nearest] <= _MAX_COLOR else None,
        shape=shape if error <= _MAX_ERROR else None,
        size=min(SIZES, key=lambda name: abs(np.log(radius / SIZES[name]))) if low <= radius <= high else None,
        x=float(x),
        y=float(y),
        radius=float(radius),
        error=error,
    )
