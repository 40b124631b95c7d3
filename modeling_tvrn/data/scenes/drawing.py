"""Where the objects of a scene go, and its picture: shaded shapes with soft shadows on plain or noisy backgrounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .description import Group, Scene

RGB = {
    "red": (205, 38, 38),
    "orange": (242, 138, 28),
    "yellow": (242, 222, 48),
    "green": (38, 150, 58),
    "blue": (42, 78, 205),
    "purple": (142, 56, 172),
    "white": (244, 244, 240),
    "black": (20, 20, 22),
}
DIAMETERS = {"small": (0.13, 0.16), "large": (0.25, 0.28)}  # of the picture's side
CONTAINER_DIAMETER = (0.62, 0.74)
# Circumscribed radius of each shape in diameters, chosen so that equal diameters look equally large.
RADII = {"circle": 0.5, "square": 0.6, "triangle": 0.58, "star": 0.56, "cross": 0.55}
EXTENT = 1.18  # no shape, however turned, is wider than this many diameters
MAX_TILT = math.radians(12)
SUPERSAMPLING = 3
SHADOW_STRENGTH = [round(0.4 * value) for value in range(256)]  # PIL applies a table much faster than a function

Point = tuple[float, float]


@dataclass(frozen=True)
class PlacedObject:
    """One object in the unit square, y downwards."""

    size: str
    colour: str
    shape: str
    outline: tuple[Point, ...]

    @property
    def box(self) -> tuple[float, float, float, float]:
        """The tight box, xyxy in [0, 1]."""
        xs, ys = zip(*self.outline, strict=True)
        return min(xs), min(ys), max(xs), max(ys)


def _outline(shape: str, centre: Point, diameter: float, tilt: float) -> tuple[Point, ...]:
    """The polygon of a shape; a circle is a polygon of 48 corners."""
    radius = RADII[shape] * diameter
    corners = {"circle": 48, "square": 4, "triangle": 3, "star": 10, "cross": 12}[shape]
    first = {"square": math.pi / 4, "triangle": -math.pi / 2, "star": -math.pi / 2}.get(shape, 0.0)
    points = []
    for k in range(corners):
        angle, length = first + 2 * math.pi * k / corners, radius
        if shape == "star" and k % 2:
            length = 0.45 * radius
        if shape == "cross":  # three corners an arm: two at its end, one where it meets the next
            arm, part = divmod(k, 3)
            angle = arm * math.pi / 2 + (-0.32, 0.32, math.pi / 4)[part]
            length = radius if part < 2 else radius * math.sqrt(2) * math.sin(0.32)
        points.append((centre[0] + length * math.cos(angle + tilt), centre[1] + length * math.sin(angle + tilt)))
    return tuple(points)


def _place_object(group: Group, centre: Point, diameter: float, rng: np.random.Generator) -> PlacedObject:
    tilt = rng.uniform(-MAX_TILT, MAX_TILT)
    return PlacedObject(group.size, group.colour, group.shape, _outline(group.shape, centre, diameter, tilt))


def _diameters(group: Group, rng: np.random.Generator) -> list[float]:
    return [float(diameter) for diameter in rng.uniform(*DIAMETERS[group.size], size=group.count)]


def _place_halves(scene: Scene, rng: np.random.Generator) -> list[PlacedObject]:
    """Each group in its half; along the other axis both are centred alike, so that only one relation holds."""
    groups = [(group, _diameters(group, rng)) for group in (scene.first, scene.second)]
    spacings = [rng.uniform(EXTENT * max(diameters), max(0.26, EXTENT * max(diameters))) for _, diameters in groups]
    reach = max(
        (len(diameters) - 1) * spacing / 2 + EXTENT * max(diameters) / 2
        for (_, diameters), spacing in zip(groups, spacings, strict=True)
    )
    slack = max(0.0, 0.495 - reach)
    common = rng.uniform(-1, 1) * max(0.0, slack - 0.05)
    placed = []
    for (group, diameters), spacing, middle in zip(groups, spacings, (0.26, 0.74), strict=True):
        play = min(0.1, 0.235 - EXTENT * max(diameters) / 2)
        offset = 0.5 + common + rng.uniform(-1, 1) * min(slack, 0.05)
        for k, diameter in enumerate(diameters):
            along = middle + rng.uniform(-play, play)
            across = offset + (k - (len(diameters) - 1) / 2) * spacing
            centre = (along, across) if scene.relation == "left of" else (across, along)
            placed.append(_place_object(group, centre, diameter, rng))
    return placed


def _place_between(scene: Scene, rng: np.random.Generator) -> list[PlacedObject]:
    """Three in a row, along either axis."""
    horizontal = rng.random() < 0.5
    row = 0.5 + rng.uniform(-0.25, 0.25)
    diameters = _diameters(scene.first, rng) + _diameters(scene.second, rng)
    placed = []
    for group, diameter, middle in zip(
        (scene.first, scene.second, scene.second), diameters, (0.5, 0.175, 0.825), strict=True
    ):
        along, across = middle + rng.uniform(-0.008, 0.008), row + rng.uniform(-0.03, 0.03)
        placed.append(_place_object(group, (along, across) if horizontal else (across, along), diameter, rng))
    return placed


def _place_inside(scene: Scene, rng: np.random.Generator) -> list[PlacedObject]:
    """The container first, because objects are painted in this order."""
    outer = rng.uniform(*CONTAINER_DIAMETER)
    room = 0.495 - EXTENT * outer / 2
    x, y = (0.5 + offset for offset in rng.uniform(-room, room, size=2))
    placed = [_place_object(scene.second, (x, y), outer, rng)]
    count = scene.first.count
    ring = rng.uniform(0, 0.08) if count == 1 else rng.uniform(0.12, 0.14)
    turn = rng.uniform(0, 2 * math.pi)
    for k, diameter in enumerate(_diameters(scene.first, rng)):
        angle = turn + 2 * math.pi * k / count
        centre = (x + ring * math.cos(angle), y + ring * math.sin(angle))
        placed.append(_place_object(scene.first, centre, diameter, rng))
    return placed


def place_objects(scene: Scene, rng: np.random.Generator) -> list[PlacedObject]:
    """Positions, diameters and tilts for every object of a scene; objects do not touch unless one is inside."""
    place: Callable[[Scene, np.random.Generator], list[PlacedObject]] = {
        "inside": _place_inside,
        "between": _place_between,
    }.get(scene.relation, _place_halves)
    return place(scene, rng)


def _background(side: int, rng: np.random.Generator) -> Image.Image:
    """A muted field: plain, a gradient, clouds or a coarse texture (the number of control points decides)."""
    cells = (1, 2, 4, 9)[rng.integers(4)]
    grey = rng.uniform(85, 165)
    tint = rng.uniform(-14, 14, size=3)
    field = grey + tint + rng.uniform(-26, 26, size=(cells, cells, 1)) + rng.uniform(-7, 7, size=(cells, cells, 3))
    small = Image.fromarray(field.clip(0, 255).astype(np.uint8))
    return small.resize((side, side), Image.Resampling.BICUBIC)


def _paint(canvas: Image.Image, item: PlacedObject, rng: np.random.Generator) -> None:
    """One object with its shadow, lit from above; works on its own crop, so that the cost follows its size."""
    side = canvas.width
    margin = side // 24
    x1, y1, x2, y2 = (round(value * side) for value in item.box)
    width, height = x2 - x1 + 2 * margin, y2 - y1 + 2 * margin
    mask = Image.new("L", (width, height))
    corners = [(x * side - x1 + margin, y * side - y1 + margin) for x, y in item.outline]
    ImageDraw.Draw(mask).polygon(corners, fill=255)
    shadow = mask.filter(ImageFilter.GaussianBlur(margin / 3)).point(SHADOW_STRENGTH)
    canvas.paste((10, 10, 14), (x1 - margin, y1 - margin + margin // 2), shadow)
    colour = np.array(RGB[item.colour]) + rng.uniform(-10, 10, size=3)
    light = np.linspace(1.06, 0.88, height)[:, None, None]
    shaded = np.broadcast_to((colour * light).clip(0, 255), (height, width, 3)).astype(np.uint8)
    canvas.paste(Image.fromarray(shaded), (x1 - margin, y1 - margin), mask)


def draw_scene(objects: list[PlacedObject], image_size: int, rng: np.random.Generator) -> Image.Image:
    """The RGB picture (image_size, image_size) of placed objects, with background and grain drawn from `rng`."""
    canvas = _background(image_size * SUPERSAMPLING, rng)
    for item in objects:
        _paint(canvas, item, rng)
    pixels = np.asarray(canvas.resize((image_size, image_size), Image.Resampling.BOX), dtype=np.float32)
    grain = rng.uniform(0, 9) * rng.standard_normal((image_size, image_size, 1), dtype=np.float32)
    return Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8))
