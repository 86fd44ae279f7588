"""Resuming after any end (an interrupt, a kill) gives the weights of the run that never stopped, bit for bit."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from offline.checkpoint import load_state
from tests import tiny

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent


def start(out: Path, *, launcher: tuple[str, ...] = (), **settings) -> subprocess.Popen:
    command = [sys.executable, *launcher, "-m", "tests.tiny", str(out), *(f"{k}={v}" for k, v in settings.items())]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for_step(out: Path, step: int, process: subprocess.Popen) -> None:
    """Until a checkpoint at or after `step` is there."""
    while process.poll() is None:
        try:
            if json.loads((out / "train_state" / "state.json").read_text())["step"] >= step:
                return
        except FileNotFoundError:
            pass
        time.sleep(0.005)


def metrics(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines]  # all but the times


def assert_same(a: Path, b: Path) -> None:
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    state_a, state_b = load_state(a)[1], load_state(b)[1]
    assert state_a["step"] == state_b["step"]
    assert state_a["sha256"] == state_b["sha256"]  # moments and averages too
    assert metrics(a) == metrics(b)
    leftovers = [p for p in b.rglob("*") if p.name.endswith(".tmp")]
    assert not leftovers
    assert len(list((b / "train_state").iterdir())) == 2


def kill_and_resume(tmp_path: Path, kills: int, steps: int, seed: int) -> None:
    settings = {"steps": steps, "save_every": 7, "log_every": 10}
    whole, broken, rng = tmp_path / "whole", tmp_path / "broken", random.Random(seed)
    tiny.run(whole, **settings)
    reached, killed = 0, 0
    for _ in range(3 * kills):
        process = start(broken, **settings)
        wait_for_step(broken, min(reached + rng.randint(0, 2 * steps // (3 * kills)), steps - steps // 4), process)
        time.sleep(rng.uniform(0, 0.03))  # anywhere in a step, a write or a rename
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:  # on a busy machine the kill can come after the end: from the start again
            shutil.rmtree(broken)
        saved = load_state(broken)  # what is left is always whole
        reached, killed = (saved[1]["step"] if saved else 0), killed + (process.returncode == -signal.SIGKILL)
        if killed == kills:
            break
    assert killed == kills
    assert start(broken, **settings).wait() == 0
    assert_same(whole, broken)


def test_two_kills(tmp_path):
    kill_and_resume(tmp_path, kills=2, steps=400, seed=0)


@pytest.mark.slow
def test_ten_kills(tmp_path):
    kill_and_resume(tmp_path, kills=10, steps=2500, seed=1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_resume(tmp_path, number):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    settings = {"steps": 800, "save_every": 0, "log_every": 100}
    tiny.run(whole, **settings)
    process = start(broken, **settings)
    wait_for_step(broken, 0, process)
    time.sleep(0.1)
    process.send_signal(number)
    errors = process.communicate()[1]
    assert process.returncode == 128 + number, errors
    assert "Traceback" not in errors
    saved = load_state(broken)[1]["step"]
    assert 0 < saved < 800
    assert f"stopped at step {saved} of 800" in errors
    assert "resume" in errors
    tiny.run(broken, **settings)
    assert_same(whole, broken)


@pytest.mark.slow
def test_two_processes_train_one_model_and_resume_exactly(tmp_path):
    """Over gloo: one run directory, one way to stop, the same weights as without stopping."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    settings = {"steps": 300, "save_every": 10, "log_every": 100}
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    errors = start(whole, launcher=launcher, **settings).communicate()[1]
    assert load_state(whole)[1]["processes"] == 2, errors
    process = start(broken, launcher=launcher, **settings)
    wait_for_step(broken, 20, process)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate()[1]
    assert f"stopped at step {load_state(broken)[1]['step']} of 300" in errors
    assert start(broken, launcher=launcher, **settings).wait() == 0
    assert_same(whole, broken)
