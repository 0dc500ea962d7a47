"""Tasks of pictures for models that read images and text: drawn circles to count, to name and to compare."""

from __future__ import annotations

import random
from collections.abc import Callable

from datasets import Dataset, Features, Image, Value
from PIL import Image as Pictures
from PIL import ImageDraw

from hf_gg.posttraining.continual import Task
from hf_gg.posttraining.rewards import exact_match, format_match, number_match


SIZE = 112  # pixels a side
_COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 160, 30),
    "blue": (30, 60, 220),
    "yellow": (235, 205, 20),
    "black": (0, 0, 0),
}
Circle = tuple[float, float, float, str]  # of which x, y, radius (of the side's 112) and colour


def _colour(rng: random.Random) -> str:
    return rng.choice([*_COLOURS])


def _count(rng: random.Random) -> tuple[str, str, list[Circle]]:
    # one a place of a grid at most, so that they are apart
    places = rng.sample(range(9), rng.randint(1, 6))
    circles = [
        (
            19 + 37 * (place % 3) + rng.uniform(-4, 4),
            19 + 37 * (place // 3) + rng.uniform(-4, 4),
            rng.uniform(7, 13),
            _colour(rng),
        )
        for place in places
    ]
    return "How many circles are in the picture?", str(len(circles)), circles


def _name(rng: random.Random) -> tuple[str, str, list[Circle]]:
    colour = _colour(rng)
    circle = (rng.uniform(35, 77), rng.uniform(35, 77), rng.uniform(15, 30), colour)
    return f"Which colour has the circle: {', '.join(_COLOURS)}?", colour, [circle]


def _compare(rng: random.Random) -> tuple[str, str, list[Circle]]:
    small, large = rng.uniform(7, 12), rng.uniform(17, 24)
    side = rng.choice(["left", "right"])
    left, right = (large, small) if side == "left" else (small, large)
    circles = [
        (28 + rng.uniform(-3, 3), rng.uniform(30, 82), left, _colour(rng)),
        (84 + rng.uniform(-3, 3), rng.uniform(30, 82), right, _colour(rng)),
    ]
    return "Which circle is larger, the left or the right one?", side, circles


PICTURES: dict[str, Callable[[random.Random], tuple[str, str, list[Circle]]]] = {
    "count": _count,
    "colour": _name,
    "larger": _compare,
}


def draw(circles: list[Circle]) -> Pictures.Image:
    """Circles on white, RGB, 112 × 112."""
    picture = Pictures.new("RGB", (SIZE, SIZE), (255, 255, 255))
    pen = ImageDraw.Draw(picture)
    for x, y, radius, colour in circles:
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=_COLOURS[colour])
    return picture


def pictures(name: str, train: int, test: int) -> Task:
    """A generated task. The pictures of training and test are different, and the same in every run."""
    rng, rows, seen = random.Random(name), [], set()
    while len(rows) < train + test:
        question, answer, circles = PICTURES[name](rng)
        image = draw(circles)
        if (pixels := image.tobytes()) in seen:
            continue
        seen.add(pixels)
        ask = f"{question} End with #### and the answer."
        rows.append(
            {
                "prompt": [{"role": "user", "content": ask}],
                "image": image,
                "answer": answer,
                "completion": f"#### {answer}",
            }
        )
    features = Features(
        {
            "prompt": [{"role": Value("string"), "content": Value("string")}],
            "image": Image(),
            "answer": Value("string"),
            "completion": Value("string"),
        }
    )
    data = [Dataset.from_list(part, features=features) for part in (rows[test:], rows[:test])]
    return Task(name, *data, number_match if name == "count" else exact_match, format_match)
