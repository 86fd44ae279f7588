"""The command line: help, lists, composition by Hydra, and errors of one line."""

import errno
import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pilotwave import __version__
from pilotwave.cli import COMMANDS, main
from pilotwave.config import compose, groups
from pilotwave.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def error_of(capsys, *words: str) -> str:
    """The one line on standard error of a command that must fail."""
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("pilotwave: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_help_lists_every_command_and_each_has_its_own(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in COMMANDS:
        assert f"\n  {command} " in text
        assert main([command, "--help"]) == 0
        assert f"usage: pilotwave {command}" in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"pilotwave {__version__}\n"


def test_tasks_lists_every_option_of_every_group_and_what_it_is(capsys):
    assert main(["tasks"]) == 0
    text = capsys.readouterr().out
    for group, names in groups().items():
        for name in names:
            assert name == "none" or re.search(rf"\n {group}={re.escape(name)} +\w", text)


@pytest.mark.parametrize("words", [["--help"], ["tasks"], ["rollout", "nowhere"]])
def test_quick_answers_do_not_import_torch(words):
    code = (
        "import sys; from pilotwave.cli import main; main(sys.argv[1:]); "
        "assert not {'torch', 'mujoco', 'gymnasium'} & set(sys.modules), 'slow imports'"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    # processor time: a busy machine says nothing about us
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3


def test_a_reader_that_closes_the_pipe_is_no_error():
    command = f"{sys.executable} -m pilotwave tasks | head -n 1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr == ""


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("PILOTWAVE_DEBUG", "1")
    with pytest.raises(UserError):
        main(["taks"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["taks"], "did you mean 'tasks'?"),
        (["collect", "task=pointmaz-umaze"], "did you mean 'pointmaze-umaze'?"),
        (["collect", "task=pointmaze-umaze", "stps=4"], "did you mean 'steps'?"),
        (["collect", "task=pointmaze-umaze", "steps=abc"], "steps is 'abc'; it must be a whole number"),
        (["collect", "task=pointmaze-umaze", "steps=0"], "steps is 0; it must be at least 1"),
        (["collect", "task=pointmaze-umaze", "seed=-1"], "seed is -1; it must be at least 0"),
        (["collect", "task=nowhere.yaml"], "no settings file 'nowhere.yaml'"),
        (["collect", "--steps=4"], "steps=4"),
        (["collect", "steps"], "settings are written key=value"),
        (["collect", "steps=[1"], "cannot read 'steps=[1'"),
        (["collect"], "no task given"),
        (["train"], "exactly one of planner=NAME"),
        (["train", "planner.horizon=4"], "choose it first: planner=NAME"),
        (["train", "train.stps=4"], "did you mean 'train.steps'?"),
        (["train", "train.steps.more=4"], "goes below 'train.steps'"),
        (["train", "plugins=no_such_module_here"], "no module 'no_such_module_here'"),
        (["data"], "no data set given"),
        (["rollout"], "no run given"),
        (["rollout", "nowhere"], "no run 'nowhere'"),
        (["deploy"], "no policy given"),
        (["tasks", "more=1"], "takes no settings"),
    ],
)
def test_mistakes_get_one_line(capsys, words, expected):
    assert expected in error_of(capsys, *words)


def test_unwritable_folder(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot write into the folder" in error_of(
        capsys, "collect", "task=pointmaze-umaze", f"out={tmp_path}/file/out.hdf5"
    )


def test_a_run_is_named_when_another_stands_beside(capsys, tmp_path):
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "config.yaml").write_text("kind: planner\n")
    assert f"did you mean '{tmp_path}/large'?" in error_of(capsys, "rollout", f"{tmp_path}/larg")


def test_paths_are_taken_as_they_stand():
    config = compose("collect", ["task=pointmaze-umaze", "out=a folder/with=odd, (characters).hdf5"])
    assert config.out == "a folder/with=odd, (characters).hdf5"


def test_whole_numbers_may_be_written_as_floats():
    steps = compose("collect", ["task=pointmaze-umaze", "steps=1e6"]).steps
    assert steps == 1_000_000
    assert isinstance(steps, int)


def test_a_users_file_is_an_option_of_its_group(tmp_path):
    (tmp_path / "mine.yaml").write_text("planner: {name: mine, horizon: 8}\ntrain: {steps: 7}\n")
    (tmp_path / "maze.yaml").write_text("name: pointmaze-umaze\nextra: 3\n")
    config = compose("train", [f"planner={tmp_path}/mine.yaml", f"task={tmp_path}/maze.yaml", "planner.horizon=16"])
    assert (config.planner.name, config.planner.horizon, config.train.steps, config.task.extra) == ("mine", 16, 7, 3)
    assert config.train.batch == compose("train").train.batch


def test_what_is_put_on_the_command_line_is_above_the_algorithms_file(tmp_path):
    (tmp_path / "mine.yaml").write_text("planner: {name: mine}\ntrain: {steps: 7}\n")
    assert compose("train", ["train.steps=5", f"planner={tmp_path}/mine.yaml"]).train.steps == 5


def test_hydras_grammar_adds_and_deletes(tmp_path):
    (tmp_path / "mine.yaml").write_text("name: mine\nnetwork: {width: 8, depth: 2}\n")
    config = compose("train", [f"policy={tmp_path}/mine.yaml", "+policy.more=[1,2]", "~policy.network.depth"])
    assert config.policy == {"name": "mine", "network": {"width": 8}, "more": [1, 2]}


