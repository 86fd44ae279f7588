"""A small but real algorithm and data set for the tests of training: an MLP that denoises windows of random walks.

`python -m tests.tiny OUT [key=value ...]` trains it, which the tests start, stop and kill.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from offline.algorithm import Algorithm, DataSpec, build, register
from offline.trainer import TrainConfig, train

SPEC = DataSpec(task="random-walk", observation_dim=2, action_dim=2, dt=0.1)
CONFIG = {"horizon": 8, "width": 32, "dropout": 0.1}


@dataclass
class Walks:
    """Random walks as episodes: just what the tests need of a store."""

    observation: np.ndarray  # (E, T, 2)

    def split(self, held_out: int, seed: int) -> tuple[Walks, Walks]:
        order = np.random.default_rng(seed).permutation(len(self.observation))
        return Walks(self.observation[order[held_out:]]), Walks(self.observation[order[:held_out]])


class WalkWindows:
    def __init__(self, x: Tensor) -> None:
        self.x = x

    def sample(self, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"x": self.x[torch.randint(len(self.x), (batch,), generator=generator, device=self.x.device)]}


class Scale(nn.Module):
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(2))


@register
class TinyDenoiser(Algorithm):
    kind, name = "planner", "tiny"

    def __init__(self, spec: DataSpec, config) -> None:
        super().__init__(spec, config)
        features, width = config["horizon"] * spec.observation_dim, config["width"]
        self.normalizer = Scale()
        self.network = nn.Sequential(
            nn.Linear(features + 1, width), nn.GELU(), nn.Dropout(config["dropout"]), nn.Linear(width, features)
        )

    def prepare(self, store) -> None:
        self.normalizer.scale.copy_(torch.from_numpy(np.abs(store.observation).max((0, 1))))

    def windows(self, store, device):
        x = torch.from_numpy(store.observation).to(device) / self.normalizer.scale
        windows = x.unfold(1, self.config["horizon"], 1).transpose(2, 3)
        return WalkWindows(windows.reshape(-1, self.config["horizon"], 2))

    def loss(self, batch, generator):
        x = batch["x"].flatten(1)
        t = torch.rand((len(x), 1), generator=generator, device=x.device)
        noise = torch.randn(x.shape, generator=generator, device=x.device)
        predicted = self.network(torch.cat([(1 - t) * x + t * noise, t], 1))
        loss = (predicted - x).square().mean()
        return loss, {"x0_error": (predicted - x).abs().mean()}


def walks(episodes: int = 16, steps: int = 40) -> Walks:
    rng = np.random.default_rng(0)
    return Walks(rng.normal(size=(episodes, steps, 2)).cumsum(1).astype(np.float32))


def run(out: Path, **settings) -> dict:
    config = TrainConfig(
        **{"steps": 60, "batch": 16, "warmup": 5, "save_every": 10, "log_every": 5, "device": "cpu", **settings}
    )
    algorithm = build("planner", "tiny", SPEC, CONFIG, config.seed)
    return train(algorithm, walks(), out, config, full_config={"data": "walks"}, card={"command": "tests.tiny"})


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), **{k: yaml.safe_load(v) for k, v in (a.split("=", 1) for a in sys.argv[2:])})
