"""Pictures and videos without a display."""

from __future__ import annotations

import atexit
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pilotwave.errors import UserError

_FORMATS = (".mp4", ".webm", ".gif")
_BACKENDS = ("egl", "osmesa")
_context: list[Any] = []  # the context class that works, or None, once it has been looked for


def offscreen(model: Any, height: int, width: int) -> Any | None:
    """A `mujoco.Renderer` (height, width) over EGL, else OSMesa; None, and one line on stderr, where neither works.

    MUJOCO_GL, where set, is obeyed.
    """
    import mujoco

    if not _context:
        _context.append(_find_context())
        if _context[0] is None:
            print("no OpenGL without a display here (neither EGL nor OSMesa): drawing a simple view", file=sys.stderr)
    if _context[0] is None:
        return None
    # mujoco chose its backend when it was imported; the renderer reads the class from this module
    module: Any = importlib.import_module(mujoco.Renderer.__module__)
    module.gl_context.GLContext = _context[0]
    model.vis.global_.offheight = max(model.vis.global_.offheight, height)
    model.vis.global_.offwidth = max(model.vis.global_.offwidth, width)
    renderer = mujoco.Renderer(model, height, width)
    # left to the interpreter's end, the context would be freed after EGL itself
    atexit.register(renderer.close)
    return renderer


def _find_context() -> Any | None:
    asked = os.environ.get("MUJOCO_GL", "").lower()
    if asked in ("disable", "disabled", "off", "false", "0"):
        return None
    for backend in [asked] if asked in _BACKENDS else _BACKENDS:
        try:
            context = importlib.import_module(f"mujoco.{backend}").GLContext
            trial = context(16, 16)
            trial.make_current()
            trial.free()
        except Exception:
            # each backend fails in its own way (missing library, no device); the next is tried, with a clean PyOpenGL
            for name in [name for name in sys.modules if name.split(".")[0] == "OpenGL"]:
                del sys.modules[name]
            os.environ.pop("PYOPENGL_PLATFORM", None)
            continue
        return context
    return None


class Recorder:
    """Writes a roll-out's first `count` robots side by side to an .mp4, .webm or .gif file.

    Frames are thinned to about 25 a second of the robot's time. The path that the controller plans is drawn where the
    chunk carries `plan` (n, P, 2) and the task can place it. The file gets its name when `close` is called.
    """

    def __init__(self, path: str | Path, task: Any, count: int, controller: Any = None):
        self.path, self.task, self.count = Path(path), task, count
        if self.path.suffix not in _FORMATS:
            raise UserError(f"video {self.path}: unknown format '{self.path.suffix}'; use {', '.join(_FORMATS)}")
        self.every = max(1, round(1.0 / (25.0 * task.spec.dt)))
        self.rate = round(1.0 / (task.spec.dt * self.every))
        self.steps = 0
        self.writer = Writer(self.path, self.rate)

    def frame(self, chunk: Any = None) -> None:
        """Take a picture of the task as it is now (every so many calls)."""
        if self.steps % self.every == 0:
            pictures = []
            for i in range(self.count):
                picture = np.ascontiguousarray(self.task.render(i))
                if chunk is not None and chunk.plan is not None:
                    picture = draw_path(picture, self.task.to_pixels(chunk.plan[i]))
                pictures.append(picture)
            self.writer.add(tile(pictures))
        self.steps += 1

    def close(self) -> None:
        """Finish the file."""
        self.writer.close()


class Writer:
    """Collects pictures (H, W, 3) uint8 of one size into a video file, written beside it first and then renamed."""

    def __init__(self, path: Path, rate: int):
        import av

        self.path, self.part = path, path.with_name(f".{path.stem}.part{path.suffix}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.part.touch()
        except OSError as error:
            raise UserError(f"cannot write the video {path}: {error.strerror}") from None
        self.container = av.open(str(self.part), "w")
        self.rate = rate
        self.stream: Any = None

    def add(self, picture: NDArray[np.uint8]) -> None:
        """Append one picture."""
        import av

        height, width = picture.shape[:2]
        if self.stream is None:
            codec, pixels = {".gif": ("gif", "rgb8"), ".webm": ("libvpx-vp9", "yuv420p")}.get(
                self.path.suffix, ("libx264", "yuv420p")
            )
            self.stream = self.container.add_stream(codec, rate=self.rate)
            # the codecs want even sides
            self.stream.width, self.stream.height = width + width % 2, height + height % 2
            self.stream.pix_fmt = pixels
        picture = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        self.container.mux(self.stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))

    def close(self) -> None:
        """Write what is buffered and give the file its name."""
        if self.stream is not None:
            self.container.mux(self.stream.encode())
        self.container.close()
        self.part.replace(self.path)


def draw_path(picture: NDArray[np.uint8], pixels: np.ndarray | None) -> NDArray[np.uint8]:
    """The picture with a line and dots at pixels (k, 2) (column, row); unchanged for None."""
    import cv2

    if pixels is None:
        return picture
    corners = np.rint(pixels).astype(np.int32)
    cv2.polylines(picture, [corners[:, None]], False, (235, 150, 40), 2, cv2.LINE_AA)
    for corner in corners[:: max(1, len(corners) // 40)]:
        cv2.circle(picture, corner.tolist(), 3, (235, 150, 40), -1, cv2.LINE_AA)
    return picture


def tile(pictures: Sequence[NDArray[np.uint8]], columns: int | None = None) -> NDArray[np.uint8]:
    """Pictures of one size in rows of `columns` (about square by default), with a white gap of 4 pixels."""
    columns = columns or int(np.ceil(np.sqrt(len(pictures))))
    height, width = pictures[0].shape[:2]
    rows = -(-len(pictures) // columns)
    sheet = np.full((rows * (height + 4) - 4, columns * (width + 4) - 4, 3), 255, dtype=np.uint8)
    for k, picture in enumerate(pictures):
        top, left = k // columns * (height + 4), k % columns * (width + 4)
        sheet[top : top + height, left : left + width] = picture
    return sheet
