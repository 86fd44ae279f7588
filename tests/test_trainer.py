"""The training loop: it learns, it logs, it averages as it should, and it names what went wrong."""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import offline.trainer as trainer
from offline.algorithm import build
from offline.checkpoint import load_run, load_state
from offline.trainer import TrainConfig, train
from pilotwave.errors import UserError
from tests import tiny

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_and_leaves_a_whole_run(tmp_path):
    last = tiny.run(tmp_path, steps=600, lr=3e-3, validation_every=100, held_out=4, ema_decay=0.99, log_every=20)
    lines = metrics(tmp_path)
    assert lines[-1] == last
    assert [line["step"] for line in lines] == list(range(20, 601, 20))
    assert last["loss"] < 0.8 * lines[0]["loss"]
    assert [line["step"] for line in lines if "validation_loss" in line] == [100, 200, 300, 400, 500, 600]
    assert last["validation_loss"] < 0.95 * lines[4]["validation_loss"]
    for key in ("loss", "x0_error", "gradient_norm", "lr", "steps_per_second", "seconds"):
        assert last[key] >= 0
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [e.step for e in board.Scalars("loss")] == [line["step"] for line in lines]
    assert board.Scalars("loss")[-1].value == pytest.approx(last["loss"])
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["steps"] == 600
    assert card["command"] == "tests.tiny"
    scales = [v for k, v in load_run(tmp_path, kind="planner").state_dict().items() if k.endswith("scale")]
    assert all((scale > 2).all() for scale in scales)  # the data's, not the initial 1


