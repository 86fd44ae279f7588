"""A small but real algorithm and data set for the tests of training: an MLP that denoises windows of random walks.

`python -m tests.tiny OUT [key=value ...]` trains it, which the tests start, stop and kill.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import nn

from offline.algorithm import Algorithm, DataSpec, build, register
from offline.normalizer import Normalizer
from offline.store import TrajectoryStore
from offline.trainer import TrainConfig, train
from offline.windows import Windows

SPEC = DataSpec(task="random-walk", observation_dim=2, action_dim=2, dt=0.1)
CONFIG = {"horizon": 8, "width": 32, "dropout": 0.1}


@register
class TinyDenoiser(Algorithm):
    kind, name = "planner", "tiny"

    def __init__(self, spec: DataSpec, config) -> None:
        super().__init__(spec, config)
        features, width = config["horizon"] * spec.observation_dim, config["width"]
        self.normalizer = Normalizer.from_shapes({"observation": spec.observation_dim})
        self.network = nn.Sequential(
            nn.Linear(features + 1, width), nn.GELU(), nn.Dropout(config["dropout"]), nn.Linear(width, features)
        )

    def prepare(self, store):
        fitted = Normalizer.fit({"observation": store.columns["observation"]}, "limits")
        self.normalizer.load_state_dict(fitted.state_dict())

    def windows(self, store, device):
        windows = Windows(store, self.config["horizon"], columns=["observation"], device=device)
        windows.columns["observation"] = self.normalizer.normalize("observation", windows.columns["observation"])
        return windows

    def loss(self, batch, generator):
        x = batch["observation"].flatten(1)
        t = torch.rand((len(x), 1), generator=generator, device=x.device)
        noise = torch.randn(x.shape, generator=generator, device=x.device)
        predicted = self.network(torch.cat([(1 - t) * x + t * noise, t], 1))
        loss = (predicted - x).square().mean()
        return loss, {"x0_error": (predicted - x).abs().mean()}


def walks(episodes: int = 16, length: int = 40) -> TrajectoryStore:
    steps = np.random.default_rng(0).normal(size=(episodes, length, 2))
    observation = steps.cumsum(1).astype(np.float32).reshape(-1, 2)
    return TrajectoryStore({"observation": observation}, length * np.arange(1, episodes + 1), dt=0.1)


def run(out: Path, **settings) -> dict:
    config = TrainConfig(
        **{"steps": 60, "batch": 16, "warmup": 5, "save_every": 10, "log_every": 5, "device": "cpu", **settings}
    )
    algorithm = build("planner", "tiny", SPEC, CONFIG, config.seed)
    return train(algorithm, walks(), out, config, full_config={"data": "walks"}, card={"command": "tests.tiny"})


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), **{k: yaml.safe_load(v) for k, v in (a.split("=", 1) for a in sys.argv[2:])})
