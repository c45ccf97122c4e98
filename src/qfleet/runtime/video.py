"""Episodes as videos: an mp4 with every moment, and a GIF that stays small. Extra `video`: PyAV and Pillow."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from qfleet.config import ConfigError
from qfleet.runtime.episodes import Moment

if TYPE_CHECKING:
    from PIL.Image import Image

GIF_FRAMES = 300
GIF_COLOURS = 64
GIF_MAX_MILLISECONDS = 100  # that a frame stays: the GIF of a long episode runs fast rather than in jerks
GIF_LAST_MILLISECONDS = 1500
MP4_OPTIONS = {"preset": "veryfast", "crf": "20"}  # of x264; crf: near to what the eye can't tell from the original


class Video(NamedTuple):
    """One episode that was watched, and its files."""

    mp4: Path
    gif: Path
    episode_return: float
    """Undiscounted."""
    episode_steps: int


def check_extra() -> None:
    """Raises ConfigError if what videos are made with isn't installed."""
    try:
        import av
        import PIL
    except ImportError as error:
        raise ConfigError(f"videos need PyAV and Pillow ({error}); pip install 'qfleet[video]'") from error
    del av, PIL


def params_label(env_steps: int, trained_seed: int | None) -> str:
    """Returns what tells parameters from others of their run: when, and of many seeds, which one's."""
    return f"step{env_steps}" + (f"-trained{trained_seed}" if trained_seed is not None else "")


def video_name(label: str, seed: int, episode: int) -> str:
    """Returns the name of the files that show an episode of a policy, without what follows the dot."""
    return f"{label}-seed{seed}-episode{episode}"


def film(moments: Iterator[Moment], path: Path, frames_per_second: int) -> Video:
    """Plays an episode into `path` with `.mp4` and `.gif` added; files of these names are replaced once it is over.

    Raises:
      ConfigError: if the episode's pictures aren't of one size.
      OSError: if a file can't be written.
    """
    from qfleet.runtime.panel import Panel

    moment = next(moments)
    panel = Panel(len(moment.q))
    frame = panel.draw(moment)
    mp4 = _Mp4(path.with_name(path.name + ".mp4"), frame.size, frames_per_second)
    gif = _Gif(path.with_name(path.name + ".gif"), frames_per_second)
    try:
        mp4.add(frame)
        gif.add(frame)
        for moment in moments:
            frame = panel.draw(moment)
            mp4.add(frame)
            gif.add(frame)
        mp4.finish()
        gif.finish()
    finally:
        mp4.close()
    return Video(mp4.path, gif.path, moment.episode_return, moment.episode_steps)


class _Mp4:
    """An H.264 video that browsers and players show; under a name of its own until it is whole."""

    def __init__(self, path: Path, size: tuple[int, int], frames_per_second: int) -> None:
        import av

        self.path = path
        self._av = av
        self._temporary = _temporary(path)
        self._container = av.open(self._temporary, "w", format="mp4", options={"movflags": "faststart"})
        self._stream = self._container.add_stream("libx264", rate=frames_per_second, options=MP4_OPTIONS)
        self._stream.width, self._stream.height = size
        self._stream.pix_fmt = "yuv420p"

    def add(self, frame: "Image") -> None:
        """Adds one frame."""
        self._container.mux(self._stream.encode(self._av.VideoFrame.from_image(frame)))

    def finish(self) -> None:
        """Writes what is left, and gives the file its name."""
        self._container.mux(self._stream.encode(None))
        self._container.close()
        os.replace(self._temporary, self.path)

    def close(self) -> None:
        """Leaves nothing behind if the video wasn't finished."""
        self._container.close()
        self._temporary.unlink(missing_ok=True)


class _Gif:
    """Every k-th frame and the last: k doubles whenever there are too many, for nobody knows how long it will be."""

    def __init__(self, path: Path, frames_per_second: int) -> None:
        self.path = path
        self._milliseconds = 1000 / frames_per_second
        self._frames: list[Image] = []
        self._period = 1
        self._seen = 0
        self._last: Image | None = None

    def add(self, frame: "Image") -> None:
        """Adds one frame, if it is its turn."""
        if self._seen % self._period == 0 and len(self._frames) == GIF_FRAMES:
            self._frames = self._frames[::2]
            self._period *= 2
        self._last = None
        if self._seen % self._period == 0:
            self._frames.append(_few_colours(frame))
        else:
            self._last = frame
        self._seen += 1

    def finish(self) -> None:
        """Writes the file."""
        frames = self._frames if self._last is None else [*self._frames, _few_colours(self._last)]
        each = round(min(self._period * self._milliseconds, GIF_MAX_MILLISECONDS))
        durations = [each] * (len(frames) - 1) + [GIF_LAST_MILLISECONDS]
        temporary = _temporary(self.path)
        try:
            frames[0].save(
                temporary, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=False
            )
            os.replace(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)


def _few_colours(frame: "Image") -> "Image":
    from PIL import Image

    return frame.quantize(GIF_COLOURS, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")
