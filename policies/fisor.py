"""FISOR (Zheng et al. 2024, "Safe Offline Reinforcement Learning with Feasibility-Guided Diffusion Model", arXiv 2401.10700).

From recorded steps (s, a, r, h, s'), h > 0 where a step breaks the constraint, three things are learned beside each other:

    feasibility   Q_h(s, a) <- (1 - g) h + g max(h, V_h(s'))       Hamilton-Jacobi reachability: the worst h that is still ahead
                  V_h(s) = the low expectile of Q_h(s, a)           of the best recorded actions. {V_h <= 0} is the largest set
                                                                    of states from which the constraint can be kept
    reward        Q_r(s, a) <- r + g V_r(s')                        implicit Q-learning (Kostrikov et al. 2022)
                  V_r(s) = the high expectile of Q_r(s, a)
    policy        min E[w(s, a) |network - target|^2]               a diffusion of recorded actions, weighted, which samples from
                                                                    w(s, a) pi_b(a | s) without guidance (their theorem 2)

with the feasibility-dependent weights

    w = 1[Q_h <= 0] exp(temperature (Q_r - V_r))     where V_h <= 0: the best of what stays feasible
    w = exp(temperature (V_h - Q_h))                 where V_h > 0: whatever breaks the constraint least

Of several candidates, the policy carries out one by Q_h and Q_r (`choice`).

Actions come here in chunks of `execute` steps (1 in the paper): h is then the worst of the chunk's steps, r their discounted
sum. h is minus the recorded margin where there is one, else -1 or `broken` by the recorded cost. A recorded margin or cost is
that of its step, hence of s'. Where `inside`, V_r counts what the feasible region alone can earn, as the problem that the paper
starts from has it (their eq. 3); its algorithm leaves that out, and values ways through what is forbidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from diffusion import Denoiser, Layout, NoiseSchedule, Tableau, sample
from diffusion.networks import FourierFeatures, build_network
from offline import Algorithm, DataSpec, Normalizer, Windows, register, sampler_table
from offline.returns import returns_to_go
from pilotwave.errors import UserError, nearest
from policies.controller import PolicyController

if TYPE_CHECKING:
    from offline.store import TrajectoryStore


# -- the paper's formulas ----------------------------------------------------------------------------------------------
def expectile_loss(error: Tensor, tau: float) -> Tensor:
    """|tau - 1[error < 0]| error^2, for error = Q - V: V becomes Q's expectile tau (their eq. 10; 1 - tau of it for eq. 6)."""
    return torch.where(error < 0, 1 - tau, tau) * error.square()


def hamilton_jacobi(h: Tensor, v: Tensor, discount: float, goes_on: Tensor) -> Tensor:
    """The target of Q_h (their eq. 7): h and V_h(s') (B,), and whether there is an s' at all."""
    return torch.where(goes_on, (1 - discount) * h + discount * torch.maximum(h, v), h)


def feasibility_weights(q_h: Tensor, v_h: Tensor, a_r: Tensor, reward: Mapping[str, Any], feasibility: Mapping[str, Any]) -> Tensor:
    """w (B,) from Q_h, V_h and the reward's advantage A_r = Q_r - V_r (their eq. 13); the settings hold {temperature, largest}."""
    inside = (q_h <= 0) * tilt(a_r, reward)
    return torch.where(v_h <= 0, inside, tilt(v_h - q_h, feasibility))


def reward_weights(q_h: Tensor, v_h: Tensor, a_r: Tensor, reward: Mapping[str, Any], feasibility: Mapping[str, Any]) -> Tensor:
    """w (B,) that knows no constraint, for comparison."""
    return tilt(a_r, reward)


def tilt(advantage: Tensor, settings: Mapping[str, Any]) -> Tensor:
    """exp(temperature advantage), at most `largest`."""
    return (float(settings["temperature"]) * advantage).exp().clamp(max=float(settings["largest"]))


def best_feasible(q_h: Tensor, q_r: Tensor) -> Tensor:
    """The candidate (B,) of greatest Q_r among those with Q_h <= 0; of least Q_h where there is none. Both are (B, N)."""
    feasible = q_h <= 0
    return torch.where(feasible.any(1, keepdim=True), q_r.masked_fill(~feasible, -torch.inf), -q_h).argmax(1)


def pessimistic(q: Tensor) -> tuple[Tensor, Tensor]:
    """Q_h and Q_r (B,) of two of each, (B, 4): the greater Q_h, the smaller Q_r."""
    return q[:, :2].amax(1), q[:, 2:].amin(1)


