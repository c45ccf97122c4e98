"""Makes docs/pictures/agent.webp, the moving picture of the README, from a video that `qfleet watch` has written.

python docs/tools/agent.py VIDEO.mp4 [--frames-per-second 12] [--width 480]

It wants the extra `video`.
"""

import argparse
from pathlib import Path

import av
from PIL import Image

PICTURE = Path(__file__).parents[1] / "pictures" / "agent.webp"
MAX_BYTES = 1_000_000


def read(video: Path, frames_per_second: int, width: int) -> list[Image.Image]:
    """Returns frames of a video, scaled down and evenly left out."""
    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        every = max(1, round(float(stream.average_rate or frames_per_second) / frames_per_second))
        frames = [frame.to_image() for i, frame in enumerate(container.decode(stream)) if i % every == 0]
    height = round(frames[0].height * width / frames[0].width)
    return [frame.resize((width, height), Image.Resampling.LANCZOS) for frame in frames]


def main() -> None:
    """Writes the picture, in the best quality that keeps it below a megabyte."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", type=Path)
    parser.add_argument("--frames-per-second", type=int, default=12)
    parser.add_argument("--width", type=int, default=480)
    arguments = parser.parse_args()
    frames = read(arguments.video, arguments.frames_per_second, arguments.width)
    durations = [1000 // arguments.frames_per_second] * (len(frames) - 1) + [1500]
    for quality in (80, 65, 50, 35, 20):
        frames[0].save(
            PICTURE, save_all=True, append_images=frames[1:], duration=durations, loop=0, quality=quality, method=4
        )
        if PICTURE.stat().st_size < MAX_BYTES:
            break
    print(f"{PICTURE}: {len(frames)} frames, quality {quality}, {PICTURE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
