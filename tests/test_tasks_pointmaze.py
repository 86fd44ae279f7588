"""PointMaze: the dynamics are gymnasium-robotics', the frame D4RL's; resets, goals, maps, pictures."""

from __future__ import annotations

import numpy as np
import pytest

import robots
from pilotwave.errors import UserError
from robots.tasks.maps import MAPS, maze_map
from robots.tasks.pointmaze import PointMaze, cell_of


@pytest.mark.parametrize("name", ["umaze", "medium", "large"])
def test_dynamics_equal_gymnasium_robotics(name):
    """The same state and action give the same next state, along bumping paths, in the other's frame."""
    from gymnasium_robotics.envs.maze.point_maze import PointMazeEnv

    task = robots.make(f"pointmaze-{name}")
    rows = task.maze.walls.astype(int).tolist()
    env = PointMazeEnv(maze_map=rows)
    env.reset(seed=0)
    height, width = task.maze.walls.shape
    n, rng = 6, np.random.default_rng(0)
    state = task.reset(range(n))["state"]
    push = rng.uniform(-1, 1, (n, 2))
    touched = 0
    for step in range(60):
        if step % 15 == 0:
            push = rng.uniform(-1, 1, (n, 2)) * 2
        before = task.snapshot()[0][:, 1:]
        task.step(push)
        after = task.snapshot()[0][:, 1:]
        for i in range(n):
            x, y, vx, vy = before[i]
            env.point_env.set_state(np.array([y + 0.7 - width / 2, height / 2 - 0.7 - x]), np.array([vy, -vx]))
            obs = env.point_env.step(np.array([push[i, 1], -push[i, 0]]))[0]
            theirs = [height / 2 - 0.7 - obs[1], obs[0] - 0.7 + width / 2, -obs[3], obs[2]]
            np.testing.assert_allclose(after[i], theirs, atol=1e-6)
            touched += sum(env.point_env.data.contact.geom2 != 0) > 0
    assert touched > 20  # walls were met, not only open floor
    assert state.dtype == np.float32


def test_reset_distribution_and_independence_of_the_batch():
    task = robots.make("pointmaze-large")
    obs = task.reset(range(600))
    start, goal = obs["state"][:, :2], obs["goal"]
    cells, goals = np.rint(start).astype(int), np.rint(goal).astype(int)
    assert np.abs(start - cells).max() <= 0.1 + 1e-6
    assert np.abs(goal - goals).max() <= 0.1 + 1e-6
    assert not task.maze.walls[tuple(cells.T)].any()
    assert not task.maze.walls[tuple(goals.T)].any()
    assert (cells != goals).any(axis=1).all()
    assert len(np.unique(cells, axis=0)) == len(task.maze.cells)
    assert 0.05 < obs["state"][:, 2:].std() < 0.15
    alone = task.reset([117])
    np.testing.assert_array_equal(alone["state"][0], obs["state"][117])
    np.testing.assert_array_equal(alone["goal"][0], obs["goal"][117])


@pytest.mark.parametrize(
    ("name", "goal", "horizon", "reference"),
    [
        ("umaze", (1, 1), 300, (23.85, 161.86)),
        ("medium", (6, 6), 600, (13.13, 277.39)),
        ("large", (7, 9), 800, (6.7, 273.99)),
        ("giant", (10, 14), 1300, None),
    ],
)
def test_d4rl_facts(name, goal, horizon, reference):
    task = robots.make(f"pointmaze-{name}", goal="fixed")
    np.testing.assert_array_equal(task.reset([0, 1])["goal"], [goal, goal])
    assert task.spec.horizon == horizon
    assert task.spec.reference == reference
    assert robots.make(f"pointmaze-{name}").spec.reference is None  # normalization is for the fixed goal alone


