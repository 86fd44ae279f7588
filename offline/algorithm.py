"""What every planner, policy and world model is: a module that names its data, prepares itself and gives one loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from diffusion import Denoiser
from pilotwave.errors import UserError, nearest

if TYPE_CHECKING:
    from offline.store import TrajectoryStore
    from offline.windows import Windows


@dataclass(frozen=True)
class DataSpec:
    """What the data looks like to an algorithm: enough to rebuild its networks without the data.

    `dt` is in seconds a step; `images` maps a camera to its (height, width, channels); limits are in the task's units.
    """

    task: str
    observation_dim: int
    action_dim: int
    dt: float
    observation_names: tuple[str, ...] = ()
    action_names: tuple[str, ...] = ()
    action_low: tuple[float, ...] = ()
    action_high: tuple[float, ...] = ()
    images: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    goal_dim: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, as config.yaml keeps them."""
        plain = asdict(self)
        plain["images"] = {name: list(shape) for name, shape in self.images.items()}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> DataSpec:
        """The inverse of `to_dict`; UserError when a field is missing or unknown."""
        known = {f.name for f in fields(cls)}
        for key in plain:
            if key not in known:
                raise nearest("field of the data spec", str(key), known)
        missing = [name for name in ("task", "observation_dim", "action_dim", "dt") if name not in plain]
        if missing:
            raise UserError(f"the data spec lacks {', '.join(missing)}; a config.yaml written by training has them all")
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in plain.items()}
        values["images"] = {name: tuple(shape) for name, shape in dict(values.get("images") or {}).items()}
        return cls(**values)

    @classmethod
    def of(cls, store: TrajectoryStore, task: Any = None, dt: float | None = None) -> DataSpec:
        """What a data set looks like, checked against its task's facts (a `robots.TaskSpec`) where it has a task.

        `dt` is for data that does not say its own. UserError when columns lack or do not fit the task.
        """
        columns, where = store.columns, store.source or "the data"
        for name in ("observation", "action"):
            if name not in columns:
                raise UserError(f"{where} has no '{name}'; see 'pilotwave data', choose with observation_keys=")
        found = (columns["observation"].shape[1], columns["action"].shape[1])
        images = {name: column.shape[1:] for name, column in columns.items() if column.ndim == 4}
        dt = store.dt or dt or (task.dt if task is not None else None)
        if dt is None:
            raise UserError(f"{where} does not say how long a step is; add dt=SECONDS")
        if task is None:
            names = {key: tuple(store.names.get(key, ())) for key in ("observation", "action")}
            goal = columns["goal"].shape[1] if "goal" in columns else 0
            label = Path(where).stem
            return cls(label, *found, float(dt), names["observation"], names["action"], images=images, goal_dim=goal)
        wanted = (task.observation_dim, task.action_dim)
        if found != wanted:
            raise UserError(
                f"{where} has {found[0]} observation and {found[1]} action features; "
                f"task {task.name} has {wanted[0]} and {wanted[1]}: give the data or the task that belongs with it"
            )
        if abs(dt - task.dt) > 0.01 * task.dt:
            raise UserError(f"{where} has a step of {dt:g} s, task {task.name} one of {task.dt:g} s; they must agree")
        for key, shape in task.images.items():
            if images.get(key) != tuple(shape):
                raise UserError(f"task {task.name} has images '{key}' {tuple(shape)}; {where} has {images or 'none'}")
        return cls(
            task=task.name,
            observation_dim=found[0],
            action_dim=found[1],
            dt=float(task.dt),
            observation_names=tuple(task.observation_names),
            action_names=tuple(task.action_names),
            action_low=tuple(map(float, task.action_low)),
            action_high=tuple(map(float, task.action_high)),
            images={key: tuple(shape) for key, shape in task.images.items()},
            goal_dim=task.goal_dim,
        )


class Algorithm(nn.Module, ABC):
    """One algorithm: networks and normalizer as modules, a loss over windows of recorded data.

    Sub-classes set `kind` ("planner", "policy" or "world_model") and `name` (as in configs/), and are decorated with
    `register`. Construction depends on `spec` and `config` alone, so that loading a checkpoint needs no data.
    """

    kind: ClassVar[str]
    name: ClassVar[str]
    denoiser: Denoiser  # of those that sample by one
    origin: tuple[Path, str] | None = None  # the folder that it was loaded from, the sha256 of its weights

    def __init__(self, spec: DataSpec, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.spec = spec
        self.config = dict(config)

    @abstractmethod
    def prepare(self, store: TrajectoryStore) -> None:
        """Fit what comes from the data (the normalizer's buffers). Called once before training, never when loading."""

    @abstractmethod
    def windows(self, store: TrajectoryStore, device: torch.device | str) -> Windows:
        """Windows of `store` on `device`, columns normalized, with this algorithm's horizon, stride and padding."""

    @abstractmethod
    def loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss of a batch from `windows`, and scalars to log (detached). All randomness is `generator`'s."""

    def networks(self) -> list[nn.Module]:
        """The modules that do the work, called as `module(...)` on tensors alone: the trainer may compile these.

        Here, whatever is held under the name `network` (as a Denoiser holds its own).
        """
        return [module for path, module in self.named_modules() if path.rpartition(".")[2] == "network"]


_REGISTRY: dict[str, dict[str, type[Algorithm]]] = {"planner": {}, "policy": {}, "world_model": {}}

A = TypeVar("A", bound=type[Algorithm])


def register(cls: A) -> A:
    """Class decorator: make an algorithm known by its `kind` and `name`, the only way a checkpoint can name it."""
    if cls.kind not in _REGISTRY:
        raise ValueError(f"{cls.__name__}.kind is '{cls.kind}'; it must be one of {', '.join(_REGISTRY)}")
    _REGISTRY[cls.kind][cls.name] = cls
    return cls


def algorithms(kind: str) -> dict[str, type[Algorithm]]:
    """The registered algorithms of a kind ("planner", "policy", "world_model"), by name."""
    if kind not in _REGISTRY:
        raise nearest("kind of algorithm", kind, _REGISTRY)
    return dict(_REGISTRY[kind])


def build(kind: str, name: str, spec: DataSpec, config: Mapping[str, Any], seed: int = 0) -> Algorithm:
    """Construct a registered algorithm, its initial weights drawn from `seed` and from nothing else."""
    known = algorithms(kind)
    if name not in known:
        raise nearest(kind.replace("_", " "), name, known)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return known[name](spec, config)