WEIGHTS = {"feasibility": feasibility_weights, "reward": reward_weights}
CHOICES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "safest": lambda q_h, q_r: q_h.argmin(1),  # the paper's
    "feasible": best_feasible,
    "reward": lambda q_h, q_r: q_r.argmax(1),
}


def constraint(store: TrajectoryStore, settings: Mapping[str, Any]) -> np.ndarray:
    """h (N,) of recorded steps, above 0 where the constraint is broken. UserError for data that says nothing of it.

    Of margins, -(margin - reserve) / scale, not below -1: further away is no safer. Of costs, -1, or `broken` where it is above 0.
    """
    where, columns = store.source or "the data", store.columns
    if "margin" in columns:
        scale, reserve = float(settings["scale"]), float(settings["reserve"])
        h = np.maximum(-(columns["margin"] - reserve) / scale, -1.0)
    elif "cost" in columns:
        h = np.where(columns["cost"] > 0, float(settings["broken"]), -1.0)
    else:
        raise UserError(
            f"{where} has neither margins nor costs (infos/margin, infos/cost, costs), from which fisor learns what is "
            "feasible; collect it on a task with constraints, or name one with task="
        )
    store.check_finite([name for name in ("margin", "cost") if name in columns])
    return h.astype(np.float32)


# -- networks ----------------------------------------------------------------------------------------------------------
class Ensemble(nn.Module):
    """n networks with two hidden layers side by side: features (B, C) -> (B, n)."""

    def __init__(self, n: int, inputs: int, width: int) -> None:
        super().__init__()
        sizes = [(inputs, width), (width, width), (width, 1)]
        self.weights = nn.ParameterList(torch.empty(n, a, b).uniform_(-(a**-0.5), a**-0.5) for a, b in sizes)
        self.biases = nn.ParameterList(torch.zeros(n, 1, b) for _, b in sizes)

    def forward(self, x: Tensor) -> Tensor:
        y = x.expand(len(self.weights[0]), *x.shape)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            y = torch.baddbmm(bias, y, weight)
            y = nn.functional.silu(nn.functional.layer_norm(y, y.shape[-1:])) if i + 1 < len(self.weights) else y
        return y[..., 0].T


