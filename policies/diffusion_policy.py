"""Diffusion Policy (Chi et al. 2023): the next chunk of actions is sampled given the last observations.

With observations o_1..o_To (the last one is now), a chunk of T actions whose first To - 1 lie in the past is denoised:

    a_0 = D(a_t, t | o)         Chi et al. 2023, eqs. 1 to 4, with any schedule, prediction and solver

and actions To - 1 ... To - 2 + Ta of it are executed before the next decision (receding horizon, section 2.3).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from diffusion import Denoiser, Layout, NoiseSchedule, sample, solver
from diffusion.networks import ImageEncoder, build_network
from offline import Algorithm, DataSpec, Normalizer, Windows, register, retime
from pilotwave.errors import UserError
from policies.controller import PolicyController

if TYPE_CHECKING:
    from offline.store import TrajectoryStore


@register
class DiffusionPolicy(Algorithm):
    """Config (configs/policy/diffusion_policy.yaml): observations To, horizon T, execute Ta, speed, schedule,
    prediction, weighting, network, image_encoder, normalizer, sampler.

    `speed` s trains on the demonstrations carried out s times as fast.
    """

    kind, name = "policy", "diffusion_policy"

    def __init__(self, spec: DataSpec, config: Mapping[str, Any]) -> None:
        super().__init__(spec, config)
        self.To, self.T, self.Ta = int(config["observations"]), int(config["horizon"]), int(config["execute"])
        if min(self.To, self.T, self.Ta) < 1 or self.To - 1 + self.Ta > self.T:
            raise UserError(
                f"a horizon of {self.T} cannot hold {self.To - 1} past and {self.Ta} executed actions; "
                "make policy.horizon at least policy.observations - 1 + policy.execute, each at least 1"
            )
        self.layout = Layout(action=spec.action_dim)
        self.normalizer = Normalizer.from_shapes({"observation": spec.observation_dim, "action": spec.action_dim})
        self.encoders = nn.ModuleDict({key: ImageEncoder(**config["image_encoder"]) for key in spec.images})
        image_dim = len(self.encoders) * 2 * int(config["image_encoder"].get("keypoints", 32))
        condition_dim = self.To * (spec.observation_dim + image_dim)
        network = build_network(
            features=spec.action_dim, horizon=self.T, groups=1, condition_dim=condition_dim, **config["network"]
        )
        schedule = NoiseSchedule.from_config(**config["schedule"])
        self.denoiser = Denoiser(network, schedule, self.layout, config["prediction"])

    def prepare(self, store: TrajectoryStore) -> None:
        columns = {key: store.columns[key] for key in ("observation", "action")}
        columns["action"] = self._clip(columns["action"])
        self.normalizer = Normalizer.fit(columns, self.config["normalizer"])

    def _clip(self, actions: np.ndarray) -> np.ndarray:
        """Recorded commands as the robot would have carried them out."""
        if not self.spec.action_low:
            return actions
        low, high = (np.asarray(limit, np.float32) for limit in (self.spec.action_low, self.spec.action_high))
        return np.clip(actions, low, high)

    def windows(self, store: TrajectoryStore, device: torch.device | str) -> Windows:
        store = retime(store, float(self.config["speed"]))
        columns = ["observation", "action", *self.spec.images]
        windows = Windows(
            store,
            self.T,
            columns=columns,
            pad_before=self.To - 1,
            pad_after=self.Ta - 1,
            device=device,
        )
        normalizer = self.normalizer.to(device)
        clipped = torch.as_tensor(self._clip(store.columns["action"]), dtype=torch.float32, device=device)
        windows.columns["action"] = normalizer.normalize("action", clipped)
        windows.columns["observation"] = normalizer.normalize("observation", windows.columns["observation"])
        return windows

    def condition(self, observation: Tensor, images: Mapping[str, Tensor]) -> Tensor:
        """Normalized observations (B, To, Do) and images (B, To, height, width, 3) -> (B, condition)."""
        parts = [observation.flatten(1)]
        for key, encoder in self.encoders.items():
            image = images[key]
            parts.append(encoder(image.flatten(0, 1)).unflatten(0, image.shape[:2]).flatten(1))
        return torch.cat([part.to(observation.dtype) for part in parts], dim=-1)

    def loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        observation = batch["observation"][:, : self.To]
        noise = float(self.config.get("observation_noise", 0.0))
        if noise:
            shape, device = observation.shape, observation.device
            observation = observation + noise * torch.randn(shape, generator=generator, device=device)
        images = {key: batch[key][:, : self.To] for key in self.encoders}
        loss = self.denoiser.loss(
            batch["action"],
            generator,
            condition=self.condition(observation, images),
            weighting=self.config["weighting"],
        )
        return loss, {"loss": loss.detach()}

    @torch.no_grad()
    def sample_actions(
        self, history: Mapping[str, Tensor], table: Any, generator: torch.Generator | None = None
    ) -> Tensor:
        """history: "observation" (B, To, Do) in the task's units, images (B, To, ...) -> actions (B, Ta, Da)."""
        observation = self.normalizer.normalize("observation", history["observation"])
        condition = self.condition(observation, history)
        shape = (observation.shape[0], self.T, self.spec.action_dim)
        x_T = torch.randn(shape, generator=generator, device=observation.device)
        x_T = x_T * self.denoiser.schedule.sigma(torch.ones((), device=observation.device))
        x_0 = sample(lambda x, t: self.denoiser(x, t, condition), table, x_T, generator)
        actions = self.normalizer.denormalize("action", x_0)[:, self.To - 1 : self.To - 1 + self.Ta]
        if self.spec.action_low:
            low, high = (actions.new_tensor(v) for v in (self.spec.action_low, self.spec.action_high))
            actions = actions.clamp(low, high)
        return actions

    def table(self, sampler: Mapping[str, Any] | None = None) -> Any:
        """The sampler's Tableau: the config's, or another {name, steps, ...}."""
        options = dict(sampler or self.config["sampler"])
        return solver(options.pop("name"), self.denoiser.schedule, options.pop("steps"), **options)

    def act(
        self, history: np.ndarray | Mapping[str, np.ndarray], generator: torch.Generator | None = None
    ) -> np.ndarray:
        """(To, Do) -> (Ta, Da), or with a leading batch axis; a mapping adds images beside "observation"."""
        arrays = dict(history) if isinstance(history, Mapping) else {"observation": history}
        single = np.ndim(arrays["observation"]) == 2
        expected = (self.To, self.spec.observation_dim)
        if np.shape(arrays["observation"])[-2:] != expected:
            got = np.shape(arrays["observation"])
            raise UserError(f"history must be (observations, features) = {expected}; got {got}")
        device = next(self.parameters()).device
        tensors = {key: torch.as_tensor(np.asarray(value), device=device) for key, value in arrays.items()}
        tensors = {key: value[None] if single else value for key, value in tensors.items()}
        tensors["observation"] = tensors["observation"].float()
        actions = self.sample_actions(tensors, self.table(), generator).cpu().numpy()
        return actions[0] if single else actions

    def controller(
        self,
        task_spec: Any,
        *,
        sampler: Mapping[str, Any] | None = None,
        replan_every: int | None = None,
        seed: int = 0,
    ) -> PolicyController:
        """This policy for roll-outs and robots: another sampler {name, steps}, `replan_every` <= Ta actions."""
        every = self.Ta if replan_every is None else int(replan_every)
        if not 1 <= every <= self.Ta:
            raise UserError(f"replan_every is {every}; chunks of {self.Ta} actions allow 1 to {self.Ta}")
        return PolicyController(self, task_spec.dt, sampler or self.config["sampler"], every, seed)
