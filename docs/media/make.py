"""Makes the README's moving picture from the shipped checkpoints: python docs/media/make.py

A planner through four goals, a policy that pushes, a policy that opens a door, side by side, in the robots' own time.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import av
import cv2
import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
HEIGHT, RATE, SECONDS, COLOURS = 240, 10, 12, 128
SCENES = {  # name: the command's settings
    "maze": ["checkpoints/pointmaze-large-diffuser", "task.goal=chain", "horizon=1200", "seed=7"],
    "pusht": ["checkpoints/pusht-diffusion-policy", "seed=100003"],
    "door": ["checkpoints/adroit-door-diffusion-policy", "seed=4"],
}


def frames(path: Path) -> list[np.ndarray]:
    """A video's pictures at RATE a second, HEIGHT high."""
    with av.open(str(path)) as container:
        rate = float(container.streams.video[0].average_rate or RATE)
        every = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    chosen = [every[round(i)] for i in np.arange(0, len(every) - 1, rate / RATE)]
    width = round(chosen[0].shape[1] * HEIGHT / chosen[0].shape[0])
    return [cv2.resize(picture, (width, HEIGHT), interpolation=cv2.INTER_AREA) for picture in chosen]


def main() -> None:
    scenes = []
    with tempfile.TemporaryDirectory() as folder:
        for name, words in SCENES.items():
            video = Path(folder) / f"{name}.mp4"
            common = ["episodes=1", "num_envs=1", "timing_decisions=0", f"video={video}"]
            subprocess.run([sys.executable, "-m", "pilotwave", "rollout", *words, *common], cwd=ROOT, check=True)
            scenes.append(frames(video))
    pictures = []
    for i in range(SECONDS * RATE):
        # a short scene starts again after a second on its last picture
        row = [scene[min(i % (len(scene) + RATE), len(scene) - 1)] for scene in scenes]
        gap = np.full((HEIGHT, 6, 3), 255, np.uint8)
        pictures.append(Image.fromarray(np.concatenate([part for picture in row for part in (picture, gap)][:-1], axis=1)))
    sample = np.concatenate([np.asarray(picture) for picture in pictures[:: len(pictures) // 6]])
    sheet = Image.fromarray(sample).quantize(COLOURS, dither=Image.Dither.NONE)
    small = [picture.quantize(COLOURS, palette=sheet, dither=Image.Dither.NONE) for picture in pictures]
    out = ROOT / "docs" / "media" / "pilotwave.gif"
    small[0].save(out, save_all=True, append_images=small[1:], duration=1000 // RATE, loop=0, optimize=True)
    print(f"{out}: {out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
