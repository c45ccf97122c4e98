"""Videos of episodes: an mp4 with every moment, and a GIF that stays small. Extra `video`: PyAV and Pillow."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from qfleet.config import ConfigError
from qfleet.runtime.run_files import temporary_of

if TYPE_CHECKING:
    from PIL.Image import Image

    from qfleet.runtime.episodes import Moment

GIF_FRAMES = 300  # at most
GIF_COLOURS = 64
GIF_MAX_MILLISECONDS = 100  # per frame; the GIF of a long episode runs fast, because slow frames would look jerky
GIF_LAST_MILLISECONDS = 1500  # how long the last frame stays
MP4_OPTIONS = {"preset": "veryfast", "crf": "20"}  # for x264; at this crf the eye can hardly tell it from the original


class Video(NamedTuple):
    """The video files of one episode."""

    mp4: Path
    gif: Path
    episode_return: float
    """Undiscounted return of the episode."""
    episode_steps: int
    """Length of the episode in environment steps."""


def check_extra() -> None:
    """Raises ConfigError unless the packages that make videos are installed."""
    try:
        import av
        import PIL
    except ImportError as error:
        raise ConfigError(f"videos need PyAV and Pillow ({error}); pip install 'qfleet[video]'") from error
    del av, PIL


def params_label(env_steps: int, trained_seed: int | None) -> str:
    """Returns a name for the parameters of a run: their environment steps and, if it trained many seeds, their seed."""
    return f"step{env_steps}" + (f"-trained{trained_seed}" if trained_seed is not None else "")


def video_name(label: str, seed: int, episode: int) -> str:
    """Returns the name of the video files of an episode, without the suffix."""
    return f"{label}-seed{seed}-episode{episode}"


def film(moments: "Iterator[Moment]", path: Path, frames_per_second: int) -> Video:
    """Writes an episode to two files, `path` with `.mp4` and `.gif` added.

    Files that have these names already are replaced once the episode is over.

    Raises:
      ConfigError: if the pictures of the episode differ in size.
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


def write_sample(folder: Path) -> None:
    """Writes a small video into a folder, to find out whether that works.

    Raises:
      OSError, ValueError, RuntimeError: if it doesn't.
    """
    from PIL import Image

    frame = Image.new("RGB", (64, 64))
    mp4, gif = _Mp4(folder / "sample.mp4", frame.size, 30), _Gif(folder / "sample.gif", 30)
    try:
        for _ in range(3):
            mp4.add(frame)
            gif.add(frame)
        mp4.finish()
        gif.finish()
    finally:
        mp4.close()


class _Mp4:
    """An H.264 video that browsers and players show. It has a temporary name until it is complete."""

    def __init__(self, path: Path, size: tuple[int, int], frames_per_second: int) -> None:
        import av

        self.path = path
        self._av = av
        self._temporary = temporary_of(path)
        self._container = av.open(self._temporary, "w", format="mp4", options={"movflags": "faststart"})
        self._stream = self._container.add_stream("libx264", rate=frames_per_second, options=MP4_OPTIONS)
        self._stream.width, self._stream.height = size
        self._stream.pix_fmt = "yuv420p"

    def add(self, frame: "Image") -> None:
        """Adds one frame."""
        self._container.mux(self._stream.encode(self._av.VideoFrame.from_image(frame)))

    def finish(self) -> None:
        """Writes the remaining frames, then gives the file its name."""
        self._container.mux(self._stream.encode(None))
        self._container.close()
        os.replace(self._temporary, self.path)

    def close(self) -> None:
        """Deletes the temporary file if the video wasn't finished."""
        try:
            self._container.close()
        finally:  # closing writes, which fails on a full disk
            self._temporary.unlink(missing_ok=True)


class _Gif:
    """A GIF of every k-th frame and the last one.

    The length of the episode isn't known in advance. So k starts at 1 and doubles whenever there are too many frames.
    """

    def __init__(self, path: Path, frames_per_second: int) -> None:
        self.path = path
        self._milliseconds = 1000 / frames_per_second
        self._frames: list[Image] = []
        self._period = 1
        self._seen = 0
        self._last: Image | None = None

    def add(self, frame: "Image") -> None:
        """Adds one frame if its turn has come."""
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
        temporary = temporary_of(self.path)
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