def test_reward_and_success_are_half_a_cell():
    task = robots.make("pointmaze-large")
    task.reset_to(np.array([[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]]), np.array([[1, 1.49], [1, 1.51], [1.3, 1.3]]))
    obs, reward, terminated, info = task.step(np.zeros((3, 2)))
    np.testing.assert_array_equal(reward, [1, 0, 1])
    np.testing.assert_array_equal(info["success"], [True, False, True])
    assert not terminated.any()
    assert obs["goal"].shape == (3, 2)


def test_velocity_and_action_limits():
    task = robots.make("pointmaze", maze=["#" * 30, "#" + "O" * 28 + "#", "#" * 30])
    task.reset_to(np.array([[1, 1, 0, 0]] * 2), np.ones((2, 2)))
    speeds = []
    for _ in range(60):
        obs = task.step(np.array([[0, 1.0], [0, 50.0]]))[0]
        speeds.append(obs["state"][:, 3])
    np.testing.assert_array_equal(obs["state"][0], obs["state"][1])
    # D4RL's data has this same maximum: a clipped 5 plus one step of full force
    assert np.max(speeds) == pytest.approx(5.2262554, abs=1e-5)


def test_chain_gives_a_new_goal_elsewhere_and_counts():
    task = robots.make("pointmaze-umaze", goal="chain")
    task.reset([0, 1])
    task.reset_to(np.array([[1, 1, 0, 0], [3, 3, 0, 0]]), np.array([[1, 1.0], [1, 1.0]]))
    obs, reward, _, info = task.step(np.zeros((2, 2)))
    np.testing.assert_array_equal(reward, [1, 0])
    np.testing.assert_array_equal(info["new_goal"], [True, False])
    np.testing.assert_array_equal(info["goals_reached"], [1, 0])
    assert tuple(np.rint(obs["goal"][0])) != (1, 1)
    np.testing.assert_array_equal(obs["goal"][1], [1, 1])


def test_snapshot_gives_the_same_future_goals_included():
    task = robots.make("pointmaze-umaze", goal="chain")
    task.reset(range(8))
    actions = np.random.default_rng(0).uniform(-1, 1, (250, 8, 2))
    for action in actions[:50]:
        task.step(action)
    kept = task.snapshot()
    first = [task.step(action) for action in actions[50:]]
    task.restore(kept)
    second = [task.step(action) for action in actions[50:]]
    for (obs, reward, *_), (obs2, reward2, *_) in zip(first, second):
        np.testing.assert_array_equal(obs["state"], obs2["state"])
        np.testing.assert_array_equal(obs["goal"], obs2["goal"])
        np.testing.assert_array_equal(reward, reward2)
    counts, counts2 = first[-1][3]["goals_reached"], second[-1][3]["goals_reached"]
    assert counts.sum() > 0
    np.testing.assert_array_equal(counts, counts2)


def test_the_ball_stays_in_empty_cells():
    task = robots.make("pointmaze-large")
    task.reset(range(50))
    rng = np.random.default_rng(0)
    for _ in range(20):
        push = rng.uniform(-3, 3, (50, 2))
        for _ in range(15):
            state = task.step(push)[0]["state"]
        assert not task.maze.walls[tuple(cell_of(state[:, :2]).T)].any()


@pytest.mark.parametrize(
    ("actions", "message"),
    [(np.zeros((3, 2)), "shape"), (np.zeros((2, 3)), "shape"), (np.full((2, 2), np.nan), "finite")],
)
def test_wrong_actions_are_named(actions, message):
    task = robots.make("pointmaze-umaze")
    task.reset([0, 1])
    with pytest.raises(UserError, match=message):
        task.step(actions)


def test_unknown_names_and_options_are_named():
    with pytest.raises(UserError, match="pointmaze-large"):
        robots.make("pointmaze-larg")
    with pytest.raises(UserError, match="goal"):
        robots.make("pointmaze-large", gaol="fixed")
    with pytest.raises(UserError, match="random"):
        robots.make("pointmaze-large", goal="randon")
    with pytest.raises(UserError, match="needs a maze"):
        robots.make("pointmaze")
    with pytest.raises(UserError, match="horizon -5"):
        robots.make("pointmaze-large", horizon=-5)


