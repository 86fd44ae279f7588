"""Training: one loop for every planner, policy and world model.

Exact resumption: the batch and the noise of step k come from generators seeded by (seed, k), and train_state holds
parameters, averages, moments and buffers, so a run that was killed ends in the same weights, bit for bit, as one that
never stopped (same machine, same number of threads and processes).

Speed: windows are gathered on the device, losses stay there until they are logged, clipping, AdamW and the average are
fused or `foreach` operations, networks are compiled and run in bfloat16 where the hardware has it and it pays.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast, reduce
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from offline.algorithm import Algorithm
from offline.checkpoint import (
    CONFIG,
    MODEL,
    STATE,
    load_run,
    load_state,
    make_folder,
    model_tensors,
    read_card,
    read_config,
    remove_temporary,
    save_run,
    save_state,
    write_atomic,
    writing_error,
)
from offline.hardware import has_bf16, has_compiler
from pilotwave.errors import UserError, nearest

if TYPE_CHECKING:
    from offline.store import TrajectoryStore
    from offline.windows import Windows

METRICS = "metrics.jsonl"
_VALIDATION_BATCHES = 8
_SECONDS_BETWEEN_LINES = 30.0  # of progress, where there is no terminal to draw a bar on


@dataclass(frozen=True)
class TrainConfig:
    """How to train. UserError on construction when a value cannot be.

    `lr` rises linearly over `warmup` steps, then falls to 0 along a cosine over the remaining ones. `ema_decay` is the
    limit of min(ema_decay, (1 + k) / (10 + k)). `precision`: "fp32", "bf16" (autocast, float32 parameters), or "auto",
    bf16 where the hardware computes in it. `compile`: "on", "off", or "auto", where it pays. Intervals are in steps,
    0 for never (and at the end); `held_out` episodes are kept for the validation loss.
    """

    steps: int = 10_000
    batch: int = 128
    lr: float = 3e-4
    warmup: int = 500
    ema_decay: float = 0.9995
    gradient_clip: float = 1.0
    weight_decay: float = 1e-4
    precision: str = "auto"
    compile: str = "auto"
    seed: int = 0
    save_every: int = 1000
    log_every: int = 50
    validation_every: int = 0
    held_out: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        choices = {"precision": PRECISIONS, "compile": ("auto", "on", "off"), "device": ("auto", "cpu", "cuda", "mps")}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in choices:
                if value not in choices[field.name]:
                    raise nearest(f"train.{field.name}", str(value), choices[field.name])
                continue
            low = 1 if field.name in ("steps", "batch", "log_every") else 0
            whole = field.type == "int"
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
                raise UserError(f"train.{field.name}={value!r} must be a {'whole ' if whole else ''}number")
            if not math.isfinite(value) or value < low:
                raise UserError(f"train.{field.name}={value} must be at least {low}")
        if self.ema_decay >= 1:
            raise UserError(f"train.ema_decay={self.ema_decay} must be below 1; 0.9995 is usual")
        if self.validation_every and not self.held_out:
            raise UserError("train.validation_every needs held-out episodes; set train.held_out to their number")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """From the `train` group of a configuration; UserError for an unknown key, with the nearest right one."""
        known = {field.name for field in fields(cls)}
        for key in values:
            if key not in known:
                raise nearest("key of train", str(key), known)
        return cls(**values)

    def lr_at(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def ema_decay_at(self, step: int) -> float:
        """Decay of the average at step `step`: short at first, so that the random start is forgotten."""
        return min(self.ema_decay, (1 + step) / (10 + step))


PRECISIONS = ("auto", "bf16", "fp32")


class Interrupted(SystemExit):
    """Training stopped at SIGINT or SIGTERM after saving; `code` is 128 + the signal, `str` says how to resume."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(128 + number)
        self.message = message

    def __str__(self) -> str:
        return self.message


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed from numbers and words, the same on every machine; unlike sums, near parts give unrelated seeds."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "little") >> 1


