"""`dream`: the same actions at the same time in simulator and model, errors as documented, pictures, and the command."""

import json

import numpy as np
import pytest

import offline
import robots
import world_models
from offline import TrajectoryStore
from pilotwave import cli
from pilotwave.errors import UserError
from robots.collect import collect, demonstrator
from robots.controller import Chunk
from robots.tasks import pusht
from world_models.dream import below_from


class Perfect:
    """A world model that is the simulator, started where it is told; `wrong` is added to what it imagines."""

    name, h, T, evaluations = "perfect", 1, 1, 1

    def __init__(self, task, wrong=0.0):
        import torch

        self.task, self.wrong, self.spec = robots.make(task), wrong, robots.make(task).spec
        self.spec = offline.DataSpec(task, self.spec.observation_dim, self.spec.action_dim, self.spec.dt)
        self.deviation = torch.full((self.spec.observation_dim,), 2.0)
        self.reward_deviation = torch.tensor(0.5)

    def rollout(self, observation, actions, past_actions=None, *, seed=0):
        self.task.reset_recorded({"observation": observation[:, -1]})
        states = np.stack([self.task.step(actions[:, t])[0]["state"] for t in range(actions.shape[1])], 1)
        rewards = self.task.rewards(states.reshape(-1, states.shape[-1])).reshape(states.shape[:2])
        return states + self.wrong, rewards + self.wrong


@pytest.fixture(scope="module")
def maze():
    return robots.make("pointmaze-umaze")


def test_the_simulator_itself_makes_no_error(maze):
    metrics = world_models.dream(Perfect("pointmaze-umaze"), maze, 6, 40, actions=demonstrator(maze, 3))
    # the start is rounded to float32 on its way
    assert max(metrics["state_error"]) < 1e-4
    assert max(metrics["reward_error"]) == 0
    assert metrics["diverged_rate"] == 0
    assert len(metrics["state_error"]) == len(metrics["reward_error"]) == 40
    assert metrics["steps_per_second"] > 0


def test_errors_are_in_deviations_of_the_data(maze):
    right, wrong = Perfect("pointmaze-umaze"), Perfect("pointmaze-umaze", wrong=0.5)
    metrics = world_models.dream(wrong, maze, 4, 10, actions=demonstrator(maze, 3), baseline=right)
    np.testing.assert_allclose(metrics["state_error"], 0.25, rtol=1e-4)
    np.testing.assert_allclose(metrics["reward_error"], 1.0, rtol=1e-6)
    assert max(metrics["baseline"]["state_error"]) < 1e-4
    assert metrics["below_baseline_from"] is None
    wrong.wrong = 2.5
    assert world_models.dream(wrong, maze, 4, 10, actions=demonstrator(maze, 3))["diverged_rate"] == 1


def test_below_from():
    assert below_from([3, 1, 1], [2, 2, 2]) == 2
    assert below_from([1, 1, 1], [2, 2, 2]) == 1
    assert below_from([1, 1, 3], [2, 2, 2]) is None
    assert below_from([1, None, 1], [2, None, 2]) == 1


def test_an_episode_counts_until_it_ends(maze):
    class Ending:
        """One feature that counts steps; the first copy ends after step 3."""

        spec = robots.TaskSpec(
            "count", 1, 1, 10, 0.1, -np.ones(1), np.ones(1), ("n",), ("a",), score="success_rate", source=""
        )

        def reset(self, seeds):
            self.n = 0
            return {"state": np.zeros((len(seeds), 1), np.float32)}

        def step(self, actions):
            self.n += 1
            state = np.full((len(actions), 1), self.n, np.float32)
            return {"state": state}, state[:, 0], np.array([self.n >= 3, False]), {}

        def rewards(self, states):
            return None

    class Still:
        replan_every, history, evaluations, tracker = 1, 1, 0, robots.DirectTracker()

        def reset(self, n):
            self.n = n

        def act(self, history, step):
            return Chunk(np.full((self.n, 1, 1), step / 10), 0.1)

    recording = world_models.record(Ending(), Still(), 2, 4, lead=1)
    assert recording.lead[0, :, 0].tolist() == [0, 1]
    assert recording.observations[0, :, 0].tolist() == [2, 3, 4, 5]
    np.testing.assert_allclose(recording.lead_actions[0, :, 0], [0.0])
    np.testing.assert_allclose(recording.actions[0, :, 0], [0.1, 0.2, 0.3, 0.4])
    assert recording.valid.tolist() == [[True, True, False, False], [True] * 4]
    assert recording.rewards[1].tolist() == [2, 3, 4, 5]