def test_maps_of_every_form_are_the_same_maze(tmp_path):
    rows = ["######", "#OOG##", "##O#O#", "#OOOO#", "######"]
    (tmp_path / "mine.txt").write_text("\n".join(row.replace("O", " ") for row in rows) + "\n")
    (tmp_path / "mine.yaml").write_text("horizon: 77\nmaze:\n" + "".join(f"  - '{row}'\n" for row in rows))
    lists = [[1 if tile == "#" else "G" if tile == "G" else 0 for tile in row] for row in rows]
    tasks = [robots.make("pointmaze", maze=maze) for maze in (rows, lists)]
    tasks += [robots.make(str(tmp_path / "mine.txt")), robots.make(str(tmp_path / "mine.yaml"))]
    for task in tasks:
        assert task.maze.rows() == rows
        assert task.maze.goal == (1, 3)
        assert task.spec.name == "pointmaze"
    assert [task.spec.horizon for task in tasks] == [300, 300, 300, 77]
    again = robots.make(tasks[3].spec.name, **tasks[3].spec.options)
    assert again.maze.rows() == rows
    assert again.spec.horizon == 77
    obs = tasks[0].reset([5])
    np.testing.assert_array_equal(tasks[2].reset([5])["state"], obs["state"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        (["####", "#OO#", "###"], "row 3 has 3"),
        (["####", "#OX#", "####"], "'X' in row 2"),
        (["####", "#OOO", "####"], "border"),
        (["####", "#O##", "####"], "1 empty"),
        (["#####", "#O#O#", "#####"], "connected"),
        (["#####", "#GOG#", "#####"], "2 goals"),
        ([1, 2], "no rows"),
    ],
)
def test_bad_maps_are_named(rows, message):
    with pytest.raises(UserError, match=message):
        PointMaze(maze=rows)


def test_bad_map_files_are_named(tmp_path):
    (tmp_path / "empty.yaml").write_text("walls: 3\n")
    (tmp_path / "bad.yaml").write_text("maze: [}\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    cases = {"missing.txt": "No such file", "empty.yaml": "no 'maze'", "bad.yaml": "YAML", "binary.txt": "not a text"}
    for name, message in cases.items():
        with pytest.raises(UserError, match=message):
            robots.make(str(tmp_path / name))
    with pytest.raises(UserError, match="did you mean 'large'"):
        PointMaze(maze="largo")


def test_shortest_paths():
    for name in MAPS:
        maze = maze_map(name)
        cell = np.zeros(len(maze.cells), dtype=int)
        goal = np.arange(len(maze.cells))
        for _ in range(int(maze.distance[0].max())):
            after = maze.next_cell[cell, goal]
            assert (np.abs(maze.cells[after] - maze.cells[cell]).sum(axis=1) == (cell != goal)).all()
            cell = after
        np.testing.assert_array_equal(cell, goal)


def test_top_view_draws_ball_and_goal_where_they_are():
    task = robots.make("pointmaze-large")
    obs = task.reset([3])
    picture = task.render()
    assert picture.dtype == np.uint8
    assert picture.shape[2] == 3
    for point, colour in ((obs["state"][:, :2], (40, 110, 220)), (obs["goal"], (214, 60, 50))):
        column, row = np.rint(task.to_pixels(point)[0]).astype(int)
        np.testing.assert_array_equal(picture[row, column], colour)
    # the corner cell is a wall, and an empty cell's middle lies 0.2 before its position
    np.testing.assert_array_equal(picture[2, 2], (96, 104, 120))
    np.testing.assert_allclose(task.to_pixels(np.array([[0.8, 0.8]]))[0], [1.5 * 40, 1.5 * 40])