# ---------------------------------------------------------------------------------------------------------- one step
class Stepper:
    """Parameters, their averages and moments, and the step that changes them. No files, no printing."""

    def __init__(self, algorithm: Algorithm, windows: Windows, config: TrainConfig, accelerator: Accelerator) -> None:
        self.algorithm, self.windows, self.config, self.accelerator = algorithm, windows, config, accelerator
        self.device = accelerator.device
        self.named = dict(algorithm.named_parameters())
        self.trained = [p for p in self.named.values() if p.requires_grad]
        if not self.trained:
            raise UserError(f"'{algorithm.name}' has no parameters to train")
        decayed = [p for p in self.trained if p.ndim > 1]
        plain = [p for p in self.trained if p.ndim <= 1]  # biases and gains are not decayed
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        fused = self.device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay, fused=fused)
        self.averages = [p.detach().float().clone() for p in self.named.values()]
        self.generator = torch.Generator(self.device)
        self.batch = max(1, config.batch // accelerator.num_processes)

    def step(self, k: int, stop: bool = False) -> tuple[dict[str, Tensor], bool]:
        """Step k (from 0): (scalars on the device, whether any process wants to stop)."""
        config = self.config
        seed = seed_of(config.seed, k, self.accelerator.process_index)
        torch.manual_seed(seed)  # dropout and whatever else draws from the global generator
        self.generator.manual_seed(seed)
        batch = self.windows.sample(self.batch, self.generator)
        with self.accelerator.autocast():
            loss, info = self.algorithm.loss(batch, self.generator)
        loss.backward()
        scalars = {"loss": loss.detach(), **{key: value.detach() for key, value in info.items()}}
        if self.accelerator.num_processes > 1:
            stop = self._reduce(stop)
        if config.gradient_clip > 0:
            scalars["gradient_norm"] = torch.nn.utils.clip_grad_norm_(self.trained, config.gradient_clip, foreach=True)
        lr = config.lr_at(k)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(self.averages, list(self.named.values()), 1 - config.ema_decay_at(k))
        return scalars, stop

    def _reduce(self, stop: bool) -> bool:
        """Average the gradients of all processes in one message, which also carries whether to stop."""
        for p in self.trained:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        grads = [p.grad for p in self.trained if p.grad is not None]
        flag = torch.full((1,), float(stop), device=self.device)
        flat = reduce(torch.cat([flag, *(g.flatten().float() for g in grads)]), "mean")
        parts = flat[1:].split([g.numel() for g in grads])
        torch._foreach_copy_(grads, [part.view_as(g) for part, g in zip(parts, grads)])
        return bool(flat[0] > 0)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within: the averages in place of the parameters, evaluation mode, no gradients, nothing compiled anew."""
        parameters: list[Tensor] = list(self.named.values())
        kept = [p.detach().clone() for p in parameters]
        self.algorithm.eval()
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            torch._foreach_copy_(parameters, self.averages)
            try:
                yield
            finally:
                torch._foreach_copy_(parameters, kept)
                self.algorithm.train()

    def validate(self, windows: Windows) -> dict[str, float]:
        """Losses on held-out windows with the averaged weights; always the same windows and noise."""
        sums: dict[str, list[Tensor]] = {}
        with self.averaged(), self.accelerator.autocast():
            for i in range(_VALIDATION_BATCHES):
                self.generator.manual_seed(seed_of(self.config.seed, "validation", i))
                torch.manual_seed(seed_of(self.config.seed, "validation", i))
                loss, info = self.algorithm.loss(windows.sample(self.batch, self.generator), self.generator)
                for key, value in {"loss": loss, **info}.items():
                    sums.setdefault(f"validation_{key}", []).append(value.detach())
        return {key: float(torch.stack(values).float().mean()) for key, values in sums.items()}

    def ema(self) -> dict[str, Tensor]:
        return dict(zip(self.named, self.averages))

    def tensors(self) -> dict[str, Tensor]:
        """Everything that the next step depends on."""
        tensors = model_tensors(self.algorithm, self.ema())
        for name, p in self.named.items():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if p in self.optimizer.state:
                    tensors[f"adamw.{key}.{name}"] = self.optimizer.state[p][key]
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`, but for the module's own, which `load_weights` brings back."""
        torch._foreach_copy_(self.averages, [tensors[f"ema.{name}"].to(self.device) for name in self.named])
        for name, p in self.named.items():
            if f"adamw.step.{name}" in tensors:
                moments = {key: tensors[f"adamw.{key}.{name}"].clone() for key in ("step", "exp_avg", "exp_avg_sq")}
                where = self.device if self.optimizer.defaults.get("fused") else "cpu"
                self.optimizer.state[p] = {k: v.to(where if k == "step" else self.device) for k, v in moments.items()}


def load_weights(algorithm: Algorithm, tensors: Mapping[str, Tensor], run: Path) -> None:
    """The module's own state out of a train_state; UserError when it belongs to another network."""
    state = {k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")}
    own = algorithm.state_dict()
    for key in own.keys() | state.keys():
        if key not in own or key not in state or own[key].shape != state[key].shape:
            raise UserError(f"{run / STATE} does not fit this configuration ('{key}' differs); choose another out=")
    algorithm.load_state_dict(state)


# --------------------------------------------------------------------------------------------------------- reporting
class _Report:
    """metrics.jsonl, TensorBoard and the progress bar; every method does nothing on processes other than the first."""

    def __init__(self, run: Path, start: int, steps: int, active: bool, console: Console) -> None:
        self.active, self.steps, self.console, self.path = active, steps, console, run / METRICS
        self.last_line = time.monotonic()
        if not active:
            return
        _keep_lines(self.path, start)
        from torch.utils.tensorboard import SummaryWriter

        try:
            self.board = SummaryWriter(str(run / "tensorboard"), purge_step=start + 1)
        except OSError as error:
            raise writing_error(run / "tensorboard", error) from error
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[losses]}"), TextColumn("elapsed"))
        self.bar = Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console)
        self.task = self.bar.add_task("training", total=steps, completed=start, losses="")
        if console.is_terminal:
            self.bar.start()

    def advance(self, done: int) -> None:
        if self.active:
            self.bar.update(self.task, completed=done)

    def log(self, done: int, values: Mapping[str, float], rate: float) -> None:
        if not self.active:
            return
        try:
            with open(self.path, "ab", buffering=0) as file:  # one write, so that a kill leaves whole lines
                file.write((json.dumps({"step": done, **values}) + "\n").encode())
            for key, value in values.items():
                self.board.add_scalar(key, value, done)
        except OSError as error:
            raise writing_error(self.path, error) from error
        losses = "  ".join(f"{key.replace('_', ' ')} {values[key]:.4g}" for key in values if key.endswith("loss"))
        self.bar.update(self.task, losses=losses)
        if not self.console.is_terminal and (done >= self.steps or time.monotonic() - self.last_line > _SECONDS_BETWEEN_LINES):
            self.last_line = time.monotonic()
            left = (self.steps - done) / max(rate, 1e-9)
            self.say(f"step {done}/{self.steps}  {losses}  {rate:.3g} steps/s  {left / 60:.1f} minutes left")

    def say(self, line: str) -> None:
        if self.active:
            self.console.print(line, highlight=False, soft_wrap=True, markup=False)

    def close(self) -> None:
        if self.active:
            if self.console.is_terminal:
                self.bar.stop()
            with suppress(OSError):
                self.board.close()


