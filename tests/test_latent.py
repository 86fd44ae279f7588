"""LatentDiffuser and LDCQ: skills join, what Q learns is the data's best, guidance is exact, and each selection does its own."""

import numpy as np
import pytest
import torch
import toy_planner
from omegaconf import OmegaConf
from toy_planner import GOAL, START, seeded, straight_paths, train

from offline import TrajectoryStore, load_run, save_run
from pilotwave.config import compose
from pilotwave.errors import UserError
from planners import LatentDiffuser


def config(**changes):
    settings = OmegaConf.to_container(compose("train", ["planner=latent"]).planner, resolve=True)
    small = {"name": "mlp", "width": 64, "depth": 1, "shortcut": True}
    settings |= {"skills": 2, "tokens": 3, "stride": 2, "arrive": 0.3, "network": small, "sampler": {"name": "ddim", "steps": 4}}
    settings["vae"] |= {"latent": 3, "width": 64, "beta": 0.002}
    settings["energy"] = settings["energy"] | {"network": small}
    settings["critic"] = settings["critic"] | {"reach": 10, "width": 64, "discount": 0.9, "candidates": 4, "windows": 64}
    return settings | changes


@pytest.fixture(scope="module")
def store():
    return straight_paths("x velocity")


def build(store, goal_dim=2, **changes):
    return toy_planner.build(LatentDiffuser, config(**changes), store, goal_dim)


@pytest.fixture(scope="module")
def trained(store):
    planner = build(store)
    return planner, train(planner, store, 250)


def test_skills_are_decoded_each_from_where_the_one_before_led(store):
    skills = build(store).skills
    begin, z = torch.randn(5, 4, generator=seeded()), torch.randn(5, 3, 3, generator=seeded(1))
    states, actions = skills.chain(begin, z)
    assert (states.shape, actions.shape) == ((5, 10, 4), (5, 9, 2))
    torch.testing.assert_close(states[:, 0], begin)
    for i in range(3):
        following, acted = skills.decode(states[:, 3 * i], z[:, i])
        torch.testing.assert_close(states[:, 3 * i + 1 : 3 * i + 4], following)
        torch.testing.assert_close(actions[:, 3 * i : 3 * i + 3], acted)


def test_goals_are_backed_up_from_the_window_or_from_where_it_ends(store):
    planner = build(store)
    batch = planner.windows(store, "cpu").gather(torch.arange(0, 2700, 9))
    goal = batch["observation"][:, 4].clone()
    goal[150:] = goal[150:].roll(1, 0)
    target = planner.backup(batch, goal, torch.full((len(goal),), 0.5)).numpy()
    places, to = (planner.normalizer.denormalize("observation", part)[..., :2].numpy() for part in (batch["observation"], goal))
    for way, g, value in zip(places, to, target):
        reached = np.flatnonzero(np.linalg.norm(way[:7] - g, axis=1) <= 0.3)
        assert value == pytest.approx(0.9 ** reached[0] if len(reached) else 0.9**6 * 0.5, abs=1e-5)
    assert 150 < (target > 0.9**6 * 0.5 + 1e-6).sum() < 300