def test_steps_are_those_of_the_textbook(tmp_path):
    """Ten steps against a plain loop written here: AdamW, warm-up and cosine, clipping, average with warm-up."""
    settings = {"steps": 10, "warmup": 3, "lr": 1e-2, "gradient_clip": 0.05, "ema_decay": 0.6, "weight_decay": 0.1}
    tiny.run(tmp_path, **settings, precision="fp32")
    config = TrainConfig(batch=16, **settings)
    algorithm = build("planner", "tiny", tiny.SPEC, tiny.CONFIG, seed=0)
    algorithm.prepare(tiny.walks())
    windows = algorithm.windows(tiny.walks(), "cpu")
    weights = [p for p in algorithm.parameters() if p.ndim > 1]
    biases = [p for p in algorithm.parameters() if p.ndim == 1]
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, foreach=False, fused=False)
    averages = {name: p.detach().clone() for name, p in algorithm.named_parameters()}
    rates = [1 / 3, 2 / 3, 1.0] + [0.5 * (1 + torch.cos(torch.tensor(torch.pi * i / 7)).item()) for i in range(7)]
    for k in range(10):
        torch.manual_seed(trainer.seed_of(0, k, 0))
        generator = torch.Generator().manual_seed(trainer.seed_of(0, k, 0))
        loss, _ = algorithm.loss(windows.sample(config.batch, generator), generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(algorithm.parameters(), 0.05)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * rates[k]
        optimizer.step()
        decay = min(0.6, (1 + k) / (10 + k))
        for name, p in algorithm.named_parameters():
            averages[name].mul_(decay).add_(p.detach(), alpha=1 - decay)
    for ema, expected in ((False, dict(algorithm.named_parameters())), (True, averages)):
        for name, p in load_run(tmp_path, ema=ema).named_parameters():
            torch.testing.assert_close(p, expected[name], rtol=1e-4, atol=1e-6)


def test_the_same_seed_gives_the_same_weights(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        tiny.run(tmp_path / name, steps=20, seed=seed)
    a, b, c = ((tmp_path / n / "model.safetensors").read_bytes() for n in "abc")
    assert a == b
    assert a != c


def test_validation_changes_nothing(tmp_path):
    """The same training episodes with and without looking at the held-out ones."""
    tiny.run(tmp_path / "a", steps=20, held_out=3)
    tiny.run(tmp_path / "b", steps=20, held_out=3, validation_every=7)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_bf16_keeps_float32_parameters_and_resumes_exactly(tmp_path):
    tiny.run(tmp_path / "whole", steps=30, precision="bf16")
    tiny.run(tmp_path / "plain", steps=30, precision="fp32")
    whole, plain = load_run(tmp_path / "whole"), load_run(tmp_path / "plain")
    assert all(p.dtype == torch.float32 for p in whole.parameters())
    pairs = list(zip(whole.parameters(), plain.parameters()))
    assert not all(torch.equal(a, b) for a, b in pairs)  # it did compute in bfloat16
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.01)
    stop_at(tmp_path / "broken", 13, steps=30, precision="bf16")
    tiny.run(tmp_path / "broken", steps=30, precision="bf16")
    assert (tmp_path / "broken" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


def stop_at(out: Path, step: int, **settings) -> None:
    """Train, and raise SIGINT in step `step`."""
    original = trainer.Stepper.step

    def step_and_raise(self, k, stop=False):
        if k == step - 1:
            os.kill(os.getpid(), trainer.signal.SIGINT)
        return original(self, k, stop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Stepper, "step", step_and_raise)
        with pytest.raises(trainer.Interrupted, match="resumes it") as caught:
            tiny.run(out, **settings)
    assert caught.value.code == 130
    assert load_state(out)[1]["step"] == step


def test_not_finite_is_named_and_the_last_good_checkpoint_kept(tmp_path, monkeypatch):
    original = tiny.TinyDenoiser.loss

    def broken(self, batch, generator):
        loss, info = original(self, batch, generator)
        broken.calls += 1
        return (loss * float("nan") if broken.calls >= 27 else loss), info

    broken.calls = 0
    monkeypatch.setattr(tiny.TinyDenoiser, "loss", broken)
    with pytest.raises(UserError, match=r"the loss is nan at step 27; the checkpoint of step 20 is kept.*lower train"):
        tiny.run(tmp_path, steps=60)
    assert load_state(tmp_path)[1]["step"] == 20
    assert all(p.isfinite().all() for p in load_run(tmp_path).parameters())
    monkeypatch.setattr(tiny.TinyDenoiser, "loss", original)
    assert tiny.run(tmp_path, steps=60)["step"] == 60


def limited(out: Path, size: int, *arguments: str) -> subprocess.CompletedProcess:
    """Train in a process that cannot write files larger than `size` bytes: a full disk, without filling one."""
    code = (
        "import sys, signal, resource, torch; from pathlib import Path; from tests import tiny\n"
        "from pilotwave.errors import UserError\n"
        "torch.set_num_threads(1); signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {resource.RLIM_INFINITY}))\n"
        "try: tiny.run(Path(sys.argv[1]), steps=40)\n"
        "except UserError as error: print(error); sys.exit(2)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(out), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_a_full_disk_is_named_and_training_goes_on_afterwards(tmp_path):
    tiny.run(tmp_path / "whole", steps=40)
    stop_at(tmp_path / "broken", 15, steps=40)
    result = limited(tmp_path / "broken", 12_000)
    assert result.returncode == 2, result.stderr
    assert "no space left to write" in result.stdout
    assert result.stdout.count("\n") == 1
    assert load_state(tmp_path / "broken")[1]["step"] == 15
    load_run(tmp_path / "broken")
    assert not list((tmp_path / "broken").rglob("*.tmp"))
    tiny.run(tmp_path / "broken", steps=40)
    assert (tmp_path / "broken" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


def test_a_finished_run_is_left_as_it_is(tmp_path):
    tiny.run(tmp_path, steps=20)
    before = {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    tiny.run(tmp_path, steps=20)
    assert before == {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}


def test_metrics_after_the_resumed_step_are_dropped(tmp_path):
    stop_at(tmp_path, 15, steps=40)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 35, "loss": 1.0}\n{"step": 40, "lo')  # a later life, killed inside a line
    tiny.run(tmp_path, steps=40)
    assert [line["step"] for line in metrics(tmp_path)] == list(range(5, 41, 5))


def test_stale_files_go_and_another_run_is_refused(tmp_path):
    tiny.run(tmp_path, steps=10)
    (tmp_path / ".model.safetensors.123.tmp").write_text("half")
    (tmp_path / "train_state" / ".state.json.123.tmp").write_text("half")
    tiny.run(tmp_path, steps=20)
    assert not list(tmp_path.rglob("*.tmp"))
    other = build("planner", "tiny", tiny.SPEC, {**tiny.CONFIG, "width": 16})
    config = TrainConfig(steps=5, device="cpu")
    with pytest.raises(UserError, match=r"holds a run of another algorithm; choose another out="):
        train(other, tiny.walks(), tmp_path, config)
    assert load_run(tmp_path).config["width"] == tiny.CONFIG["width"]
    train(other, tiny.walks(), tmp_path, config, resume=False)
    assert load_run(tmp_path).config["width"] == 16


def test_two_trainings_in_one_folder_are_refused(tmp_path):
    with trainer._only_trainer(tmp_path, True), pytest.raises(UserError, match="another process is training"):
        tiny.run(tmp_path, steps=5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "train.steps=0 must be at least 1"),
        ({"steps": -5}, "train.steps=-5 must be at least 1"),
        ({"batch": 1.5}, "train.batch=1.5 must be a whole number"),
        ({"lr": "fast"}, "train.lr='fast' must be a number"),
        ({"lr": float("nan")}, "train.lr=nan must be at least 0"),
        ({"ema_decay": 1.0}, "must be below 1"),
        ({"precision": "fp23"}, "unknown train.precision 'fp23'; did you mean 'fp32'"),
        ({"device": "cpuu"}, "did you mean 'cpu'"),
        ({"validation_every": 5}, "needs held-out episodes"),
        ({"stepss": 5}, "unknown key of train 'stepss'; did you mean 'steps'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UserError, match=message):
        TrainConfig.from_dict(settings)


def test_progress_is_quiet_without_a_terminal(tmp_path):
    text = io.StringIO()
    algorithm = build("planner", "tiny", tiny.SPEC, tiny.CONFIG)
    train(algorithm, tiny.walks(), tmp_path, TrainConfig(steps=50, log_every=5), console=Console(file=text, width=200))
    assert text.getvalue().count("\n") == 1
    assert text.getvalue().startswith("step 50/50  loss ")


def test_progress_on_a_terminal_shows_losses_and_time(tmp_path):
    text = io.StringIO()
    algorithm = build("planner", "tiny", tiny.SPEC, tiny.CONFIG)
    console = Console(file=text, force_terminal=True, width=200)
    train(algorithm, tiny.walks(), tmp_path, TrainConfig(steps=50, log_every=5), console=console)
    assert "50/50" in text.getvalue()
    assert "loss" in text.getvalue()
    assert "left" in text.getvalue()


@pytest.mark.skipif(not trainer.has_compiler(torch.device("cpu")), reason="no C++ compiler")
@pytest.mark.slow
def test_compiled_networks_agree_and_resume_exactly(tmp_path):
    settings = {"steps": 20, "compile": "on"}
    tiny.run(tmp_path / "whole", **settings)
    assert load_state(tmp_path / "whole")[1]["compiled"]
    tiny.run(tmp_path / "eager", steps=20, compile="off")
    stop_at(tmp_path / "broken", 7, **settings)
    tiny.run(tmp_path / "broken", **settings)
    assert (tmp_path / "broken" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