def _keep_lines(path: Path, step: int) -> None:
    """Drop the metrics after `step`, which will be made again, and any line that a kill cut short."""
    kept = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    write_atomic(path, "".join(kept))


@contextmanager
def _signals() -> Iterator[Callable[[], int]]:
    """Within: SIGINT and SIGTERM are noted (a second one acts at once); yields a function that gives their number."""
    seen: list[int] = []
    previous: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        signal.signal(number, previous[number])

    with suppress(ValueError):  # not the main thread: signals are not ours to handle
        for caught in (signal.SIGINT, signal.SIGTERM):
            previous[caught] = signal.signal(caught, note)
    try:
        yield lambda: seen[0] if seen else 0
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _only_trainer(run: Path, active: bool) -> Iterator[None]:
    """Refuse to train into a folder that another process trains into; the lock goes when its process does."""
    if not active or sys.platform == "win32":
        yield
        return
    import fcntl

    with open(run / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another process is training into {run}; wait for it or choose another out=") from error
        yield


# ---------------------------------------------------------------------------------------------------------- the loop
def train(
    algorithm: Algorithm,
    store: TrajectoryStore,
    out: str | Path,
    config: TrainConfig,
    *,
    resume: bool = True,
    full_config: Mapping[str, Any] | None = None,
    card: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train `algorithm` on `store` into the run directory `out`; returns the last metrics.

    A run that is there and unfinished is resumed at its last checkpoint (`resume=False` starts over). The module is
    left with its last weights; `load_run(out)` gives the averaged ones. `full_config` (task, data, ...) goes to
    config.yaml, `card` (data, command, commit, ...) to the card. Raises Interrupted after SIGINT or SIGTERM, UserError
    for what cannot be: a loss that is not finite, a full disk, a corrupt checkpoint, a folder of another run.
    """
    run = Path(out)
    make_folder(run)
    accelerator = accelerator_for(config)
    main = accelerator.is_main_process
    with _only_trainer(run, main), _signals() as signalled:
        return _train(algorithm, store, run, config, accelerator, signalled, resume, full_config, card, console)


def _train(
    algorithm: Algorithm,
    store: TrajectoryStore,
    run: Path,
    config: TrainConfig,
    accelerator: Accelerator,
    signalled: Callable[[], int],
    resume: bool,
    full_config: Mapping[str, Any] | None,
    card: Mapping[str, Any] | None,
    console: Console | None,
) -> dict[str, Any]:
    main, device = accelerator.is_main_process, accelerator.device
    if main:
        _clean(run, keep=resume)
        _same_run(run, algorithm)
    accelerator.wait_for_everyone()
    saved = load_state(run)
    held_out = None
    if config.held_out:
        store, held_out = store.split(config.held_out, config.seed)
    algorithm.to(device)
    if saved is None:
        algorithm.prepare(store)
        algorithm.to(device)
    else:
        load_weights(algorithm, saved[0], run)  # before the windows, which its normalizer makes
    if accelerator.num_processes > 1:
        for tensor in algorithm.state_dict().values():
            tensor.copy_(broadcast(tensor.clone()))
    algorithm.train()
    stepper = Stepper(algorithm, algorithm.windows(store, device), config, accelerator)
    validation = algorithm.windows(held_out, device) if held_out is not None and config.validation_every else None
    start, spent = 0, 0.0
    if saved is not None:
        stepper.restore(saved[0])
        start, spent = int(saved[1]["step"]), float(saved[1]["seconds"])
    if main:
        report_console = console or Console(stderr=True)
    else:
        report_console = Console(quiet=True)
    precision = "bf16" if accelerator.mixed_precision == "bf16" else "fp32"
    how = {"precision": precision, "compiled": compile_networks(algorithm, config, device)}
    how |= {"threads": torch.get_num_threads(), "processes": accelerator.num_processes}
    report = _Report(run, start, config.steps, main, report_console)
    if saved is not None:
        report.say(f"resuming {run} at step {start} of {config.steps}")
        for key, value in how.items():
            if saved[1].get(key) != value:
                report.say(f"note: {key} was {saved[1].get(key)}, now {value}; the result will differ in rounding")
        if saved[1].get("train") != asdict(config):
            report.say("note: train settings differ from those the run began with; the new ones hold from here on")
    began, last_save = time.monotonic(), start if saved is not None else -1

    def save(done: int) -> None:
        nonlocal last_save
        if not main:
            return
        if done != last_save:
            state = {"step": done, "seconds": spent + time.monotonic() - began, **how, "train": asdict(config)}
            state["rows"] = rows
            save_state(run, stepper.tensors(), state)
            last_save = done
        machine = f"{platform.machine()}, {torch.get_num_threads()} threads, {device}, torch {torch.__version__}"
        facts = {"steps": done, "training_seconds": round(spent + time.monotonic() - began, 1), "machine": machine}
        whole = {**(full_config or {}), "train": asdict(config)}
        save_run(run, algorithm, stepper.ema(), config=whole, card={**(card or {}), **facts, "loss": last.get("loss")})

    last: dict[str, Any] = _last_line(run / METRICS) if main else {}
    pending: list[dict[str, Tensor]] = []  # scalars still on the device
    rows: list[dict[str, float]] = saved[1].get("rows", []) if saved is not None else []  # seen, not yet logged
    looked, logged, logged_at = start, start, time.monotonic()

    def look(done: int) -> None:
        """Bring the scalars since the last time from the device; UserError for the first that is not finite."""
        nonlocal looked
        if not pending:
            return
        keys = list(pending[0])
        table = torch.stack([torch.stack([row[key].float() for key in keys]) for row in pending]).cpu()
        pending.clear()
        bad = (~torch.isfinite(table)).nonzero()
        if len(bad):
            at, key = looked + int(bad[0, 0]) + 1, keys[int(bad[0, 1])]
            raise UserError(
                f"the {key.replace('_', ' ')} is {table[tuple(bad[0])]} at step {at}; "
                f"the checkpoint of step {max(0, last_save)} is kept in {run}; "
                f"lower train.lr (now {config.lr:g}) or train.gradient_clip (now {config.gradient_clip:g})"
            )
        rows.extend(dict(zip(keys, values)) for values in table.tolist())
        looked = done

    def log(done: int, extra: Mapping[str, float]) -> None:
        """Write the means since the last line."""
        nonlocal last, logged, logged_at
        means = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
        rows.clear()
        now = time.monotonic()
        rate = (done - logged) / max(now - logged_at, 1e-9)
        means |= {"lr": config.lr_at(done - 1), "steps_per_second": rate, "seconds": spent + now - began}
        means |= extra
        logged, logged_at = done, now
        last = {"step": done, **means}
        report.log(done, means, rate)

    try:
        if start == 0 and saved is None:
            save(0)
        stop = False
        for k in range(start, config.steps):
            scalars, stop = stepper.step(k, bool(signalled()))
            pending.append(scalars)
            done = k + 1
            report.advance(done)
            stop = stop or (accelerator.num_processes == 1 and bool(signalled()))
            due = config.validation_every and validation is not None and done % config.validation_every == 0
            extra = stepper.validate(validation) if due and validation is not None else {}
            saving = stop or done == config.steps or (config.save_every and done % config.save_every == 0)
            logging = due or done == config.steps or done % config.log_every == 0
            if logging or saving:
                look(done)
            if logging:
                log(done, extra)
            if saving:
                save(done)
            if stop and done < config.steps:
                message = f"stopped at step {done} of {config.steps}, saved in {run}; the same command resumes it"
                report.say(message)
                raise Interrupted(message, signalled() or signal.SIGTERM)
        if start >= config.steps:
            report.say(f"{run} is already trained: {start} steps")
            if _finished_at(run) != start:  # killed between its last state and its last model
                save(start)
    finally:
        report.close()
    accelerator.wait_for_everyone()
    return last


def accelerator_for(config: TrainConfig) -> Accelerator:
    """Device, precision and processes as configured; UserError for a device that is not there."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device=cuda, but torch sees no CUDA device; use train.device=cpu or auto")
    if config.device == "mps" and not torch.backends.mps.is_available():
        raise UserError("train.device=mps, but torch sees no such device; use train.device=cpu or auto")
    AcceleratorState._reset_state()  # a second training in one process may have another precision
    accelerator = Accelerator(cpu=config.device == "cpu", mixed_precision="no")
    if config.precision == "bf16" or (config.precision == "auto" and has_bf16(accelerator.device)):
        AcceleratorState._reset_state()
        accelerator = Accelerator(cpu=config.device == "cpu", mixed_precision="bf16")
    return accelerator


def compile_networks(algorithm: Algorithm, config: TrainConfig, device: torch.device) -> bool:
    """Compile the networks in place where asked or where it pays; False when they run as they are."""
    if config.compile == "off" or (config.compile == "auto" and device.type != "cuda"):
        return False
    if not has_compiler(device):
        if config.compile == "on":
            raise UserError("train.compile=on needs a C++ compiler (g++) or, on a GPU, Triton; use train.compile=auto")
        return False
    for module in algorithm.networks():
        module.compile(dynamic=False)
    return True


def _clean(run: Path, keep: bool) -> None:
    for folder in (run, run / STATE):
        remove_temporary(folder)
    if not keep or not (run / STATE / "state.json").exists():
        shutil.rmtree(run / STATE, ignore_errors=True)
        shutil.rmtree(run / "tensorboard", ignore_errors=True)
        if not keep:
            for name in (CONFIG, MODEL, METRICS):
                (run / name).unlink(missing_ok=True)


def _same_run(run: Path, algorithm: Algorithm) -> None:
    """A folder may be resumed by what it was begun with: same algorithm, same configuration of it, same data shapes."""
    if not (run / STATE / "state.json").exists() or not (run / CONFIG).exists():
        return
    there = read_config(run)
    here = {"kind": algorithm.kind, "name": algorithm.name, "spec": algorithm.spec.to_dict()}
    here["algorithm"] = json.loads(json.dumps(algorithm.config, default=str))
    for key in ("kind", "name", "spec", "algorithm"):
        if there[key] != here[key]:
            what = f"{there[key]} for '{there['spec'].get('task')}'" if key in ("kind", "name") else f"another {key}"
            raise UserError(f"{run} holds a run of {what}; choose another out=, or resume=false to replace it")


def _finished_at(run: Path) -> int | None:
    """The step of model.safetensors, None when there is no valid one."""
    try:
        card = read_card(run)
        load_run(run)
        return None if "sha256_previous" in card else int(card["steps"])
    except (UserError, KeyError):
        return None


def _last_line(path: Path) -> dict[str, Any]:
    lines = path.read_text().splitlines() if path.exists() else []
    return dict(json.loads(lines[-1])) if lines else {}
