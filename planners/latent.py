"""Plans as sequences of latent skills: LatentDiffuser (Li 2024, "Efficient Planning with Latent Diffusion", arXiv 2310.00311) and
LDCQ (Venkatraman et al. 2024, "Reasoning with Latent Diffusion in Offline Reinforcement Learning", arXiv 2309.06599).

A plan is M skills of m tokens, H = M m, which both papers learn in three stages, and here beside each other:

    skill     q(z | s_0, a_0, .., s_m), p(a_0, .., s_m | s_0, z)   a beta-VAE: squared error + beta KL(q || N(0, 1))
    prior     p(z_1 .. z_M | s_0)                                  a diffusion over the skills of recorded windows
    Q         Q(s_0, z) <- R + discount^H max_i Q'(s_H, z_i)       LDCQ: z_i are drawn from the prior at s_H, so that no skill is
                                                                   valued that the data does not have; the smaller of two Qs
    energy    f(z_t, t; s_0) = log E[exp(beta Q(s_0, z)) | z_t]    LatentDiffuser's exact guidance of the whole sequence, learned
                                                                   by contrast among the same z_i (`contrastive_energy_loss`)

LDCQ (`selection: q`) draws skills from the prior, keeping those of greatest Q. LatentDiffuser (`selection: energy`) draws them from
p(z | s_0) exp(beta Q(s_0, z)) by f's gradient; of several samples, it too keeps the one of greatest Q. The skills are decoded one
after the other, each from where the one before has led.

Where rewards are recorded, R is their discounted sum in the window. Where the task has goals, Q and f see one that hindsight gives:
half of them a place where the window goes up to `reach` tokens later, half one of another window. R is then discount^k if the
window first comes within `arrive` of it at token k, which ends the return. With `goal_prior` the prior sees a later place of its
own window too, which is LDCQ's goal-conditioned kin (their LDGC): its samples lead there, and Q chooses the short ways.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from diffusion import Classifier, Denoiser, Layout, NoiseSchedule, Tableau, sample
from diffusion.guidance import contrastive_energy_loss
from diffusion.networks import FourierFeatures, build_network
from offline import Algorithm, DataSpec, Normalizer, Windows, register, sampler_table
from offline.returns import hindsight_goals, later_states, returns_to_go, tokens_until
from pilotwave.errors import UserError, nearest
from planners.controller import PlanController, overlaid
from planners.plan import Plan, Question, ended

if TYPE_CHECKING:
    from offline.store import TrajectoryStore

SELECTIONS = {"energy": True, "q": False}  # whether the prior's samples are guided


def mlp(inputs: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, width), nn.SiLU(),
        nn.Linear(width, width), nn.SiLU(),
        nn.Linear(width, outputs),
    )  # fmt: skip


class Skills(nn.Module):
    """The beta-VAE of segments: a state (B, Do), then m actions (B, m, Da), Da 0 for none, and the m states (B, m, Do) that
    follow, normalized."""

    def __init__(self, observation_dim: int, action_dim: int, tokens: int, latent: int, width: int, fourier: int = 4) -> None:
        super().__init__()
        self.sizes, self.tokens = [observation_dim, action_dim], tokens
        self.fourier = FourierFeatures(observation_dim, fourier)
        self.encoder = mlp(observation_dim + tokens * sum(self.sizes), width, 2 * latent)
        self.decoder = mlp(self.fourier.output_dim + latent, width, tokens * sum(self.sizes))

    def encode(self, begin: Tensor, following: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of q(z | segment), (B, L)."""
        moved = torch.cat([following - begin[:, None], actions], -1)
        mean, log_variance = self.encoder(torch.cat([begin, moved.flatten(1)], 1)).float().chunk(2, 1)
        return mean, log_variance

    def decode(self, begin: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """The states that follow and the actions."""
        out = self.decoder(torch.cat([self.fourier(begin), z], 1)).float().unflatten(1, (self.tokens, -1))
        moved, actions = out.split(self.sizes, -1)
        return begin[:, None] + moved, actions

    def chain(self, begin: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """States (B, M m + 1, Do) from `begin` on, and actions (B, M m, Da), of skills z (B, M, L)."""
        states, actions = [begin[:, None]], []
        for skill in z.unbind(1):
            following, acted = self.decode(states[-1][:, -1], skill)
            states.append(following)
            actions.append(acted)
        return torch.cat(states, 1), torch.cat(actions, 1)


class Critic(nn.Module):
    """Q(s, z; g): features (B, C) of s and g, skills (B, M, L) -> (B, 2), of which the smaller counts."""

    def __init__(self, condition: int, latents: int, width: int) -> None:
        super().__init__()
        self.each = nn.ModuleList(mlp(condition + latents, width, 1) for _ in range(2))

    def forward(self, condition: Tensor, z: Tensor) -> Tensor:
        x = torch.cat([condition, z.flatten(1)], 1).float()
        # skills differ in the third digit
        with torch.autocast(x.device.type, enabled=False):
            return torch.cat([q(x) for q in self.each], 1)


@register
class LatentDiffuser(Algorithm):
    """Config (configs/planner/latent.yaml): `skills` M of `tokens` m, `stride` environment steps apart, with `actions` or without;
    vae {latent, beta, width}; the prior's schedule, prediction, network, sampler, and `goal_prior`; critic {discount, reach, width,
    windows, candidates, sampler, target}; energy {beta, scale, network}; `selection`; `arrive`, in the task's units.
    """

    kind, name = "planner", "latent"

    def __init__(self, spec: DataSpec, config: Mapping[str, Any]) -> None:
        super().__init__(spec, config)
        self.M, self.m, self.stride = int(config["skills"]), int(config["tokens"]), int(config["stride"])
        if min(self.M, self.m, self.stride) < 1:
            raise UserError(
                f"planner.skills={self.M}, planner.tokens={self.m}, planner.stride={self.stride}; all must be at least 1"
            )
        self.H = self.M * self.m + 1  # tokens of a plan, as controllers count them
        self.guided = selected(str(config["selection"]), "planner.selection")
        self.vae, self.critic_config, self.energy_config = (dict(config[key]) for key in ("vae", "critic", "energy"))
        latent, goal = int(self.vae["latent"]), spec.goal_dim
        self.normalizer = Normalizer.from_shapes({"observation": spec.observation_dim, "action": spec.action_dim})
        self.acts = spec.action_dim if config["actions"] else 0
        self.skills = Skills(spec.observation_dim, self.acts, self.m, latent, int(self.vae["width"]))
        self.features = FourierFeatures(spec.observation_dim + goal, 4)
        condition = self.features.output_dim
        shape: dict[str, Any] = {"features": latent, "horizon": self.M, "groups": 1, "condition_dim": condition}
        schedule = NoiseSchedule.from_config(**config["schedule"])
        self.denoiser = Denoiser(build_network(**shape, **config["network"]), schedule, Layout(latent=latent), config["prediction"])
        self.energy = build_network(**shape, **self.energy_config["network"])
        self.critic, self.target = (Critic(condition, self.M * latent, int(self.critic_config["width"])) for _ in range(2))
        self.target.load_state_dict(self.critic.state_dict())
        self.target.requires_grad_(False)

    # -- training ------------------------------------------------------------------------------------------------------

    def prepare(self, store: TrajectoryStore) -> None:
        columns = {key: store.columns[key] for key in ("observation", "action")}
        self.normalizer = Normalizer.fit(columns, self.config["normalizer"])

    def windows(self, store: TrajectoryStore, device: torch.device | str) -> Windows:
        """Of H + 1 tokens, or as many as goals may lie ahead; where rewards count, past the ends of episodes, which stay there."""
        if self.spec.goal_dim:
            tokens, past = max(self.H, int(self.critic_config["reach"]) + 1), 0
        else:
            tokens, past = self.H, self.H - 1
        windows = Windows(store, tokens, stride=self.stride, pad_after=past, device=device)
        normalizer = self.normalizer.to(device)
        for key in ("observation", "action"):
            windows.columns[key] = normalizer.normalize(key, windows.columns[key])
        if not self.spec.goal_dim:
            returns = returns_to_go(store, float(self.critic_config["discount"]))
            scaled = torch.as_tensor(returns / max(returns.std(), 1e-6), dtype=torch.float32)
            windows.columns["return"] = scaled.to(windows.device)
        return windows

    def loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        x, action = batch["observation"][:, : self.H], batch["action"][:, : self.H, : self.acts]
        z, vae_loss = self.vae_loss(x, action, generator)
        own = goal = None
        few = {key: part[: int(self.critic_config["windows"])] for key, part in batch.items()}
        if self.spec.goal_dim:
            reach = int(self.critic_config["reach"])
            own = later_states(batch["observation"], reach, generator)
            goal = hindsight_goals(few["observation"], reach, generator)
        prior_loss = self.denoiser.loss(z, generator, condition=self.prior_condition(x[:, 0], own))
        q_loss, energy_loss, target = self.value_losses(few, z, goal, generator)
        parts = {"vae_loss": vae_loss, "prior_loss": prior_loss, "q_loss": q_loss, "energy_loss": energy_loss}
        loss = torch.stack(list(parts.values())).sum()
        return loss, {key: part.detach() for key, part in parts.items()} | {"q": target.mean()}

    def value_losses(
        self, batch: Mapping[str, Tensor], z: Tensor, goal: Tensor | None, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The losses of Q and of the energy, and Q's targets (B,), of windows whose skills are the first of z (.., M, L), for
        goals (B, Do)."""
        x, n = batch["observation"], int(self.critic_config["candidates"])
        with torch.no_grad():
            end, to = x[:, self.H - 1].repeat_interleave(n, 0), None if goal is None else goal.repeat_interleave(n, 0)
            candidates, condition = (
                self.draw(end, to, self.table(self.critic_config["sampler"]), generator),
                self.condition(end, to),
            )
            q = self.target(condition, candidates).amin(1).view(-1, n)
            target = self.backup(batch, goal, q.amax(1))
            if self.training:
                rate = float(self.critic_config["target"])
                torch._foreach_lerp_(list(self.target.parameters()), list(self.critic.parameters()), rate)
        q_loss = (self.critic(self.condition(x[:, 0], goal), z[: len(x)]) - target[:, None]).square().mean()

        t = torch.rand(len(x), generator=generator, device=x.device).repeat_interleave(n)
        noise = torch.randn(candidates.shape, generator=generator, device=x.device)
        f = self.f(self.denoiser.schedule.add_noise(candidates, noise, t[:, None, None]), t, condition).view(-1, n)
        return q_loss, contrastive_energy_loss(f, float(self.energy_config["beta"]) * q), target

    def vae_loss(self, x: Tensor, action: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Skills (B, M, L), drawn from q and without gradient, of windows (B, H, Do), (B, H, Da), and the beta-VAE's loss.

        Skills are decoded one after the other, as in planning, so that what they miss of the way is learned with them.
        """
        begin = x[:, : -1 : self.m].flatten(0, 1)
        following, acted = (part.unflatten(1, (self.M, self.m)).flatten(0, 1) for part in (x[:, 1:], action[:, :-1]))
        mean, log_variance = (part.unflatten(0, (-1, self.M)) for part in self.skills.encode(begin, following, acted))
        z = mean + (log_variance / 2).exp() * torch.randn(mean.shape, generator=generator, device=x.device)
        states, actions = self.skills.chain(x[:, 0], z)
        error = torch.cat([states - x, nn.functional.pad(actions - action[:, :-1], (0, 0, 0, 1))], -1).square().mean()
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return z.detach(), error + float(self.vae["beta"]) * divergence

    def backup(self, batch: Mapping[str, Tensor], goal: Tensor | None, v: Tensor) -> Tensor:
        """The return of windows (B,), given the value v (B,) of where they end: eq. 8 of LDCQ."""
        discount, last = float(self.critic_config["discount"]), self.H - 1
        if goal is None:
            returns, kept = batch["return"], discount ** (last * self.stride)
            return returns[:, 0] + batch["valid"][:, last] * kept * (v - returns[:, last])
        states = batch["observation"][:, : self.H]
        places, to = (self.normalizer.denormalize("observation", part)[..., : self.spec.goal_dim] for part in (states, goal))
        until = tokens_until((places - to[:, None]).norm(dim=-1) <= float(self.config["arrive"]))[:, 0]
        return torch.where(until.isfinite(), discount**until, discount**last * v)

    # -- the parts -----------------------------------------------------------------------------------------------------

    def condition(self, state: Tensor, goal: Tensor | None) -> Tensor:
        """Features (B, C) of states (B, Do) and goals (B, Dg or Do), of which the place counts."""
        return self.features(state if goal is None else torch.cat([state, goal[:, : self.spec.goal_dim]], 1))

    def prior_condition(self, state: Tensor, goal: Tensor | None) -> Tensor:
        """As `condition`, for the prior, which does not always see the goal."""
        return self.condition(state, goal if goal is None or self.config["goal_prior"] else torch.zeros_like(goal))

    def f(self, z: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """The energy of noisy skills (B, M, L) at levels () or (B,): (B,)."""
        levels = t.reshape(-1, 1, 1).expand(len(z), self.M, 1)
        return self.energy(z, levels, condition).float().mean((1, 2))

    def draw(
        self, state: Tensor, goal: Tensor | None, table: Tableau, generator: torch.Generator | None, guided: bool = False
    ) -> Tensor:
        """Skills (B, M, L) from the prior, or by the energy's guidance, at normalized states (B, Do) for goals (B, Dg or Do)."""
        prior, condition = self.prior_condition(state, goal), self.condition(state, goal)
        device, schedule = state.device, self.denoiser.schedule
        source = device if generator is None else generator.device
        noise = torch.randn(len(state), self.M, int(self.vae["latent"]), generator=generator, device=source).to(device)
        guide = None
        if guided:
            guide = Classifier(lambda z, t: self.f(z, t, condition), schedule, float(self.energy_config["scale"]))
        begin = noise * schedule.sigma(torch.ones((), device=device))
        return sample(lambda z, t: self.denoiser(z, t, prior), table, begin, generator, guide=guide)

    # -- planning ------------------------------------------------------------------------------------------------------

    def table(self, sampler: Mapping[str, Any] | None = None) -> Tableau:
        """The sampler's Tableau: the config's, or another {name, steps, ...}."""
        return sampler_table(self, sampler or self.config["sampler"])

    @torch.no_grad()
    def plan(
        self,
        observation: np.ndarray,
        goal: np.ndarray | None = None,
        samples: int = 16,
        *,
        sampler: Mapping[str, Any] | None = None,
        generator: torch.Generator | None = None,
        selection: str | None = None,
    ) -> Plan:
        """Plans from observations (Do,) or (B, Do) to goals (Dg,) or (B, Dg), in the task's units, best first by Q.

        Returns a Plan of (samples, H, ...) or (B, samples, H, ...). selection: "energy" or "q" in place of the config's. A plan
        that comes within `arrive` of the goal ends there.
        """
        guided = self.guided if selection is None else selected(selection, "selection")
        question = Question.of(self.spec, self.normalizer, observation, goal, samples, next(self.parameters()).device)
        s, g, d = question.observation, question.goal, self.spec.goal_dim
        z = self.draw(s, g, self.table(sampler), generator, guided)
        values = self.critic(self.condition(s, g), z).amin(1)
        x, a = self.skills.chain(s, z)
        observations, actions, arrivals = self.normalizer.denormalize("observation", x), None, None
        if self.acts:
            actions = self.normalizer.denormalize("action", torch.cat([a, a[:, -1:]], 1))
        if g is not None:
            to = self.normalizer.denormalize("observation", torch.cat([g, s[:, d:]], 1))[:, :d]
            observations, arrivals, _ = ended(observations, to, float(self.config["arrive"]))
        return question.best_first(values, observations, actions, arrivals)

    def controller(
        self,
        task_spec: Any,
        *,
        sampler: Mapping[str, Any] | None = None,
        replan_every: int | None = None,
        samples: int | None = None,
        track: str | None = None,
        deviation: float | None = None,
        selection: str | None = None,
        seed: int = 0,
    ) -> PlanController:
        """This planner for roll-outs and robots; see Diffuser's. selection: see `plan`."""
        if selection is not None:
            selected(selection, "controller.selection")
        given = {"replan_every": replan_every, "samples": samples, "track": track, "deviation": deviation}
        control = overlaid(self.config["control"], **given)
        settings, options = sampler or self.config["sampler"], {"selection": selection}
        return PlanController(self, task_spec, settings, seed=seed, options=options, **control)


def selected(name: str, where: str) -> bool:
    """Whether a selection guides; UserError, which names the setting, for one that is not there."""
    if name not in SELECTIONS:
        raise nearest(where, name, SELECTIONS)
    return SELECTIONS[name]
