"""The world: small pictures of coloured shapes, and the scenes behind them.

A *scene* is what a picture shows, known exactly because we drew it: 1 to 4 objects, each with a size, a colour, a shape
and a place in one of four quarters, jittered, before a wall and a floor of two greys. words.py turns a scene into
captions, questions and answers, as GPT-4 turned COCO's captions and boxes into LLaVA's training data.

Four combinations of colour and shape (`WITHHELD`) appear in no training picture and in no training text, neither here
nor when the towers are pretrained. Every colour and every shape of them is known from other combinations, so a model
that answers about a red cross has put "red" and "cross" together by itself.
"""

import colorsys
import dataclasses
import math

from PIL import Image, ImageDraw

COLORS = {"red": (212, 32, 32), "orange": (240, 136, 20), "yellow": (242, 222, 40), "green": (34, 158, 52),
          "blue": (38, 70, 214), "purple": (140, 44, 170)}
NAMELESS = ((60, 110), (160, 205), (248, 268), (310, 342))  # hues in degrees, far from every colour above
NAMELESS_SHARE = 0.4  # of the training scenes
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": 6.0, "big": 10.0}  # radius in pixels
PLACES = ("top-left", "top-right", "bottom-left", "bottom-right")
WITHHELD = (("purple", "circle"), ("yellow", "square"), ("blue", "triangle"), ("red", "cross"))
ALLOWED = tuple((color, shape) for color in COLORS for shape in SHAPES if (color, shape) not in WITHHELD)
SIDE = 48  # pixels of a training picture
CELL = SIDE / 2
COUNTS = {1: 45, 2: 30, 3: 15, 4: 10}  # per cent of the scenes; most are simple, as a small model must begin with
SHARPNESS = 4  # a picture is drawn so many times larger, then reduced: smooth edges


@dataclasses.dataclass
class Object:
    """One thing in a picture; x, y, radius in pixels of a SIDE x SIDE picture, rgb 0..255."""

    size: str
    color: str  # or None: it has no name
    shape: str
    place: str
    x: float
    y: float
    radius: float
    rgb: tuple


@dataclasses.dataclass
class Scene:
    """Everything that a picture shows. `objects` stand in reading order: row by row, from left to right."""

    objects: list
    wall: tuple
    floor: tuple
    horizon: float


def make_scene(rng, withheld=False, count=None):
    """A random scene of `count` (else 1 to 4) objects; with `withheld` one or two of them are withheld combinations.

    No two objects share both colour and shape, so "the red circle" always means one thing; sharing one of the two is
    common, so that neither alone tells objects apart.
    """
    count = count or rng.choices(list(COUNTS), list(COUNTS.values()))[0]
    pairs = rng.sample(WITHHELD, min(count, rng.randint(1, 2))) if withheld else []
    while len(pairs) < count:
        color, shape = rng.choice(ALLOWED)
        if pairs and rng.random() < 0.6:  # share a property with an object that is already there
            color, shape = (rng.choice(pairs)[0], shape) if rng.random() < 0.5 else (color, rng.choice(pairs)[1])
        if (color, shape) in ALLOWED and (color, shape) not in pairs:
            pairs.append((color, shape))
    rng.shuffle(pairs)
    places = sorted(rng.sample(range(len(PLACES)), count))
    while True:  # until no two objects touch
        objects = [_make_object(rng, *pair, place) for pair, place in zip(pairs, places)]
        if all(math.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius + 1
               for i, a in enumerate(objects) for b in objects[:i]):
            break
    wall, floor = ((grey + rng.randint(-10, 10), grey, grey + rng.randint(-10, 10))
                   for grey in (rng.randint(120, 175), rng.randint(85, 140)))
    return Scene(objects, wall, floor, horizon=rng.uniform(0.3, 1.0) * SIDE)


def training_scene(rng, count=None):
    """A scene to learn from: one of `make_scene`, or, two times in five, the same in colours without a name.

    Where every purple thing is no circle, a learner soon knows a circle's absence by its colour. Things whose colour it
    cannot name teach it to go by the outline.
    """
    scene = make_scene(rng, count=count)
    return without_names(scene, rng) if rng.random() < NAMELESS_SHARE else scene


def _make_object(rng, color, shape, cell):
    """An object in the middle of its quarter, give or take 2.5 pixels, and wholly inside the picture."""
    size = rng.choice(list(SIZES))
    radius = SIZES[size] * rng.uniform(0.93, 1.07)
    row, column = divmod(cell, 2)
    x, y = (min(max(CELL * (i + 0.5) + rng.uniform(-2.5, 2.5), radius + 0.5), SIDE - radius - 0.5)
            for i in (column, row))
    rgb = tuple(min(max(channel + rng.randint(-12, 12), 0), 255) for channel in COLORS[color])
    return Object(size, color, shape, PLACES[cell], x, y, radius, rgb)


def with_other_shapes(scene, rng):
    """The same scene with every shape drawn anew: what only an eye for shapes can tell from the first."""
    while True:
        pairs = [(thing.color, rng.choice(SHAPES)) for thing in scene.objects]
        if len(set(pairs)) == len(pairs) and (pairs[0][0] is None or all(pair in ALLOWED for pair in pairs)):
            objects = [dataclasses.replace(thing, shape=shape) for thing, (_, shape) in zip(scene.objects, pairs)]
            return dataclasses.replace(scene, objects=objects)


def without_names(scene, rng):
    """The same scene in colours that have no name here, of different shapes: a lesson in shapes alone."""
    objects = [dataclasses.replace(thing, color=None, shape=shape, rgb=_nameless(rng))
               for thing, shape in zip(scene.objects, rng.sample(SHAPES, len(SHAPES)))]
    return dataclasses.replace(scene, objects=objects)


def _nameless(rng):
    """Black, white, or a hue between the named ones, darker or paler."""
    hue = rng.uniform(*rng.choice(NAMELESS)) / 360
    saturation, value = rng.uniform(0.5, 1), rng.uniform(0.4, 1)
    if rng.random() < 0.2:
        saturation, value = 0, rng.choice((0.08, 0.95))
    return tuple(round(255 * channel) for channel in colorsys.hsv_to_rgb(hue, saturation, value))


def draw(scene, side=SIDE):
    """The scene as an RGB picture of side x side pixels."""
    scale = side * SHARPNESS / SIDE
    large = side * SHARPNESS
    picture = Image.new("RGB", (large, large), scene.wall)
    pen = ImageDraw.Draw(picture)
    pen.rectangle((0, scene.horizon * scale, large, large), fill=scene.floor)
    for thing in scene.objects:
        pen.polygon([((thing.x + thing.radius * dx) * scale, (thing.y + thing.radius * dy) * scale)
                     for dx, dy in OUTLINES[thing.shape]], fill=thing.rgb)
    return picture.reduce(SHARPNESS)


_ARM = 0.34  # half the width of a cross's arm
OUTLINES = {  # around the origin, within the unit square
    "circle": [(math.cos(2 * math.pi * i / 24), math.sin(2 * math.pi * i / 24)) for i in range(24)],
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0, -1), (1, 0.8), (-1, 0.8)],
    "cross": [(-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM),
              (_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM)],
}