def test_recorded_episodes_play_back(tmp_path):
    collect("pointmaze-umaze", 1200, tmp_path / "maze.hdf5", seed=5)
    store = offline.read(tmp_path / "maze.hdf5")
    task = robots.make("pointmaze-umaze")
    recording = world_models.replay(task, store, 5, 60, seed=1, lead=3)
    assert recording.lead.shape[1] >= 3
    rows = {tuple(o.round(4)): i for i, o in enumerate(store.columns["observation"])}
    for i in range(5):
        start = rows[tuple(recording.lead[i, -1].round(4))]
        np.testing.assert_allclose(recording.observations[i], store.columns["observation"][start + 1 : start + 61], atol=1e-3)
        np.testing.assert_allclose(recording.rewards[i], store.columns["reward"][start : start + 60])
    short = world_models.replay(task, store.select([0]), 2, 400, lead=1)
    assert short.actions.shape == (2, 400, 2)
    assert (short.actions[:, -50:] == short.actions[:, -1:]).all()


def test_pusht_rewards_and_poses_are_the_simulators():
    task = robots.make("pusht")
    task.reset(range(12))
    # goal, nearly, and whatever the resets gave
    states = np.array([[100, 100, 256, 256, np.pi / 4], [100, 100, 262, 250, 0.9]])
    for n, begin in ((12, None), (2, states)):
        if begin is not None:
            task.reset_to(begin)
        observation, reward, _, info = task.step(np.full((n, 2), 120.0))
        np.testing.assert_allclose(task.rewards(observation["state"]), reward, atol=1e-5)
        fitted = pusht.poses(observation["state"][:, 2:].reshape(n, 9, 2))
        np.testing.assert_allclose(fitted[:, :2], info["pose"][:, :2], atol=1e-3)
        np.testing.assert_allclose(np.exp(1j * fitted[:, 2]), np.exp(1j * info["pose"][:, 2]), atol=1e-5)
    assert reward.max() > 0.8
    assert robots.make("pusht-image").rewards(np.zeros((1, 2))) is None


def test_pictures_of_imagined_states():
    task = robots.make("pusht")
    state = task.reset([3])["state"][0]
    picture = task.draw(state)
    assert picture.shape == (512, 512, 3)
    moved = state.copy()
    moved[2::2] += 40
    assert (task.draw(moved) != picture).any()
    maze = robots.make("pointmaze-umaze")
    assert maze.draw(np.array([1.0, 1.0, 0, 0])).std() > 0


def write_pusht(path, episodes=4, steps=14):
    """A few steps of the simulator in Diffusion Policy's format."""
    import zarr

    task = robots.make("pusht")
    rng = np.random.default_rng(0)
    parts = {"state": [], "keypoint": [], "action": []}
    for i in range(episodes):
        observed = task.reset([i])["state"]
        pose = pusht.poses(observed[:, 2:].reshape(1, 9, 2))
        for _ in range(steps):
            action = (observed[:, :2] + rng.uniform(-60, 60, 2)).clip(0, 512)
            parts["state"].append(np.concatenate([observed[0, :2], pose[0]]))
            parts["keypoint"].append(observed[0, 2:].reshape(9, 2))
            parts["action"].append(action[0])
            result = task.step(action)
            observed, pose = result[0]["state"], result[3]["pose"]
    root = zarr.open_group(str(path), mode="w")
    for name, rows in parts.items():
        root.create_array(f"data/{name}", data=np.array(rows, np.float32))
    root.create_array("meta/episode_ends", data=np.arange(1, episodes + 1) * steps)