def test_rewards_are_backed_up_until_the_episode_ends(store):
    planner = build(store, goal_dim=0)
    windows, reward = planner.windows(store, "cpu"), store.columns["reward"].astype(float).reshape(300, 30)
    assert len(windows) == 9000  # every step begins one
    index = torch.tensor([3, 17, 18, 25, 29, 30 + 4])
    batch = windows.gather(index)
    scale = windows.columns["return"][0].item() / (reward[0] @ 0.9 ** np.arange(30))
    target = planner.backup(batch, None, torch.full((6,), 2.0)).numpy()
    for i, value in zip(index.numpy(), target):
        rewards = reward[i // 30, i % 30 : i % 30 + 12]  # 6 tokens of 2 steps
        bootstrap = 0.9**12 * 2.0 if i % 30 + 12 < 30 else 0.0
        assert value == pytest.approx(scale * rewards @ 0.9 ** np.arange(len(rewards)) + bootstrap, abs=1e-4)


def test_q_learns_from_the_best_of_the_priors_skills(store):
    """With a Q' that is the sum of z, the value of where a window ends is the greatest sum of four draws of the prior."""
    planner = build(store)
    planner.target = Sum()
    batch = planner.windows(store, "cpu").sample(16, seeded())
    seen = []
    planner.backup = lambda batch, goal, v: seen.append(v) or v
    planner.eval().loss(batch, seeded(5))
    assert seen[0].shape == (16,)
    draws = torch.stack(
        [planner.draw(batch["observation"][:, 6], batch["observation"][:, 6], planner.table(), seeded(i)) for i in range(50)]
    )
    sums = draws.sum((2, 3))  # untrained, the prior is the same everywhere
    expected = sums[:48].view(12, 4, 16).amax(1)
    gap = seen[0].mean() - expected.mean()
    assert abs(gap) < 4 * expected.std() / 16**0.5
    assert seen[0].mean() > sums.mean() + 1


class Sum(torch.nn.Module):
    def forward(self, condition, z):
        return z.sum((1, 2))[:, None].expand(-1, 2)


def test_guidance_by_the_exact_energy_gives_the_tilted_skills(store):
    """N(0, 1) skills tilted by exp(b z): N(b, 1). E[exp(b z_0) | z_t] is that of the Gaussian z_0 | z_t, of mean alpha z_t."""
    planner, b = build(store, sampler={"name": "dpmpp_3m", "steps": 25}), torch.tensor([1.0, -0.5, 0.0])
    schedule = planner.denoiser.schedule
    planner.denoiser.forward = lambda z, t, condition=None: schedule.alpha(t) * z
    planner.f = lambda z, t, condition: (schedule.alpha(t) * z * b).sum((1, 2))
    state = torch.zeros(4000, 4)
    for guided, mean in ((True, b), (False, torch.zeros(3))):
        z = planner.draw(state, state, planner.table(), seeded(), guided)
        assert (z.mean(0) - mean).abs().max() < 5 / 4000**0.5
        assert (z.std(0) - 1).abs().max() < 0.06


def test_the_energy_learns_what_q_says(trained):
    """At level 0 the learned f is beta Q but for a constant: among a prior's skills for one state they rank alike."""
    planner, _ = trained
    states = torch.tensor([[0.0, 0.0, 0.3, 0.0], [0.1, 0.1, 0.0, -0.4]]).repeat_interleave(200, 0)
    goals = torch.tensor([[0.2, 0.0, 0.0, 0.0], [0.1, -0.1, 0.0, 0.0]]).repeat_interleave(200, 0)
    with torch.no_grad():
        z = planner.draw(states, goals, planner.table(), seeded())
        condition = planner.condition(states, goals)
        q = planner.target(condition, z).amin(1).view(2, 200)
        f = planner.f(z, torch.zeros(()), condition).view(2, 200)
        guided = planner.draw(states, goals, planner.table(), seeded(), guided=True)
        better = planner.target(condition, guided).amin(1).view(2, 200)
    for i in range(2):
        assert np.corrcoef(q[i], f[i])[0, 1] > 0.6
    assert (better.mean(1) > q.mean(1)).all()


def test_a_short_training_learns_every_part(trained):
    planner, info = trained
    assert info["vae_loss"] < 0.02
    assert info["q_loss"] < 0.05
    start = np.array([0.0, 0.0, 0.6, 0.0], np.float32)
    for selection in ("q", "energy"):
        plan = planner.plan(start, np.array([0.5, 0.0]), samples=8, selection=selection, generator=seeded())
        assert [part.shape for part in (plan.observations, plan.actions, plan.values, plan.arrivals)] == [
            (8, 7, 4),
            (8, 7, 2),
            (8,),
            (8,),
        ]
        np.testing.assert_allclose(plan.observations[:, 0], np.broadcast_to(start, (8, 4)), atol=1e-5)
        assert np.linalg.norm(plan.observations[0, -1, :2] - [0.5, 0.0]) < 0.3
        assert (np.diff(plan.values) <= 0).all()


def test_ldcq_keeps_the_priors_samples_of_greatest_q(trained):
    planner, _ = trained
    plan = planner.plan(np.stack([START, -START]), GOAL, samples=6, selection="q", generator=seeded())
    s = planner.normalizer.normalize("observation", torch.as_tensor(np.stack([START, -START]))).repeat_interleave(6, 0)
    goal = torch.as_tensor(np.concatenate([GOAL, [0, 0]]).astype(np.float32)).expand(12, 4)
    g = planner.normalizer.normalize("observation", goal)
    with torch.no_grad():
        z = planner.draw(s, g, planner.table(), seeded())
        q = planner.critic(planner.condition(s, g), z).amin(1).view(2, 6)
    np.testing.assert_allclose(plan.values, q.sort(1, descending=True).values, atol=1e-5)


def test_the_prior_sees_the_goal_only_if_it_is_told_to(store):
    s, goals = torch.zeros(2, 4), torch.tensor([[0.5, 0.5, 0, 0], [-0.5, 0, 0, 0]])
    for sees in (True, False):
        planner = build(store, goal_prior=sees)
        first, second = planner.prior_condition(s, goals)
        assert torch.equal(first, second) is not sees
        first, second = planner.condition(s, goals)
        assert not torch.equal(first, second)


def test_the_slow_q_follows_in_training_alone(store):
    planner = build(store)
    batch = planner.windows(store, "cpu").sample(8, seeded())
    before, online = ([p.clone() for p in q.parameters()] for q in (planner.target, planner.critic))
    with torch.no_grad():
        for p in planner.critic.parameters():
            p.add_(1.0)
    planner.loss(batch, seeded())
    for a, b in zip(before, planner.target.parameters()):
        torch.testing.assert_close(a, b)
    planner.train()
    planner.loss(batch, seeded())
    for a, b, c in zip(before, planner.target.parameters(), online):
        torch.testing.assert_close(b, a + 0.01 * (c + 1.0 - a))
    assert not any(p.requires_grad for p in planner.target.parameters())


def test_without_goals_plans_gain_rewards(store):
    planner = build(store, goal_dim=0)
    info = train(planner, store, 120)
    assert info["q_loss"] < 1.0
    state = np.zeros((3, 4), np.float32)
    plan = planner.plan(state, samples=5, generator=seeded())
    assert plan.arrivals is None
    assert plan.observations.shape == (3, 5, 7, 4)
    columns = {key: value for key, value in store.columns.items() if key != "reward"}
    with pytest.raises(UserError, match="no rewards"):
        planner.windows(TrajectoryStore(columns, store.episode_ends, {}, 0.1, "toy", {}), "cpu")


def test_skills_can_be_of_states_alone(store):
    planner = build(store, actions=False)
    loss, _ = planner.loss(planner.windows(store, "cpu").sample(8, seeded()), seeded())
    assert loss.isfinite()
    plan = planner.plan(START, GOAL, samples=2, generator=seeded())
    assert plan.actions is None
    assert plan.observations.shape == (2, 7, 4)


def test_a_run_loads_and_its_controller_acts(tmp_path, store):
    save_run(tmp_path / "run", build(store))
    planner = load_run(tmp_path / "run", kind="planner")

    class Task:
        dt, action_low, action_high = 0.1, -np.ones(2), np.ones(2)

    for selection, track, width in (("q", "pd", 4), ("energy", "actions", 2)):
        controller = planner.controller(Task, samples=3, track=track, selection=selection)
        assert controller.evaluations == 4
        chunk = controller.act({"state": START[None, None], "goal": GOAL[None, None]}, 0)
        assert chunk.references.shape == (1, 7, width)
    with pytest.raises(UserError, match="did you mean 'energy'"):
        planner.controller(Task, selection="enegry")
    with pytest.raises(UserError, match="all must be at least 1"):
        build(store, skills=0)
