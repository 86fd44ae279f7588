"""Videos without a display, and the drawn fallback."""

from __future__ import annotations

import os
import subprocess
import sys

import av
import numpy as np
import pytest

import robots
from pilotwave.errors import UserError
from robots.collect import Demonstrator
from robots.rollout import rollout
from robots.video import draw_path, tile


def frames(path):
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "folder/a.webm"])
def test_a_rollout_becomes_a_video(tmp_path, name):
    task = robots.make("pointmaze-umaze")
    metrics = rollout(task, Demonstrator(task), 3, seed=0, horizon=40, video=tmp_path / name, video_episodes=2)
    assert metrics["video"] == str(tmp_path / name)
    pictures = frames(tmp_path / name)
    # 100 Hz thinned to 25: the start and every fourth of 40 steps
    assert len(pictures) == 11
    height, width = task.render().shape[:2]
    assert pictures[0].shape == (height, 2 * width + 4, 3)
    assert np.abs(pictures[-1].astype(int) - pictures[0]).max() > 50  # the ball has moved
    assert [entry.name for entry in (tmp_path / name).parent.iterdir()] == [(tmp_path / name).name]


def test_the_planned_path_is_drawn_where_it_lies(tmp_path):
    task = robots.make("pointmaze-umaze")
    task.reset([0])
    plain = task.render()
    path = np.array([[0.8, 0.8], [0.8, 2.8], [2.8, 2.8]])
    drawn = draw_path(plain.copy(), task.to_pixels(path))
    changed = (drawn != plain).any(axis=2)
    for point in (path[0], path[1], path[2], (path[0] + path[1]) / 2):
        column, row = np.rint(task.to_pixels(point[None])[0]).astype(int)
        assert changed[row, column]
    assert changed.mean() < 0.05

    class Planning(Demonstrator):
        def act(self, history, step):
            chunk = super().act(history, step)
            chunk.plan = np.repeat(path[None], len(history["state"]), axis=0)
            return chunk

    rollout(task, Planning(task), 1, seed=0, horizon=8, video=tmp_path / "p.mp4", video_episodes=1)
    column, row = np.rint(task.to_pixels(path[1:2])[0]).astype(int)
    red, _, blue = frames(tmp_path / "p.mp4")[-1][row, column].astype(int)
    assert red > blue + 80  # orange


def test_wrong_formats_and_places_are_named(tmp_path):
    task = robots.make("pointmaze-umaze")
    with pytest.raises(UserError, match=r"'\.xyz'; use \.mp4"):
        rollout(task, Demonstrator(task), 1, horizon=2, video=tmp_path / "a.xyz")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the video"):
        rollout(task, Demonstrator(task), 1, horizon=2, video=tmp_path / "file" / "a.mp4")


def test_tiles():
    sheet = tile([np.full((4, 6, 3), k, dtype=np.uint8) for k in range(3)])
    assert sheet.shape == (12, 16, 3)
    np.testing.assert_array_equal(sheet[[0, 0, 8], [0, 10, 0], 0], [0, 1, 2])
    assert (sheet[8:, 10:] == 255).all()


@pytest.mark.parametrize("environment", [{"MUJOCO_GL": "disable"}, {}])
def test_mujoco_pictures_without_a_display(environment):
    """A rendered view where OpenGL works; else one line, and a drawn view of the same shape."""
    code = (
        "import robots\n"
        "for name, options in (('pointmaze-umaze', {'view': 'mujoco'}), ('adroit-door', {})):\n"
        "    task = robots.make(name, **options); task.reset([0]); picture = task.render()\n"
        "    assert picture.dtype == 'uint8' and picture.std() > 5, picture.std()\n"
        "    print(*picture.shape); task.render()\n"
    )
    kept = {key: value for key, value in os.environ.items() if key not in ("MUJOCO_GL", "DISPLAY")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=kept | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["480 480 3", "480 480 3"]
    said = [line for line in done.stderr.splitlines() if "drawing" in line]
    assert len(said) == 1 if environment else len(said) <= 1
    assert "Traceback" not in done.stderr
