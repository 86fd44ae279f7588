"""Fits beside the weights: made and used by the commands, refused in one line where they do not belong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

import offline
import planners
import robots
from offline.checkpoint import read_card, write_atomic
from offline.fitted import FITS, FOR_ONE_SAMPLER, KNOWN, MEASURED, OPTIONS, RECORDED, fitted_file, load_fitted, packed_fit
from pilotwave.cli import main
from pilotwave.config import compose
from pilotwave.errors import UserError
from planners.places import Places
from planners.tracking_margin import SHARE, UNMEASURED, tracking_margin

SAMPLER = {"name": "ddim", "steps": 3}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Walks in the maze's units, as D4RL keeps them."""
    path = tmp_path_factory.mktemp("data") / "walks.hdf5"
    steps = np.random.default_rng(0).normal(size=(6, 300, 4)).astype(np.float32)
    with h5py.File(path, "w") as file:
        file["observations"] = (0.05 * steps.cumsum(1)).reshape(-1, 4)
        file["actions"] = steps[..., :2].reshape(-1, 2)
        file["rewards"] = np.zeros(1800, np.float32)
        file["terminals"] = np.zeros(1800, bool)
        file["timeouts"] = np.arange(1, 1801) % 300 == 0
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory, data) -> Path:
    """A planner of pointmaze-umaze that has seen nothing but the data's spread, and everything fitted to it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = OmegaConf.to_container(compose("train", ["planner=diffuser"]).planner, resolve=True)
    config |= {"horizon": 8, "stride": 4, "network": {"name": "mlp", "width": 16, "depth": 1}, "sampler": SAMPLER}
    spec = robots.make("pointmaze-umaze").spec
    names = ("observation_dim", "action_dim", "dt", "goal_dim")
    torch.manual_seed(0)
    planner = planners.Diffuser(offline.DataSpec(spec.name, **{name: getattr(spec, name) for name in names}), config)
    planner.prepare(offline.read(data))
    torch.nn.init.normal_(planner.denoiser.network.out.weight, std=0.1)
    offline.save_run(folder, planner, config={"task_options": {"horizon": 40}})
    for what in FITS | RECORDED:
        words = [f"what={what}", f"data={data}", "samples=16", "sampler.steps=3", f"json={folder}/{what}.json"]
        assert main(["fit", str(folder), *words]) == 0
    for what in MEASURED:
        assert main(["fit", str(folder), f"what={what}", "episodes=2", f"json={folder}/{what}.json"]) == 0
    return folder


def sampler(what: str) -> dict:
    return {"name": what, "steps": 3, OPTIONS[what][0]: "fitted"} if what in OPTIONS else {**SAMPLER, "correction": what}


@pytest.mark.parametrize("what", FITS)
def test_what_was_fitted_is_used(run, what):
    """It changes the samples, and only by what its file says."""
    plain = {key: value for key, value in sampler(what).items() if value not in ("fitted", what) or key == "name"}
    planner = planners.load(run)
    draws = [
        planner.plan(np.zeros(4), np.ones(2), sampler=each, generator=torch.Generator().manual_seed(0)).observations
        for each in (plain, sampler(what), sampler(what))
    ]
    np.testing.assert_array_equal(draws[1], draws[2])
    assert np.abs(draws[0] - draws[1]).max() > 1e-6 or what == "time_shift"
    found = json.loads((run / f"{what}.json").read_text())
    assert Path(found["file"]).name.startswith(f"fitted_{what}")
    assert planner.table(sampler(what)) is planner.table(sampler(what))
    if what in ("dc", "alignment"):
        assert found["with"]["to_small_steps"] <= found["without"]["to_small_steps"] * 1.05
    if what == "epsilon_scaling":
        assert found["with"]["to_data"] <= found["without"]["to_data"] * 1.05


def test_rollout_takes_a_fitted_correction_and_one_in_numbers(run, tmp_path):
    words = ["episodes=1", "timing_decisions=0", "controller.samples=2", f"json={tmp_path}/out.json"]
    for asked in ("calibration", "{name: epsilon_scaling, offset: 1.01}", "[calibration, time_shift]"):
        assert main(["rollout", str(run), *words, f"sampler.correction={asked}"]) == 0
        assert json.loads((tmp_path / "out.json").read_text())["evaluations"] == 3
    assert main(["rollout", str(run), *words, "sampler=dpm_v3", "sampler.statistics=fitted", "sampler.steps=2"]) == 0


def test_the_same_command_fits_the_same(run, data, tmp_path):
    again = Path(shutil.copytree(run, tmp_path / "run"))
    for what in ("dpm_v3", "calibration"):
        assert main(["fit", str(again), f"what={what}", f"data={data}", "samples=16", "sampler.steps=3"]) == 0
        first, second = (load_file(folder / f"fitted_{what}.safetensors") for folder in (run, again))
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_an_exported_checkpoint_takes_its_fits_along(run, tmp_path):
    out = offline.export_checkpoint(run, tmp_path / "out")
    assert read_card(run)["sha256"] != read_card(out)["sha256"]
    for what in KNOWN:
        numbers = [load_fitted(planners.load(folder).origin, what, sampler(what)) for folder in (run, out)]
        assert all(torch.equal(numbers[0][key], numbers[1][key]) for key in numbers[0])


def test_places_are_the_cells_that_data_came_to(run, data):
    places, recorded = Places.beside(planners.load(run).origin), offline.read(data).columns["observation"][:, :2]
    assert places.seen.sum() <= len(recorded)
    assert (places.away(recorded) == 0).all()
    assert places.away(recorded.max(0) + 0.5) > 0.1
    assert Places.beside(None) is None


def test_the_margin_of_plans_is_what_robots_were_measured_to_stray(run, tmp_path):
    found = json.loads((run / "tracking.json").read_text())
    assert 0 < found["steps"] <= 2 * 40
    planner, spec = planners.load(run), robots.make("pointmaze-large-hazards").spec
    assert planner.controller(spec, safety="correct").planner.margin == round(found["metres"]["q70"], 2)
    assert planner.controller(spec, safety="correct", margin=0.3).planner.margin == 0.3
    straight = {"quantiles": torch.linspace(0, 1, 101, dtype=torch.float64)}
    origin = (Path(shutil.copytree(run, tmp_path / "run")), planner.origin[1])
    write_atomic(fitted_file(origin[0], "tracking", {}), packed_fit(origin[1], {}, straight))
    assert tracking_margin(origin) == SHARE
    fitted_file(origin[0], "tracking", {}).unlink()
    assert tracking_margin(origin) == tracking_margin(None) == UNMEASURED


def error(capsys, *words: str) -> str:
    capsys.readouterr()
    assert main(words) == 2
    message = capsys.readouterr().err.strip()
    assert "\n" not in message
    return message


def test_mistakes_end_in_one_line(run, data, tmp_path, capsys):
    fit = ["fit", str(run), "samples=4"]
    assert "did you mean 'calibration'" in error(capsys, *fit, "what=calibraton", f"data={data}")
    assert "no data given" in error(capsys, *fit, "what=calibration")
    assert "did you mean 'tracking'" in error(capsys, *fit, "what=trackin")
    assert "at least 1" in error(capsys, *fit, "what=tracking", "episodes=0")
    other = tmp_path / "other.hdf5"
    with h5py.File(other, "w") as file:
        file["observations"], file["actions"] = np.zeros((50, 3), np.float32), np.zeros((50, 2), np.float32)
        file["rewards"], file["terminals"] = np.zeros(50, np.float32), np.zeros(50, bool)
        file["timeouts"] = np.arange(50) == 49
    assert "has 3 observation and 2 action features" in error(capsys, *fit, "what=dc", f"data={other}")
    rollout = ["rollout", str(run), "episodes=1"]
    assert "did you mean 'calibration'" in error(capsys, *rollout, "sampler.correction=calibraton")
    assert "has no fitted_alignment_ddim_7.safetensors; fit it with" in error(
        capsys, *rollout, "sampler.correction=alignment", "sampler.steps=7"
    )


@pytest.mark.parametrize("what", KNOWN)
def test_fits_of_other_weights_or_samplers_are_refused(run, what, tmp_path):
    origin = (Path(shutil.copytree(run, tmp_path / "run")), planners.load(run).origin[1])
    with pytest.raises(UserError, match="was fitted to other weights"):
        load_fitted((origin[0], "0" * 64), what, sampler(what))
    if what in FOR_ONE_SAMPLER:
        with pytest.raises(UserError, match="was fitted for the sampler"):
            load_fitted(origin, what, {**sampler(what), "spacing": "quadratic"})
    file = next(origin[0].glob(f"fitted_{what}*.safetensors"))
    write_atomic(file, packed_fit(origin[1], sampler(what), {"ratios": torch.tensor([torch.nan])}))
    with pytest.raises(UserError, match="not finite"):
        load_fitted(origin, what, sampler(what))
    write_atomic(file, b"nothing")
    with pytest.raises(UserError, match="is corrupt"):
        load_fitted(origin, what, sampler(what))
    with pytest.raises(UserError, match="load a run or checkpoint"):
        load_fitted(None, what, sampler(what))
