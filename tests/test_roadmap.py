"""The roadmap: shortest ways over known edges, and edges learned from short walks round a wall."""

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from offline import DataSpec, TrajectoryStore, load_run, save_run
from pilotwave.config import compose
from pilotwave.errors import UserError
from planners import HierarchicalDiffuser
from planners.roadmap import Roadmap

# a corridor in the shape of a U: arms at x = 0 and x = 1, joined at y = 6; 13 long
LENGTH = 13.0


def on_the_way(s):
    """Places (n, 2), s metres along the U."""
    s = np.asarray(s, np.float32)[:, None]
    return np.where(s < 6, np.hstack([0 * s, s]), np.where(s < 7, np.hstack([s - 6, 0 * s + 6]), np.hstack([0 * s + 1, 13 - s])))


def test_ways_lead_over_known_edges_to_the_goal(monkeypatch):
    roadmap = Roadmap(1, 4, 6)
    roadmap.nodes.copy_(torch.arange(6.0)[:, None])

    def tokens(here, there):
        apart = (here - there.T).abs()
        return torch.where(apart <= 1.5, apart, torch.inf)

    monkeypatch.setattr(roadmap, "tokens", tokens)
    torch.testing.assert_close(roadmap.distance, (roadmap.nodes - roadmap.nodes.T).abs())
    here = torch.tensor([[0.2], [4.9], [2.0], [1.9], [9.0]])
    there = torch.tensor([[5.0], [0.0], [3.0], [0.1], [0.0]])
    # the next node on the way, the goal itself (-1) where it is in reach or where nothing is
    assert roadmap.next_node(here, there).tolist()[2:] == [-1, 1, -1]
    assert roadmap.next_node(here, there).tolist()[0] == 1
    assert roadmap.next_node(here, there).tolist()[1] == 4


@pytest.fixture(scope="module")
def learned():
    """From walks of 5 tokens, half a metre each, forth and back."""
    torch.manual_seed(0)
    roadmap = Roadmap(2, 5, 60, sure=0.4, near=1.0, ensemble=2)
    optimizer = torch.optim.Adam(roadmap.parameters(), 3e-3)
    rng = np.random.default_rng(0)
    for step in range(200):
        begin, way = rng.uniform(0, LENGTH, (64, 1)), rng.choice([-1, 1], (64, 1))
        s = (begin + way * 0.5 * np.arange(5)).clip(0, LENGTH)
        places = torch.as_tensor(on_the_way(s.ravel()).reshape(64, 5, 2)) / 6
        loss = roadmap.loss(places, torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    roadmap.place(torch.as_tensor(on_the_way(np.linspace(0, LENGTH, 600))) / 6)
    return roadmap


def test_places_across_the_wall_are_not_in_reach(learned):
    here = torch.as_tensor(on_the_way([0.5, 1.0, 1.5])) / 6
    across = torch.as_tensor(on_the_way([12.5, 12.0, 11.5])) / 6  # 1 metre away, 10 to 12 on foot
    along = torch.as_tensor(on_the_way([1.5, 2.0, 2.5])) / 6  # as far, and open
    assert learned.tokens(here, across).diagonal().isinf().all()
    assert (learned.tokens(here, along).diagonal() - 2).abs().max() < 0.7


def test_distances_are_those_on_foot(learned):
    s = torch.linspace(0, LENGTH, 60)
    on_foot = (s[:, None] - s).abs() / 0.5
    far = on_foot > 3
    assert learned.distance.isfinite().all()
    ratio = (learned.distance / on_foot)[far]
    assert ratio.quantile(0.05) > 0.6
    assert ratio.quantile(0.95) < 1.5
    # from one end to the other, node by node, the way goes round
    place, end = torch.as_tensor(on_the_way([0.2])) / 6, torch.as_tensor(on_the_way([12.8])) / 6
    visited = []
    while (node := int(learned.next_node(place, end))) >= 0 and len(visited) < 40:
        visited.append(node)
        place = learned.nodes[node][None]
    assert node == -1
    assert (np.diff(visited) > 0).all()
    assert len(visited) >= 5


def test_a_planner_with_a_roadmap_plans_to_its_waypoints(tmp_path, monkeypatch):
    settings = OmegaConf.to_container(compose("train", ["planner=hierarchical"]).planner, resolve=True)
    settings |= {"horizon": 4, "jump": 2, "points": 2, "roadmap": 20, "network": {"name": "mlp", "width": 16, "depth": 1}}
    settings["low"] = {"sampler": {"name": "ddim", "steps": 2}}
    spec = DataSpec(task="toy", observation_dim=4, action_dim=2, dt=0.1, goal_dim=2)
    torch.manual_seed(0)
    planner = HierarchicalDiffuser(spec, settings)
    observation = np.random.default_rng(0).uniform(-3, 5, (400, 4)).astype(np.float32)
    store = TrajectoryStore({"observation": observation, "action": observation[:, :2]}, np.arange(1, 11) * 40, {}, 0.1, "toy", {})
    planner.prepare(store)
    _, info = planner.loss(planner.windows(store, "cpu").gather(torch.arange(8)), torch.Generator().manual_seed(0))
    assert info["reach_loss"] > 0
    save_run(tmp_path / "run", planner)
    planner = load_run(tmp_path / "run", kind="planner")
    # the nodes are recorded places, in the task's units
    monkeypatch.setattr(planner.roadmap, "next_node", lambda here, there: torch.tensor([3, -1]))
    goals = np.array([[4.0, 4.0], [-2.0, 1.0]], np.float32)
    to = planner.waypoint(observation[:2], goals)
    recorded = observation[torch.linspace(0, 399, 20).long()[3], :2]
    np.testing.assert_allclose(to, [recorded, goals[1]], atol=1e-4)
    plan = planner.plan(observation[:2], goals, samples=2)
    at_arrival = np.take_along_axis(plan.observations, plan.arrivals[..., None, None], 2)[:, :, 0, :2]
    np.testing.assert_allclose(at_arrival, np.repeat(to[:, None], 2, 1), atol=1e-4)
    plan = planner.plan(observation[:2], goals, samples=2, roadmap=False)
    at_arrival = np.take_along_axis(plan.observations, plan.arrivals[..., None, None], 2)[:, :, 0, :2]
    np.testing.assert_allclose(at_arrival, np.repeat(goals[:, None], 2, 1), atol=1e-4)
    with pytest.raises(UserError, match="needs a task with goals"):
        HierarchicalDiffuser(DataSpec(task="toy", observation_dim=4, action_dim=2, dt=0.1), settings)
