"""Videos: they decode to the frames that were put in, and no half-written file is left."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qfleet.config import ConfigError
from qfleet.runtime.episodes import Moment

av = pytest.importorskip("av")
Image = pytest.importorskip("PIL.Image")

from qfleet.runtime.panel import Panel  # noqa: E402
from qfleet.runtime.video import film  # noqa: E402


def moment(step: int, last: int, shape: tuple[int, int] = (10, 10), num_actions: int = 3) -> Moment:
    q = np.linspace(-1.0, 2.0, num_actions, dtype=np.float32) * step
    picture = np.full((*shape, 3), step % 256, np.uint8)
    return Moment(picture, q, None if step == last else int(np.argmax(q)), float(step), step)


def moments(last: int, **settings: int) -> Iterator[Moment]:
    return (moment(step, last, **settings) for step in range(last + 1))


def decoded(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_every_moment_is_a_frame(tmp_path: Path) -> None:
    video = film(moments(40), tmp_path / "film", 30)
    assert (video.episode_return, video.episode_steps) == (40.0, 40)
    frames = decoded(video.mp4)
    assert len(frames) == 41
    assert {frame.shape for frame in frames} == {(568, 480, 3)}  # 10 * 48 pixels, a header and three Q-values
    assert abs(int(frames[40][200, 200, 0]) - 40) <= 3 and abs(int(frames[0][200, 200, 0])) <= 3
    with av.open(str(video.mp4)) as container:
        assert container.streams.video[0].average_rate == 30
    with Image.open(video.gif) as gif:
        assert (gif.n_frames, gif.size, gif.info["loop"]) == (41, (480, 568), 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["film.gif", "film.mp4"]


def test_a_long_episodes_gif_stays_small_and_ends_where_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qfleet.runtime.video.GIF_FRAMES", 10)
    video = film(moments(34), tmp_path / "film", 30)
    with Image.open(video.gif) as gif:
        # The GIF was full twice, so it keeps every fourth of the 35 frames, and the last one.
        assert gif.n_frames == 10
        gif.seek(gif.n_frames - 1)
        assert gif.convert("RGB").getpixel((200, 200)) == pytest.approx((34,) * 3, abs=4)
        assert gif.info["duration"] == 1500


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((10, 10), (480, 480)),
        ((84, 84), (420, 420)),
        ((210, 160), (320, 420)),
        ((401, 601), (601, 401)),
        ((2000, 3001), (1001, 667)),
        ((1, 1), (480, 480)),
    ],
)
def test_pictures_grow_by_whole_factors_and_frames_have_even_sides(
    shape: tuple[int, int], size: tuple[int, int]
) -> None:
    frame = Panel(2).draw(moment(200, 0, shape, 2))
    assert frame.width % 2 == frame.height % 2 == 0
    assert frame.width == max(400, size[0] + size[0] % 2)
    is_picture = np.all(np.asarray(frame) == 200, axis=-1)
    assert (is_picture.any(0).sum(), is_picture.any(1).sum()) == size


@pytest.mark.parametrize("num_actions", [1, 6, 7, 18, 500])
def test_the_greedy_action_is_marked_and_only_it(num_actions: int) -> None:
    panel = Panel(num_actions)
    acting, ended = (np.asarray(panel.draw(moment(3, last, (84, 84), num_actions))) for last in (9, 3))
    assert acting.shape == ended.shape
    orange = (238, 133, 74)
    assert np.any(np.all(acting == orange, axis=-1)) and not np.any(np.all(ended == orange, axis=-1))


def test_values_that_are_not_finite_are_shown_as_they_are() -> None:
    q = np.array([np.nan, np.inf, -np.inf, 1.0], np.float32)
    frame = Panel(4).draw(Moment(np.zeros((10, 10, 3), np.uint8), q, 0, 0.0, 0))
    assert frame.size[0] == 480


def test_nothing_is_left_of_a_film_that_fails(tmp_path: Path) -> None:
    changing = iter([moment(0, 9), moment(1, 9), moment(2, 9, (11, 10))])
    with pytest.raises(ConfigError, match=r"of one size, got \[10, 10, 3\], then \[11, 10, 3\]"):
        film(changing, tmp_path / "film", 30)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_a_film_that_the_disk_has_no_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyAV writes the end of a file when it closes it, so that fails too."""
    import av

    class Full:
        def __init__(self, path: Path) -> None:
            path.touch()

        def add_stream(self, *arguments: Any, **more: Any) -> Any:
            return SimpleNamespace(encode=lambda frame: None)

        def mux(self, packets: Any) -> None:
            raise OSError("No space left on device")

        def close(self) -> None:
            raise OSError("No space left on device")

    monkeypatch.setattr(av, "open", lambda path, *arguments, **more: Full(path))
    with pytest.raises(OSError, match="No space left"):
        film(iter([moment(0, 9)]), tmp_path / "film", 30)
    assert list(tmp_path.iterdir()) == []
