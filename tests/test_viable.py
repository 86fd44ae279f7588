"""Plans without goals under barriers: corrected ones follow the model and keep the barrier or rank last, others stay."""

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from test_peak_filter import ROOF, random_model

import robots
from offline import DataSpec, TrajectoryStore
from pilotwave.config import compose
from pilotwave.errors import UserError
from planners import Diffuser, TrajectoryDiffuser, Veteran
from planners.diffuser import UNSAFE
from planners.viable import ViablePlanner
from robots.peak_filter import PeakFilter

KINDS = [Diffuser, Veteran, TrajectoryDiffuser]
SPEC = DataSpec(task="hopper", observation_dim=5, action_dim=3, dt=0.008)


def untrained(kind, **changes):
    """Of the hopper's settings but small, on data that are noise."""
    settings = OmegaConf.to_container(compose("train", [f"planner={kind.name}", "task=hopper"]).planner, resolve=True)
    settings |= {"network": {"name": "mlp", "width": 16, "depth": 1}, "sampler": {"name": "ddim", "steps": 2}} | changes
    torch.manual_seed(0)
    planner, rng = kind(SPEC, settings), np.random.default_rng(0)
    columns = {"observation": rng.normal(size=(300, 5)), "action": rng.uniform(-1, 1, (300, 3)), "reward": np.ones(300)}
    planner.prepare(TrajectoryStore({k: v.astype(np.float32) for k, v in columns.items()}, np.array([300]), {}, 0.008, "toy", {}))
    return planner.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_corrected_plans_follow_the_model_and_keep_the_barrier(kind):
    planner, model = untrained(kind), random_model(2)
    filter = PeakFilter(model, [ROOF], margin=0.05, rising=0.1)
    start = np.random.default_rng(1).normal(size=(6, 5)).astype(np.float32)
    start[:, 0], start[:, 2] = np.linspace(-0.5, 0.95, 6), 0.3
    draw = {"generator": torch.Generator().manual_seed(0)}
    drawn = planner.plan(start, None, 8, **draw)
    plan = ViablePlanner(planner, filter, ahead=2).plan(start, None, 8, generator=torch.Generator().manual_seed(0))
    assert plan.observations.shape == drawn.observations.shape
    assert (np.diff(plan.values, axis=1) <= 0).all()
    viable = plan.values > -UNSAFE / 2
    moved = ~np.isclose(plan.actions[:, :, None], drawn.actions[:, None], atol=1e-5).all((3, 4)).any(2)
    assert (viable & moved).any()
    assert (~moved).any()
    for states, actions in zip(plan.observations[viable & moved], plan.actions[viable & moved]):
        drift, effect = model.step(states[:-1].astype(float))
        following = drift + (effect * actions[:-1, :, None]).sum(1)
        np.testing.assert_allclose(states[1:], following, atol=1e-4)
        assert filter.barriers[0].value(states[1:].astype(float)).min() >= 0.05 - 1e-4
    # as many actions as are carried out are safe in those that stay too
    kept = viable & ~moved
    drift, effect = model.step(np.repeat(start[:, None], 8, 1)[kept].astype(float))
    first = drift + (effect * plan.actions[kept][:, 0].clip(-1, 1)[..., None]).sum(1)
    assert filter.barriers[0].value(first).min() >= 0.05 - 1e-4
    values = planner.judge(plan.observations[viable], plan.actions[viable])
    np.testing.assert_allclose(plan.values[viable], values, atol=1e-4)


def test_what_cannot_be_held_ends_in_one_line():
    planner, task = untrained(Veteran), robots.make("hopper-roof")
    with pytest.raises(UserError, match="take correct"):
        planner.controller(task.spec, safety="tvs")
    with pytest.raises(UserError, match="hopper has no barriers"):
        planner.controller(robots.make("hopper").spec, safety="correct")
    with pytest.raises(UserError, match=r"nowhere lacks config.yaml"):
        planner.controller(task.spec, safety="correct", model="nowhere")
    for unheld in ({"margin": 0.0}, {"barriers": [{"shape": "box"}]}, {"model": "nowhere"}, {"rising": 0.0}):
        for kind in KINDS:
            with pytest.raises(UserError, match=f"controller.{next(iter(unheld))}: nothing holds it"):
                untrained(kind).controller(task.spec, **unheld)
    with pytest.raises(UserError, match="4 apart"):
        ViablePlanner(untrained(Veteran, stride=4), PeakFilter(random_model(0), [ROOF]))