def test_every_packaged_algorithm_composes_with_every_task():
    for kind in ("planner", "policy", "world_model"):
        for name in groups()[kind]:
            for task in groups()["task"]:
                config = compose("train", [f"{kind}={name}", f"task={task}"])
                assert config[kind].name
                assert not [other for other in ("planner", "policy", "world_model") if other != kind and config[other]]


PLUGIN = '''
"""A planner of the user's: a straight line to the goal, learned speed."""
import numpy as np
import torch
from offline import Algorithm, Windows, register
from robots import Chunk, DirectTracker


class Towards:
    """Pushes towards the goal."""
    replan_every, history, evaluations, tracker = 1, 1, 0, DirectTracker()

    def __init__(self, gain):
        self.gain = gain

    def reset(self, n):
        pass

    def act(self, history, step):
        force = self.gain * (history["goal"][:, -1] - history["state"][:, -1, :2])
        return Chunk(np.clip(force, -1, 1)[:, None], dt=0.01)


@register
class Straight(Algorithm):
    kind, name = "planner", "straight"
    default_config = {"horizon": 4, "sampler": {"name": "none", "steps": 1}}

    def __init__(self, spec, config):
        super().__init__(spec, config)
        self.speed = torch.nn.Parameter(torch.ones(1))

    def prepare(self, store):
        pass

    def windows(self, store, device):
        return Windows(store, self.config["horizon"], columns=["observation"], device=device)

    def loss(self, batch, generator):
        loss = (batch["observation"][..., 2:].norm(dim=-1).mean() - self.speed).square().mean()
        return loss, {"loss": loss.detach()}

    def controller(self, task_spec, *, sampler=None, steps=None, gain=1.0):
        return Towards(gain * self.speed.item())
'''


def test_a_users_planner_trains_and_rolls_out_by_the_same_commands(tmp_path, monkeypatch, capsys):
    (tmp_path / "straight.py").write_text(PLUGIN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    plugin = "plugins=straight"
    assert main(["collect", "task=pointmaze-umaze", "steps=500", "out=data.hdf5"]) == 0
    training = ("task=pointmaze-umaze", "data=data.hdf5", "out=run", "train.steps=2", "train.batch=4", plugin)
    assert "did you mean 'straight'" in error_of(capsys, "train", "planner=strait", *training)
    assert main(["train", "planner=straight", "planner.horizon=6", *training]) == 0
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["algorithm"]["horizon"] == 6
    few = ("episodes=1", "horizon=5", "timing_decisions=1", "json=out.json", plugin)
    assert main(["rollout", "run", *few, "controller.gain=2.0"]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["evaluations"] == 0
    capsys.readouterr()
    assert "did you mean 'controller.gain'" in error_of(capsys, "rollout", "run", *few, "controller.gian=2.0")


def test_a_maze_of_the_users_own_stays_with_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zigzag.txt").write_text("######\n#OO###\n##OOG#\n######\n")
    small = ["planner.horizon=8", "planner.network.width=16", "planner.network.depth=1", "planner.network.heads=2"]
    assert main(["collect", "task=zigzag.txt", "steps=300", "out=data.hdf5"]) == 0
    assert "task=zigzag.txt" in capsys.readouterr().out
    training = ["task=zigzag.txt", "data=data.hdf5", "out=run", *small, "train.steps=1", "train.batch=2"]
    assert main(["train", "planner=diffuser", *training]) == 0
    (tmp_path / "zigzag.txt").unlink()
    few = ["episodes=1", "horizon=5", "timing_decisions=0", "sampler.steps=1", "json=out.json"]
    assert main(["rollout", "run", "task.goal=fixed", *few]) == 0
    metrics = json.loads((tmp_path / "out.json").read_text())
    assert metrics["task_options"]["maze"][2] == "##OOG#"
    assert (metrics["task_options"]["goal"], metrics["evaluations"]) == ("fixed", 1)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "runs/a/model"), "runs/a/model: the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "out.json"), "out.json: no permission"),
        (MemoryError(), "out of memory"),
    ],
)
def test_the_systems_own_errors_get_one_line(capsys, monkeypatch, error, expected):
    def fail(overrides):
        raise error

    monkeypatch.setattr("pilotwave.commands.tasks.run", fail)
    assert expected in error_of(capsys, "tasks")


def test_a_runs_own_file_imports_nothing(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(
        "kind: planner\nname: os_system\nplugins: [os]\ntask: pointmaze-umaze\ntask_options: {}\n"
        "algorithm: {_target_: os.system}\nspec: {task: pointmaze-umaze, observation_dim: 4, action_dim: 2, dt: 0.01}\n"
    )
    assert "unknown planner 'os_system'" in error_of(capsys, "rollout", f"{tmp_path}/run")


def test_the_configurations_name_what_the_packages_have():
    import diffusion
    import offline
    import robots

    assert set(groups()["sampler"]) - {"tuned"} == set(diffusion.solvers())
    assert set(groups()["task"]) - {"none"} == set(robots.task_names())
    fields = set(offline.TrainConfig.__dataclass_fields__)
    assert set(compose("train").train) == fields - {"seed"}