@register
class FISOR(Algorithm):
    """Config (configs/policy/fisor.yaml): execute (steps of a chunk), candidates, choice, weights, inside;
    feasibility {discount, expectile, temperature, largest, scale, reserve, broken}; reward {discount, expectile, temperature,
    largest}; critic {width, fourier, target}; schedule, prediction, network, normalizer, sampler. Discounts are for one step.
    """

    kind, name = "policy", "fisor"
    To, past = 1, 0  # what `PolicyController` asks for
    reward_scale: Tensor

    def __init__(self, spec: DataSpec, config: Mapping[str, Any]) -> None:
        super().__init__(spec, config)
        self.Ta, self.candidates = int(config["execute"]), int(config["candidates"])
        if min(self.Ta, self.candidates) < 1:
            raise UserError(f"policy.execute={self.Ta}, policy.candidates={self.candidates}; both must be at least 1")
        self.feasibility, self.reward = dict(config["feasibility"]), dict(config["reward"])
        for name, part in (("feasibility", self.feasibility), ("reward", self.reward)):
            for key in ("discount", "expectile"):
                if not 0 < float(part[key]) < 1:
                    raise UserError(f"policy.{name}.{key}={part[key]} must be between 0 and 1")
        self.weights = chosen("weights", str(config["weights"]), WEIGHTS)
        self.choice = chosen("choice", str(config["choice"]), CHOICES)
        self.layout = Layout(action=spec.action_dim)
        self.normalizer = Normalizer.from_shapes({"observation": spec.observation_dim, "action": spec.action_dim})
        self.register_buffer("reward_scale", torch.ones(2))  # what is taken off rewards, and their returns' deviation
        self.features = FourierFeatures(spec.observation_dim, int(config["critic"]["fourier"]))
        condition, width = self.features.output_dim, int(config["critic"]["width"])
        self.v = Ensemble(2, condition, width)  # V_h and V_r
        self.q, self.target = (Ensemble(4, condition + self.Ta * spec.action_dim, width) for _ in range(2))  # two Q_h, two Q_r
        self.target.load_state_dict(self.q.state_dict())
        self.target.requires_grad_(False)
        network = build_network(features=spec.action_dim, horizon=self.Ta, groups=1, condition_dim=condition, **config["network"])
        schedule = NoiseSchedule.from_config(**config["schedule"])
        self.denoiser = Denoiser(network, schedule, self.layout, config["prediction"])

    # -- training ------------------------------------------------------------------------------------------------------

    def prepare(self, store: TrajectoryStore) -> None:
        broken = constraint(store, self.feasibility) > 0
        if broken.all() or not broken.any():
            which = f"{store.source or 'the data'}: {'every' if broken.any() else 'no'} step"
            raise UserError(f"{which} breaks the constraint; fisor learns from steps that do and steps that do not")
        returns = returns_to_go(store, float(self.reward["discount"]))
        self.reward_scale.copy_(torch.tensor([min(0.0, float(store.columns["reward"].min())), max(float(returns.std()), 1e-6)]))
        columns = {"observation": store.columns["observation"], "action": self._clip(store.columns["action"])}
        self.normalizer = Normalizer.fit(columns, self.config["normalizer"])

    def _clip(self, actions: np.ndarray) -> np.ndarray:
        """Recorded commands as the robot would have carried them out."""
        if not self.spec.action_low:
            return actions
        low, high = (np.asarray(limit, np.float32) for limit in (self.spec.action_low, self.spec.action_high))
        return np.clip(actions, low, high)

    def windows(self, store: TrajectoryStore, device: torch.device | str) -> Windows:
        """Of a chunk and the state after it; past the ends of episodes where any of them ends for good."""
        ends = bool(store.columns.get("terminal", np.zeros(1)).any())
        windows = Windows(store, self.Ta + 1, columns=[], pad_after=self.Ta if ends else 0, device=device)
        normalizer, (least, deviation) = self.normalizer.to(device), self.reward_scale.tolist()
        columns = {
            "observation": store.columns["observation"],
            "action": self._clip(store.columns["action"]),
            "reward": (store.columns["reward"] - least) / deviation,
            "h": constraint(store, self.feasibility),
            "terminal": store.columns.get("terminal", np.zeros(store.steps, bool)),
        }
        tensors = {key: torch.as_tensor(np.asarray(value), device=windows.device) for key, value in columns.items()}
        tensors |= {key: normalizer.normalize(key, tensors[key].float()) for key in ("observation", "action")}
        windows.columns = tensors
        return windows

    def loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """`batch`: windows of Ta + 1 tokens. One cut off where its episode ended, but not for good, counts nothing."""
        k, valid = self.Ta, batch["valid"]
        ended = (batch["terminal"] & valid)[:, :k].any(1)
        counts = (valid[:, k] | ended).float()
        with torch.autocast(valid.device.type, enabled=False):  # differences of values count
            s, following = (self.features(batch["observation"][:, i].float()) for i in (0, k))
            a = batch["action"][:, :k].flatten(1).float()
            h = batch["h"][:, :k].where(valid[:, :k], -torch.inf).amax(1)
            step_discount = float(self.reward["discount"]) ** torch.arange(k, device=h.device)
            r = (batch["reward"][:, :k] * valid[:, :k] * step_discount).sum(1)
            losses, w = self.value_losses(s, a, h, r, following, ~ended)
            if self.training:
                rate = float(self.config["critic"]["target"])
                torch._foreach_lerp_(list(self.target.parameters()), list(self.q.parameters()), rate)
        weight = (w * counts)[:, None, None] * valid[:, :k, None]
        policy_loss = self.denoiser.loss(batch["action"][:, :k], generator, condition=s, weight=weight)
        parts = {"policy_loss": policy_loss} | {key: (counts * part).mean() for key, part in losses.items()}
        info = {"weight": w.mean(), "unused": (w == 0).float().mean()}
        return torch.stack(list(parts.values())).sum(), {key: part.detach() for key, part in parts.items()} | info

    def value_losses(
        self, s: Tensor, a: Tensor, h: Tensor, r: Tensor, following: Tensor, goes_on: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The four losses (B,) and the policy's weights w (B,), from features of states and of those that follow, chunks, the worst
        h of their steps, their rewards, not negative, and whether the episode goes on after them.
        """
        (v_h, v_r), q = self.v(s).T, self.q(torch.cat([s, a], 1)).T
        with torch.no_grad():
            q_h, q_r = pessimistic(self.target(torch.cat([s, a], 1)))
            next_h, next_r = self.v(following).T
            target_h = hamilton_jacobi(h, next_h, float(self.feasibility["discount"]) ** self.Ta, goes_on)
            target_r = r + goes_on * float(self.reward["discount"]) ** self.Ta * next_r
            if self.config["inside"]:  # to leave the feasible region is worth 0, the least that there is
                target_r = target_r * (hamilton_jacobi(h, next_h, 1.0, goes_on) <= 0)
            w = self.weights(q_h, v_h, q_r - v_r, self.reward, self.feasibility)
        losses = {
            "v_h_loss": expectile_loss(q_h - v_h, 1 - float(self.feasibility["expectile"])),
            "q_h_loss": (q[:2] - target_h).square().sum(0),
            "v_r_loss": expectile_loss(q_r - v_r, float(self.reward["expectile"])),
            "q_r_loss": (q[2:] - target_r).square().sum(0),
        }
        return losses, w

    # -- acting --------------------------------------------------------------------------------------------------------

    def table(self, sampler: Mapping[str, Any] | None = None) -> Tableau:
        """The sampler's Tableau: the config's, or another {name, steps, ...}."""
        return sampler_table(self, sampler or self.config["sampler"])

    @torch.no_grad()
    def infeasibility(self, observation: Tensor) -> Tensor:
        """V_h (B,) of observations (B, Do) in the task's units: at most 0 where the constraint can be kept, in units of `scale`."""
        return self.v(self.features(self.normalizer.normalize("observation", observation)))[:, 0]

    @torch.no_grad()
    def sample_actions(
        self,
        history: Mapping[str, Tensor],
        table: Any,
        generator: torch.Generator | None = None,
        candidates: int | None = None,
        choice: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """history: "observation" (B, 1, Do) in the task's units -> actions (B, Ta, Da), the chosen ones of `candidates`."""
        n, observation = candidates or self.candidates, history["observation"][:, -1]
        s = self.features(self.normalizer.normalize("observation", observation)).repeat_interleave(n, 0)
        source = s.device if generator is None else generator.device
        noise = torch.randn((len(s), self.Ta, self.spec.action_dim), generator=generator, device=source).to(s.device)
        x_T = noise * self.denoiser.schedule.sigma(torch.ones((), device=s.device))
        actions = self.normalizer.denormalize("action", sample(lambda x, t: self.denoiser(x, t, s), table, x_T, generator))
        if self.spec.action_low:
            low, high = (actions.new_tensor(v) for v in (self.spec.action_low, self.spec.action_high))
            actions = actions.clamp(low, high)
        a = self.normalizer.normalize("action", actions).flatten(1)
        q_h, q_r = pessimistic(self.q(torch.cat([s, a], 1)))
        best = (choice or self.choice)(q_h.view(-1, n), q_r.view(-1, n))
        return actions.unflatten(0, (-1, n))[torch.arange(len(best), device=s.device), best]

    def act(self, history: np.ndarray | Mapping[str, np.ndarray], generator: torch.Generator | None = None) -> np.ndarray:
        """(1, Do) -> (Ta, Da), or with a leading batch axis; a mapping holds it as "observation"."""
        given = np.asarray(history["observation"] if isinstance(history, Mapping) else history, np.float32)
        if given.ndim not in (2, 3) or given.shape[-2:] != (1, self.spec.observation_dim):
            raise UserError(f"history must be (steps, features) = {(1, self.spec.observation_dim)}; got {given.shape}")
        observation = torch.as_tensor(given, device=next(self.parameters()).device)
        single = observation.ndim == 2
        actions = self.sample_actions({"observation": observation[None] if single else observation}, self.table(), generator)
        out = actions.cpu().numpy()
        return out[0] if single else out

    def controller(
        self,
        task_spec: Any,
        *,
        sampler: Mapping[str, Any] | None = None,
        replan_every: int | None = None,
        candidates: int | None = None,
        choice: str | None = None,
        seed: int = 0,
    ) -> PolicyController:
        """This policy for roll-outs and robots: another sampler {name, steps}, `replan_every` <= execute actions, other
        `candidates` or another `choice` among them."""
        every = self.Ta if replan_every is None else int(replan_every)
        if not 1 <= every <= self.Ta:
            raise UserError(f"replan_every is {every}; chunks of {self.Ta} actions allow 1 to {self.Ta}")
        if candidates is not None and int(candidates) < 1:
            raise UserError(f"controller.candidates={candidates} must be at least 1")
        options: dict[str, Any] = {} if candidates is None else {"candidates": int(candidates)}
        if choice is not None:
            options["choice"] = chosen("choice", choice, CHOICES, "controller")
        return PolicyController(self, task_spec.dt, sampler or self.config["sampler"], every, seed, options)


def chosen(key: str, name: str, table: Mapping[str, Any], where: str = "policy") -> Any:
    """An entry of a table by its name; UserError, which names the setting, for one that is not there."""
    if name not in table:
        raise nearest(f"{where}.{key}", name, table)
    return table[name]
