"""Pictures of environments for `qfleet watch`: a canvas to draw on, and observations that already are pictures.

A picture is `[height, width, 3]` uint8, RGB. Pillow (extra `video`) is only imported when a canvas is made, so that
environments work without it.
"""

import colorsys
from collections.abc import Sequence

import numpy as np

from qfleet.core.types import EnvSpec

Point = tuple[float, float]

INK = "#2b2f38"
BLUE = "#4878d0"
ORANGE = "#ee854a"
GREEN = "#6acc64"
GREY = "#a7acb5"

_SMOOTHING = 2  # the canvas has this many pixels along each side of a pixel of the picture


class Canvas:
    """A drawing on white, in the environment's own units, with y pointing upwards."""

    def __init__(self, width: int, height: int, left: float, bottom: float, pixels_per_unit: float) -> None:
        """Makes an empty canvas of `width` by `height` pixels. Its lower left corner is at (left, bottom)."""
        from PIL import Image, ImageDraw

        self._image = Image.new("RGB", (_SMOOTHING * width, _SMOOTHING * height), "white")
        self._draw = ImageDraw.Draw(self._image)
        self._left, self._bottom, self._scale = left, bottom, _SMOOTHING * pixels_per_unit

    def polygon(self, corners: Sequence[Point], colour: str) -> None:
        """Fills a polygon."""
        self._draw.polygon(self._pixels(corners), fill=colour)

    def line(self, points: Sequence[Point], thickness: float, colour: str) -> None:
        """Draws a line through the points."""
        width = max(1, round(thickness * self._scale))
        self._draw.line(self._pixels(points), fill=colour, width=width, joint="curve")

    def disc(self, centre: Point, radius: float, colour: str) -> None:
        """Fills a circle."""
        (pixel,) = self._pixels([centre])
        self._draw.circle(pixel, radius * self._scale, fill=colour)

    def picture(self) -> np.ndarray:
        """Returns the picture drawn so far."""
        return np.asarray(self._image.reduce(_SMOOTHING))

    def _pixels(self, points: Sequence[Point]) -> list[Point]:
        height = self._image.height
        return [((x - self._left) * self._scale, height - (y - self._bottom) * self._scale) for x, y in points]


def is_picture(spec: EnvSpec) -> bool:
    """Returns whether `draw_observation` can draw the observations of an environment."""
    shape, dtype = spec.observation_shape, spec.observation_dtype
    if dtype.kind == "b":
        return len(shape) == 3
    return dtype == np.uint8 and (len(shape) == 2 or (len(shape) == 3 and shape[-1] in (1, 3)))


def draw_observation(observation: np.ndarray) -> np.ndarray:
    """Returns the picture of an observation.

    Args:
      observation: uint8 `[height, width]`, `[height, width, 1]` or `[height, width, 3]`, or bool
        `[height, width, planes]` like MinAtar's. Each plane has its own colour, and later planes cover earlier ones, as
        in MinAtar.
    """
    if observation.dtype.kind == "b":
        planes = np.arange(1, observation.shape[-1] + 1)
        return _plane_colours(len(planes))[np.max(observation * planes, axis=-1)]
    if observation.ndim == 2:
        observation = observation[..., None]
    return np.broadcast_to(observation, (*observation.shape[:2], 3))


def _plane_colours(num_planes: int) -> np.ndarray:
    """Returns `[1 + num_planes, 3]` uint8: black for no plane, then one colour for each plane."""
    golden = 0.618034  # of a turn between successive hues, so that they never come close to each other
    colours = [colorsys.hsv_to_rgb((0.58 + i * golden) % 1, 0.6, 0.95) for i in range(num_planes)]
    return np.round(255 * np.array([(0.0, 0.0, 0.0), *colours])).astype(np.uint8)
