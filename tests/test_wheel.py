"""The wheel, built and installed into an environment of its own, works from any folder, configurations included."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("pilotwave", "diffusion", "offline", "planners", "world_models", "policies", "robots", "configs")


def run(*words: object, cwd: Path) -> str:
    """Standard output of a command that must succeed, without anything of this checkout on its path."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(list(map(str, words)), cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that no build folder is left in the checkout or found there."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, folder / "source", cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The console script in a fresh environment; heavy dependencies come from this one by a path file, no network."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    purelib = run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=folder).strip()
    Path(purelib, "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    run(*pip, "install", "--quiet", "--no-index", "--no-deps", "--no-compile", wheel, cwd=folder)
    return folder / "venv" / "bin" / "pilotwave"


def test_every_module_and_data_file_is_in_the_wheel(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    for name in PACKAGES:
        for path in (ROOT / name).rglob("*"):
            if path.suffix in (".py", ".yaml", ".xml"):
                assert str(path.relative_to(ROOT)) in inside
    assert not [name for name in inside if name.split("/")[0] in ("tests", "benchmarks", "docs", "checkpoints")]


def test_it_lists_the_tasks_from_another_folder(installed, tmp_path):
    text = run(installed, "tasks", cwd=tmp_path)
    assert "task=pointmaze-large" in text
    where = run(installed.parent / "python", "-c", "import configs; print(configs.__file__)", cwd=tmp_path)
    assert not Path(where).is_relative_to(ROOT)
    assert Path(where).is_relative_to(installed.parent.parent)


def test_it_collects_trains_rolls_out_and_drives_from_another_folder(installed, tmp_path):
    task = "task=pointmaze-umaze"
    run(installed, "collect", task, "steps=2000", "out=data/umaze.hdf5", cwd=tmp_path)
    small = ["planner.horizon=8", "planner.network.width=16", "planner.network.depth=1", "planner.network.heads=2"]
    small += ["train.steps=3", "train.batch=8", "train.device=cpu"]
    where = ["data=data/umaze.hdf5", "out=runs/umaze"]
    run(installed, "train", "planner=diffuser", task, *where, *small, cwd=tmp_path)
    few = ["episodes=2", "horizon=20", "timing_decisions=1", "sampler=dpmpp_2m", "sampler.steps=3"]
    run(installed, "rollout", "runs/umaze", *few, "json=out.json", cwd=tmp_path)
    metrics = json.loads((tmp_path / "out.json").read_text())
    assert metrics["episodes"] == 2
    assert metrics["evaluations"] == 3
    drive = ["robot=mujoco", "policy=runs/umaze", "task.goal=chain", "seconds=0.5", "sampler.steps=1"]
    run(installed, "deploy", *drive, "json=drive.json", "video=drive.mp4", cwd=tmp_path)
    report = json.loads((tmp_path / "drive.json").read_text())
    assert (report["ended"], report["faults"], report["violations"]) == ("time", 0, 0)
    assert report["period_ms"]["p50"] > 0
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["data", "drive.json", "drive.mp4", "out.json", "runs"]
