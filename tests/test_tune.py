"""Tuned tables beside the weights: found and used by the commands, refused in one line where they do not belong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

import offline
import planners
import robots
from offline.checkpoint import read_card, write_atomic
from offline.tables import load_table, packed_table
from pilotwave.cli import main
from pilotwave.config import compose
from pilotwave.errors import UserError

SEARCH = ["episodes=1", "samples=8", "generations=1", "stages=1", "iterations=2", "controller.samples=2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """An untrained planner of pointmaze-umaze, and its tuned table of two evaluations."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = OmegaConf.to_container(compose("train", ["planner=diffuser"]).planner, resolve=True)
    config |= {"horizon": 8, "stride": 16, "network": {"name": "mlp", "width": 16, "depth": 1}}
    task = robots.make("pointmaze-umaze")
    names = ("task", "observation_dim", "action_dim", "dt", "goal_dim")
    torch.manual_seed(0)
    planner = planners.Diffuser(offline.DataSpec(task.spec.name, **{name: getattr(task.spec, name) for name in names[1:]}), config)
    offline.save_run(folder, planner, config={"task_options": {"horizon": 40}})
    assert main(["tune", str(folder), "evaluations=2", *SEARCH, f"json={folder}/tuned.json"]) == 0
    return folder


def copied(run: Path, to: Path) -> Path:
    return Path(shutil.copytree(run, to / "run"))


def test_rollout_uses_the_table_that_tune_has_found(run, tmp_path, capsys):
    found = json.loads((run / "tuned.json").read_text())
    assert found["errors"]["bespoke"] <= found["errors"]["hand-made"]
    assert set(found["held_out"]) == {"best_hand_made", "tuned", "own_ddim_8"}
    words = ["episodes=1", "timing_decisions=0", "sampler=tuned", "sampler.steps=2", f"json={tmp_path}/out.json"]
    assert main(["rollout", str(run), *words]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["evaluations"] == 2
    table = planners.load(run).table({"name": "tuned", "steps": 2})
    stored = load_file(run / "tuned_2.safetensors")
    assert [row.U_x for row in table.rows] == stored["a"].tolist()
    assert [row.t.item() for row in table.rows] == stored["t"][:-1].tolist()
    assert (table.rows[1].U_d, *table.rows[1].U) == (stored["b"][1, 1].item(), stored["b"][1, 0].item())


def test_the_same_command_finds_the_same_table(run, tmp_path):
    again = copied(run, tmp_path)
    assert main(["tune", str(again), "evaluations=2", *SEARCH]) == 0
    first, second = (load_file(folder / "tuned_2.safetensors") for folder in (run, again))
    assert all(torch.equal(first[key], second[key]) for key in ("t", "a", "b"))


def test_an_exported_checkpoint_takes_its_tables_along(run, tmp_path):
    out = offline.export_checkpoint(run, tmp_path / "out")
    tables = [planners.load(folder).table({"name": "tuned", "steps": 2}) for folder in (run, out)]
    assert read_card(run)["sha256"] != read_card(out)["sha256"]
    assert [row.U_x for row in tables[0].rows] == [row.U_x for row in tables[1].rows]


def error(capsys, *words: str) -> str:
    capsys.readouterr()
    assert main(words) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    return text


def test_what_cannot_be_used_ends_with_one_line(run, tmp_path, capsys):
    folder = copied(run, tmp_path)
    few = ["episodes=1", "timing_decisions=0", "sampler=tuned"]
    assert "no tuned table of 5 evaluations; it has sampler.steps=2; make it with" in error(capsys, "rollout", f"{folder}", *few)
    file = folder / "tuned_2.safetensors"
    table = planners.load(folder).table({"name": "tuned", "steps": 2})
    damages = {
        "found for other weights": packed_table(table, "0" * 64),
        "corrupt or no table": file.read_bytes()[:50],
        "holds no table of 2 evaluations": packed_table(planners.load(folder).table(), read_card(folder)["sha256"]),
    }
    for message, content in damages.items():
        write_atomic(file, content)
        assert message in error(capsys, "rollout", f"{folder}", *few, "sampler.steps=2")
    assert "takes no options but steps; got 'spacing'" in error(
        capsys, "rollout", f"{folder}", *few, "sampler.steps=2", "+sampler.spacing=karras"
    )


def test_tune_refuses_in_one_line_what_it_cannot_do(run, tmp_path, capsys):
    assert "at least 1" in error(capsys, "tune", f"{run}", "evaluations=0", *SEARCH)
    assert "did you mean 'evaluations'" in error(capsys, "tune", f"{run}", "evaluation=3")
    assert "no run" in error(capsys, "tune", f"{tmp_path}/nowhere")


def test_weights_that_were_not_loaded_have_no_tables(run):
    loaded = planners.load(run)
    fresh = planners.Diffuser(loaded.spec, loaded.config)
    with pytest.raises(UserError, match="beside saved weights"):
        fresh.table({"name": "tuned", "steps": 2})


SHIPPED = sorted((Path(__file__).resolve().parent.parent / "checkpoints").glob("*/tuned_*.safetensors"))


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_the_shipped_tables_belong_to_the_weights_beside_them(file):
    evaluations = int(file.stem.partition("_")[2])
    table = load_table(file.parent, read_card(file.parent)["sha256"], evaluations)
    assert (table.evaluations, table.stochastic) == (evaluations, False)
