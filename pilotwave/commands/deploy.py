"""`pilotwave deploy`: a planner or policy drives a robot in real time."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from omegaconf import DictConfig

from pilotwave.config import plain
from pilotwave.console import metrics_table, writable, write_json
from pilotwave.errors import UserError
from pilotwave.plugins import LOADED, load_plugins
from pilotwave.runs import asked, compose_for, controller, given, guard, load, run_folder, task_of


def run(overrides: Sequence[str]) -> None:
    """Drive, print the statistics and write them."""
    policy = given(overrides, "policy")
    if policy is None:
        raise UserError("no policy given; add policy=RUN, a run directory or checkpoint folder")
    folder = run_folder(policy)
    cfg = compose_for("deploy", overrides, folder)
    for path in (cfg.json, cfg.video):
        if path is not None:
            writable(path)
    task = task_of(cfg, folder)

    from robots import Factory, Limits, deploy

    film = Film(task, cfg.video) if cfg.video is not None else None
    report = deploy(
        ROBOTS[cfg.robot.name](cfg, task),
        Factory("pilotwave.commands.deploy:make_controller", (list(overrides), list(LOADED))),
        limits=Limits(task.spec.action_low, task.spec.action_high),
        step_seconds=task.spec.dt,
        seconds=cfg.seconds,
        replan=cfg.replan,
        delay=cfg.delay,
        on_tick=film.tick if film else None,
        guard=guard(cfg, task),
        **plain(cfg.robot.loop),
    )
    metrics_table(report.to_json(), f"{folder} on {cfg.robot.name}")
    write_json(cfg.json, report.to_json())
    if film:
        film.close()


def make_controller(overrides: list[str], plugins: list[str]) -> Any:
    """The controller, in the inference process: the same command line, read there."""
    load_plugins(plugins)
    folder = run_folder(given(overrides, "policy"))
    cfg = compose_for("deploy", overrides, folder)

    import torch

    torch.set_num_threads(max(1, min(4, (os.cpu_count() or 2) - 1)))  # a core is left for the loop
    learned = load(folder, ("planner", "policy"), device=cfg.device)
    return controller(learned, task_of(cfg, folder).spec, cfg)


class Film:
    """Snapshots of a simulated task while it is driven, rendered when there is time: after the drive."""

    def __init__(self, task: Any, path: str) -> None:
        from robots.video import Recorder

        self.task, self.recorder = task, Recorder(path, task, 1)
        self.snapshots: list[Any] = []

    def tick(self, seconds: float, *_: Any) -> None:
        """Called by the loop every tick."""
        if seconds >= len(self.snapshots) / self.recorder.rate:
            self.snapshots.append(self.task.snapshot())

    def close(self) -> None:
        """Render and write."""
        for snapshot in self.snapshots:
            self.task.restore(snapshot)
            self.recorder.writer.add(self.task.render(0))
        self.recorder.close()


def _mujoco(cfg: DictConfig, task: Any) -> Any:
    from robots import MujocoRobot

    return MujocoRobot(task, seed=cfg.seed, barriers=asked(cfg, task))


ROBOTS: dict[str, Callable[[DictConfig, Any], Any]] = {"mujoco": _mujoco}
