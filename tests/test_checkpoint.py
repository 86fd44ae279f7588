"""Run directories: what is written comes back, and whatever is wrong with one is named in one line."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil

import pytest
import safetensors.torch
import torch
import yaml

import offline.checkpoint as checkpoint
from offline.algorithm import DataSpec, algorithms, build, register
from offline.checkpoint import export_checkpoint, load_run, load_state, save_run, save_state, update_card, write_atomic
from pilotwave.errors import UserError
from tests import tiny


@pytest.fixture
def algorithm():
    return build("planner", "tiny", tiny.SPEC, tiny.CONFIG, seed=1)


@pytest.fixture
def run(tmp_path, algorithm):
    algorithm.prepare(tiny.walks())
    averages = {name: p.detach() + 1 for name, p in algorithm.named_parameters()}
    save_run(tmp_path / "run", algorithm, averages, config={"data": "walks"}, card={"command": "x", "scores": {"a": 1}})
    return tmp_path / "run"


def test_weights_and_averages_come_back(run, algorithm):
    own, plain, averaged = algorithm.state_dict(), load_run(run, ema=False), load_run(run)
    assert not averaged.training
    assert averaged.spec == tiny.SPEC
    assert averaged.config == tiny.CONFIG
    for key, value in own.items():
        assert torch.equal(plain.state_dict()[key], value)
        shift = 0 if key.startswith("normalizer.") else 1  # a buffer has no average
        assert torch.equal(averaged.state_dict()[key], value + shift)


def test_building_depends_on_the_seed_alone():
    before = torch.random.get_rng_state()
    first, second, other = (build("planner", "tiny", tiny.SPEC, tiny.CONFIG, seed=s) for s in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.network[0].weight, second.network[0].weight)
    assert not torch.equal(first.network[0].weight, other.network[0].weight)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_export_is_small_and_loads_in_float32(run, tmp_path, algorithm, dtype):
    out = export_checkpoint(run, tmp_path / "small", dtype=dtype, scores={"score_mean": 0.5})
    stored = safetensors.torch.load_file(out / "model.safetensors")
    assert all(key.startswith("ema.") for key in stored)
    loaded, full = load_run(out).state_dict(), load_run(run).state_dict()
    key = next(key for key in full if key.endswith("scale"))
    assert torch.equal(loaded[key], full[key])  # the normalizer is never rounded
    for key, value in full.items():
        assert loaded[key].dtype == algorithm.state_dict()[key].dtype
        tolerance = {"float32": 0, "float16": 1e-3, "bfloat16": 8e-3}[dtype]
        torch.testing.assert_close(loaded[key], value, rtol=tolerance, atol=0)
    assert json.loads((out / "card.json").read_text())["scores"] == {"score_mean": 0.5}
    assert (out / "model.safetensors").stat().st_size < (run / "model.safetensors").stat().st_size
    with pytest.raises(UserError, match="only the averaged weights"):
        load_run(out, ema=False)


def test_export_refuses_what_does_not_fit(run, tmp_path, algorithm):
    with torch.no_grad():
        algorithm.network[0].weight[0, 0] = 1e6
    save_run(run, algorithm)
    with pytest.raises(UserError, match="does not fit into float16"):
        export_checkpoint(run, tmp_path / "small")
    with pytest.raises(UserError, match="did you mean 'float16'"):
        export_checkpoint(run, tmp_path / "small", dtype="float61")
    with pytest.raises(UserError, match="the run itself"):
        export_checkpoint(run, run)


def test_a_card_can_be_added_to(run):
    update_card(run, scores={"success_rate": 0.98})
    assert json.loads((run / "card.json").read_text())["scores"] == {"success_rate": 0.98}
    assert "success rate: 0.98" in (run / "card.md").read_text()
    load_run(run)


def test_tampered(run):
    content = bytearray((run / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (run / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="does not match the sha256"):
        load_run(run)


def test_truncated_with_a_matching_checksum(run):
    content = (run / "model.safetensors").read_bytes()[:-40]
    (run / "model.safetensors").write_bytes(content)
    update_card(run, sha256=checkpoint.hashlib.sha256(content).hexdigest())
    with pytest.raises(UserError, match="corrupt or truncated"):
        load_run(run)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("write", [pickle.dumps, "torch"])
def test_pickles_are_refused(run, tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    if write == "torch":
        torch.save({"x": Bomb()}, run / "model.safetensors")
    else:
        (run / "model.safetensors").write_bytes(write(Bomb()))
    content = (run / "model.safetensors").read_bytes()
    update_card(run, sha256=checkpoint.hashlib.sha256(content).hexdigest())
    with pytest.raises(UserError, match="is a pickle"):
        load_run(run)
    shutil.copy(run / "model.safetensors", tmp_path / "model.pt")
    with pytest.raises(UserError, match="is a pickle"):
        load_run(tmp_path / "model.pt")
    (tmp_path / "theirs").mkdir()
    shutil.copy(run / "model.safetensors", tmp_path / "theirs" / "last.ckpt")
    with pytest.raises(UserError, match=r"last\.ckpt is a pickle"):
        load_run(tmp_path / "theirs")
    assert not (tmp_path / "exploded").exists()


def test_yaml_cannot_run_code(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (run / "config.yaml").write_text("kind: !!python/object/apply:os.mkdir [exploded]\n")
    with pytest.raises(UserError, match="not plain YAML"):
        load_run(run)
    assert not (tmp_path / "exploded").exists()


@register
class OtherKind(tiny.TinyDenoiser):
    kind, name = "policy", "tiny-policy"


def test_another_kind_or_task(run, tmp_path):
    with pytest.raises(UserError, match=r"is a planner \('tiny'\), not a policy; load it with planners.load"):
        load_run(run, kind="policy")
    with pytest.raises(UserError, match="trained for task 'random-walk', not 'pusht'"):
        load_run(run, task="pusht")
    save_run(tmp_path / "policy", build("policy", "tiny-policy", tiny.SPEC, tiny.CONFIG))
    with pytest.raises(UserError, match=r"load it with policies.load"):
        load_run(tmp_path / "policy", kind="planner")
    assert "tiny-policy" not in algorithms("planner")


def change(run, **changes):
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**config, **changes}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: change(run, name="tinny"), "unknown planner 'tinny'; did you mean 'tiny'"),
        (lambda run: change(run, kind="planer"), "unknown kind of algorithm 'planer'; did you mean 'planner'"),
        (lambda run: change(run, algorithm={**tiny.CONFIG, "width": 64}), "has shape .* the configuration says"),
        (lambda run: change(run, spec={"task": "x"}), "lacks observation_dim"),
        (lambda run: change(run, spec={**tiny.SPEC.to_dict(), "actoin_dim": 2}), "did you mean 'action_dim'"),
        (lambda run: (run / "config.yaml").write_text("- 1"), "lacks kind, name"),
        (lambda run: (run / "config.yaml").unlink(), "lacks config.yaml"),
        (lambda run: (run / "model.safetensors").unlink(), "lacks model.safetensors"),
        (lambda run: (run / "card.json").unlink(), "lacks card.json"),
        (lambda run: (run / "card.json").write_text("{"), "is not JSON"),
        (lambda run: run.rename(run.parent / "rum"), "unknown run 'run'; did you mean 'rum'"),
        (lambda run: shutil.rmtree(run), "there is no run"),
        (lambda run: (shutil.rmtree(run), run.write_text("x")), "is a file; give the folder"),
    ],
)
def test_damage_is_named(run, damage, message):
    damage(run)
    with pytest.raises(UserError, match=message) as caught:
        load_run(run)
    assert "\n" not in str(caught.value)


def test_missing_and_foreign_tensors(run, algorithm):
    tensors = checkpoint.model_tensors(algorithm, None)
    first = next(iter(tensors))
    for wrong, message in (({**tensors, "weights.extra": torch.ones(1)}, "has 'extra'"), (dict(tensors), "lacks '")):
        if message == "lacks '":
            del wrong[first]
        checkpoint._write_model(run, wrong, {})
        with pytest.raises(UserError, match=message):
            load_run(run, ema=False)


def test_a_spec_survives_the_file():
    spec = DataSpec("t", 3, 1, 0.1, ("a", "b", "c"), ("u",), (-1.0,), (1.0,), {"front": (48, 64, 3)}, 2)
    assert DataSpec.from_dict(yaml.safe_load(yaml.safe_dump(spec.to_dict()))) == spec


# --------------------------------------------------------------------------------------------------------- atomicity
def test_every_moment_of_a_save_is_loadable(run, algorithm, monkeypatch):
    """Stop a save after each of its file operations in turn: what is there always loads, old or new."""
    with torch.no_grad():
        algorithm.network[0].bias.add_(3)
    before = load_run(run).network[0].bias
    seen = set()
    for stop_after in range(20):
        count, replace = 0, os.replace

        def counted(source, target, limit=stop_after, replace=replace):
            nonlocal count
            if count == limit:
                raise KeyboardInterrupt
            count += 1
            replace(source, target)

        monkeypatch.setattr(os, "replace", counted)
        try:
            save_run(run, algorithm, None)
            done = True
        except KeyboardInterrupt:
            done = False
        monkeypatch.setattr(os, "replace", replace)
        seen.add(torch.equal(load_run(run).network[0].bias, before))
        if done:
            break
    assert done
    assert seen == {True, False}
    assert "sha256_previous" not in checkpoint.read_card(run)


def test_out_of_disk_keeps_what_was_there(tmp_path, monkeypatch):
    target = tmp_path / "x.json"
    write_atomic(target, "old")

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="no space left to write"):
        write_atomic(target, "new")
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(UserError, match="choose a folder that you may write to"):
        checkpoint.make_folder(tmp_path / "locked" / "run")


def test_a_folder_under_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*choose a folder"):
        checkpoint.make_folder(tmp_path / "file" / "run")


def test_a_corrupt_state_is_named(tmp_path):
    assert load_state(tmp_path) is None
    save_state(tmp_path, {"x": torch.ones(3)}, {"step": 5})
    save_state(tmp_path, {"x": torch.ones(3)}, {"step": 9})
    folder = tmp_path / "train_state"
    assert load_state(tmp_path)[1]["step"] == 9
    file = folder / "step_000000009.safetensors"
    assert sorted(p.name for p in folder.iterdir()) == ["state.json", file.name]
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"is corrupt .*train from the start"):
        load_state(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match="which is missing"):
        load_state(tmp_path)
    (folder / "state.json").write_text('{"step": 9}')
    with pytest.raises(UserError, match=r"state\.json is corrupt"):
        load_state(tmp_path)
