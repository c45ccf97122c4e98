"""Frames of a video: the picture of the environment, and below it the return so far, the step and the Q-values."""

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from qfleet.config import ConfigError
from qfleet.runtime.episodes import Moment

PICTURE_SIDE = 480  # pixels; a small picture is enlarged by the greatest whole factor that keeps it within this
MAX_PICTURE_SIDE = 1280  # pixels
MIN_WIDTH = 400  # pixels of a frame, so that the words fit
MAX_ACTIONS = 18  # actions that are shown at once: as many as Atari has
MAX_ACTIONS_IN_ONE_COLUMN = 6  # more actions share two columns
ROW_HEIGHT, MARGIN, COLUMN_GAP = 18, 8, 24
LABEL_WIDTH, VALUE_WIDTH = 26, 60

BACKGROUND = (24, 26, 31)
INK = (225, 228, 234)
DIM = (125, 131, 143)
GREEDY = (238, 133, 74)
BAR = (72, 120, 208)


class Panel:
    """Draws the frames of one episode. All have the same size."""

    def __init__(self, num_actions: int) -> None:
        self._columns = 1 if num_actions <= MAX_ACTIONS_IN_ONE_COLUMN else 2
        self._rows = math.ceil(min(num_actions, MAX_ACTIONS) / self._columns)
        self._font = ImageFont.load_default(size=13)
        # All bars have one scale. It covers 0 and every Q-value of the episode so far, so its range only grows.
        self._low, self._high = 0.0, 0.0
        self._picture_shape: tuple[int, ...] | None = None

    def draw(self, moment: Moment) -> Image.Image:
        """Returns the frame of one moment. Its sides are even.

        Raises:
          ConfigError: if its picture has another size than the first picture of the episode.
        """
        self._check_shape(moment.picture.shape)
        picture = _scaled(Image.fromarray(moment.picture))
        width = _even(max(picture.width, MIN_WIDTH))
        top = picture.height + MARGIN
        height = _even(top + (1 + self._rows) * ROW_HEIGHT + MARGIN)
        frame = Image.new("RGB", (width, height), BACKGROUND)
        frame.paste(picture, ((width - picture.width) // 2, 0))
        draw = ImageDraw.Draw(frame)
        words = f"step {moment.episode_steps:,}      return {moment.episode_return:,.2f}"
        draw.text((MARGIN, top), words, fill=INK, font=self._font)
        note = "Q-values" if moment.action is not None else "episode over"
        draw.text((width - MARGIN, top), note, fill=DIM, font=self._font, anchor="ra")
        self._draw_values(draw, moment, width, top + ROW_HEIGHT)
        return frame

    def _draw_values(self, draw: ImageDraw.ImageDraw, moment: Moment, width: int, top: int) -> None:
        q = np.where(np.isfinite(moment.q), moment.q, 0.0)
        self._low, self._high = min(self._low, q.min()), max(self._high, q.max())
        # If there are more actions than fit, show those with the greatest values, in the order of the actions. Invalid
        # ones, whose value is -inf, are the least.
        ranked = np.where(np.isneginf(moment.q), -np.inf, q)
        shown = np.sort(np.argsort(-ranked, kind="stable")[:MAX_ACTIONS])
        column_width = (width - 2 * MARGIN + COLUMN_GAP) // self._columns
        for place, action in enumerate(shown.tolist()):
            column, row = divmod(place, self._rows)
            left, y = MARGIN + column * column_width, top + row * ROW_HEIGHT
            self._draw_value(draw, action, moment, (left, y, left + column_width - COLUMN_GAP))

    def _draw_value(self, draw: ImageDraw.ImageDraw, action: int, moment: Moment, place: tuple[int, int, int]) -> None:
        """Draws the number, bar and value of one action into `place`: left, top, right."""
        left, top, right = place
        is_greedy, value = action == moment.action, float(moment.q[action])
        colour = GREEDY if is_greedy else DIM
        draw.text((left, top), f"{action}", fill=colour, font=self._font)
        draw.text((right, top), _short(value), fill=colour if is_greedy else INK, font=self._font, anchor="ra")
        bar_left, bar_right = left + LABEL_WIDTH, right - VALUE_WIDTH
        scale = (bar_right - bar_left) / max(self._high - self._low, 1e-9)
        zero = bar_left - self._low * scale
        end = zero + (value if math.isfinite(value) else 0.0) * scale
        box = (round(min(zero, end)), top + 3, round(max(zero, end)), top + ROW_HEIGHT - 5)
        draw.rectangle(box, fill=GREEDY if is_greedy else BAR)

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        self._picture_shape = self._picture_shape or shape
        if shape != self._picture_shape:
            raise ConfigError(
                f"pictures of one episode must be of one size, got {list(self._picture_shape)}, then {list(shape)}; "
                f"fix the environment's renderer"
            )


def _scaled(picture: Image.Image) -> Image.Image:
    """Returns a picture enlarged by a whole factor, so that its pixels stay sharp, or reduced if it is huge."""
    side = max(picture.size)
    if side > MAX_PICTURE_SIDE:
        return picture.reduce(math.ceil(side / MAX_PICTURE_SIDE))
    factor = max(1, PICTURE_SIDE // side)
    return picture.resize((factor * picture.width, factor * picture.height), Image.Resampling.NEAREST)


def _even(side: int) -> int:
    return side + side % 2  # because a video stores colours at half its resolution


def _short(value: float) -> str:
    if value == -math.inf:
        return "invalid"
    return f"{value:.2f}" if abs(value) < 10_000 else f"{value:.2e}"
