"""A control-affine one-step model, and the peak of the rise that is under way: what a safety filter asks of a robot with contacts.

    o_1 = o_0 + f(o_0) + G(o_0) a_0          (eq. 1 of So et al. 2024, in steps)
    V(o_0) = max of o_t[feature], t = 0 .. the end of the rise that o_0 is in

f, G and V are means over `members` networks from different starts (Lakshminarayanan et al. 2017; Chua et al. 2018). Within one step
torques act on accelerations linearly while the contacts last, so the affine form loses little and makes the filter's problem a
quadratic program.

V is what an observation leads to under the policies that recorded the data. Its bound, roof - V, is a policy neural control barrier
function (So et al. 2024, "How to Train Your Neural Control Barrier Function", eq. 10), whose maximum over time is here known
from the recorded episodes themselves, and ends where the robot next falls: nothing is bootstrapped. `robots.peak_filter` reads
the same file without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offline import DataSpec, Windows, register
from offline.returns import peaks
from pilotwave.errors import UserError
from world_models.base import WorldModel

if TYPE_CHECKING:
    from offline.store import TrajectoryStore


class Ensemble(nn.Module):
    """Perceptrons side by side, SiLU between their layers: (B, in) -> (members, B, out)."""

    def __init__(self, members: int, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.ParameterList(torch.randn(members, i, o) / i**0.5 for i, o in pairwise(sizes))
        self.bias = nn.ParameterList(torch.zeros(members, 1, o) for o in sizes[1:])

    def forward(self, x: Tensor) -> Tensor:
        x = x.expand(len(self.weight[0]), -1, -1)
        for k, (weight, bias) in enumerate(zip(self.weight, self.bias)):
            x = torch.baddbmm(bias, F.silu(x) if k else x, weight)
        return x


@register
class ControlAffine(WorldModel):
    """Config (configs/world_model/control_affine.yaml): WorldModel's, members, width, and peak {feature, velocity}: whose
    peak is learned, and which feature is its speed.
    """

    name = "control_affine"
    rise: Tensor

    def __init__(self, spec: DataSpec, config: Mapping[str, Any]) -> None:
        super().__init__(spec, config)
        if self.T != 1 or self.reward:
            raise UserError("world_model.horizon and .reward: a control-affine model has a horizon of 1 and no rewards")
        do, da, width = spec.observation_dim, spec.action_dim, int(config["width"])
        peak = config["peak"]
        if not peak or any(not 0 <= int(peak.get(key, -1)) < do for key in ("feature", "velocity")):
            raise UserError(f"world_model.peak={peak}; right is {{feature: i, velocity: j}}, of {do} observed numbers")
        self.feature, self.velocity = int(peak["feature"]), int(peak["velocity"])
        self.dynamics = Ensemble(int(config["members"]), (do, width, width, do * (1 + da)))
        self.peak = Ensemble(int(config["members"]), (do, width, width, 1))
        self.register_buffer("rise", torch.ones(()))  # the usual way from a state to its peak

    # -- training ------------------------------------------------------------------------------------------------------

    def prepare(self, store: TrajectoryStore) -> None:
        super().prepare(store)
        left = peaks(store, self.feature, self.velocity) - store.columns["observation"][:, self.feature]
        rising = left[left == left]
        if not len(rising):
            raise UserError(f"feature {self.feature} never rises to a peak in these data; set world_model.peak")
        self.rise.fill_(max(float(rising.std()), 1e-6))

    def windows(self, store: TrajectoryStore, device: torch.device | str) -> Windows:
        windows = super().windows(store, device)
        windows.columns["peak"] = torch.from_numpy(peaks(store, self.feature, self.velocity)).to(windows.device)
        return windows

    def loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        now = self.h - 1
        (o, following), action, peak = batch["observation"][:, now:].unbind(1), batch["action"][:, now], batch["peak"][:, now]
        x = self.normalizer.normalize("observation", o)
        step_loss = (self._change(x, action) - (following - o) / self.error[1]).square().mean()
        known = peak.isfinite()
        left = torch.where(known, (peak - o[:, self.feature]) / self.rise, 0.0)
        off = (self.peak(x)[..., 0].float() - left).square() * known
        peak_loss = off.sum() / (known.sum() * len(off)).clamp_min(1)
        return step_loss + peak_loss, {"loss": step_loss.detach(), "peak_loss": peak_loss.detach()}

    def _change(self, x: Tensor, action: Tensor) -> Tensor:
        """(members, B, Do) of normalized observations (B, Do) and actions (B, Da), in usual changes."""
        parts = self.dynamics(x).float().unflatten(-1, (1 + self.spec.action_dim, -1))
        return parts[..., 0, :] + (parts[..., 1:, :] * action[..., None]).sum(-2)

    def predict(
        self, past: Tensor, known: Tensor, actions: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor | None]:
        o = past[:, -1]
        change = self._change(self.normalizer.normalize("observation", o), actions[:, self.h - 1]).mean(0)
        return (o + change * self.error[1])[:, None], None