SMALL = ["train.steps=30", "train.batch=16", "train.device=cpu", "train.save_every=0"]
NETWORK = ["world_model.network.width=32", "world_model.network.depth=1"]


def test_the_commands_on_a_maze(tmp_path, capsys):
    collect("pointmaze-umaze", 2000, tmp_path / "maze.hdf5", seed=0)
    for name, more in (("diffusion_world_model", ["world_model.horizon=8"]), ("one_step", [])):
        settings = [f"world_model={name}", "task=pointmaze-umaze", f"data={tmp_path}/maze.hdf5", f"out={tmp_path}/{name}"]
        assert cli.main(["train", *settings, *SMALL, *NETWORK, *more]) == 0
    files = [f"json={tmp_path}/out.json", f"plot={tmp_path}/plot.png", f"video={tmp_path}/video.mp4"]
    run = f"{tmp_path}/diffusion_world_model"
    words = ["dream", run, "episodes=3", "horizon=20", "device=cpu", "sampler.steps=2", f"baseline={tmp_path}/one_step"]
    assert cli.main([*words, *files]) == 0
    metrics = json.loads((tmp_path / "out.json").read_text())
    assert len(metrics["state_error"]) == len(metrics["reward_error"]) == 20
    assert metrics["episodes"] == 3
    assert metrics["evaluations"] == 2
    assert metrics["actions"] == "demonstrator"
    assert 0 <= metrics["diverged_rate"] <= 1
    assert len(metrics["baseline"]["state_error"]) == 20
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "video.mp4").stat().st_size > 1000
    # the same again, word for word
    assert cli.main([*words, f"json={tmp_path}/again.json"]) == 0
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["state_error"] == metrics["state_error"]
    capsys.readouterr()
    assert cli.main(["dream", f"{tmp_path}/one_step", "sampler.steps=3"]) == 2
    assert "no sampler" in capsys.readouterr().err


def test_the_commands_on_recorded_pusht(tmp_path, capsys):
    write_pusht(tmp_path / "data.zarr")
    run = f"{tmp_path}/run"
    settings = ["world_model=one_step", "task=pusht", f"data={tmp_path}/data.zarr", f"out={run}", "train.held_out=1"]
    assert cli.main(["train", *settings, *SMALL, *NETWORK]) == 0
    assert cli.main(["dream", run, "episodes=2", "horizon=6", "device=cpu", f"json={tmp_path}/out.json"]) == 0
    metrics = json.loads((tmp_path / "out.json").read_text())
    # the data has no rewards; the task's own were learnt
    assert len(metrics["reward_error"]) == 6
    assert metrics["actions"].startswith("recorded")
    (tmp_path / "data.zarr").rename(tmp_path / "gone.zarr")
    capsys.readouterr()
    assert cli.main(["dream", run, "episodes=2", "horizon=6", "device=cpu"]) == 2
    assert "add data=PATH" in capsys.readouterr().err


def test_only_held_out_episodes_are_played_back(tmp_path):
    from pilotwave.commands.dream import held_out

    write_pusht(tmp_path / "data.zarr")
    trained = {"data": str(tmp_path / "data.zarr"), "train": {"held_out": 1, "seed": 0}}
    store = offline.read(tmp_path / "data.zarr", images=False)
    kept = held_out(str(tmp_path / "data.zarr"), trained)
    assert kept.episodes == 1
    np.testing.assert_array_equal(kept.columns["action"], store.split(1, 0)[1].columns["action"])
    assert held_out(str(tmp_path / "data.zarr"), {**trained, "data": "elsewhere/data.zarr"}).episodes == kept.episodes
    assert held_out(str(tmp_path / "data.zarr"), {**trained, "data": "other.zarr"}).episodes == store.episodes


def test_a_model_of_another_task_is_refused():
    with pytest.raises(UserError, match="cannot dream of pusht"):
        world_models.dream(Perfect("pointmaze-umaze"), robots.make("pusht"), 1, 5, actions=TrajectoryStore({}, np.zeros(0)))


def test_recorded_states_need_a_task_that_takes_them():
    with pytest.raises(UserError, match="cannot be set to recorded states"):
        robots.make("adroit-door").reset_recorded({})
