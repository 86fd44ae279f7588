"""`pilotwave fit`: a correction, or a solver's statistics, fitted to a run's weights on recorded data, or what was measured in
closed loop, saved beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from pilotwave.config import plain
from pilotwave.console import metrics_table, writable, writable_folder, write_json
from pilotwave.errors import UserError, nearest
from pilotwave.runs import compose_for, given, load, run_folder, sampler, task_of


def run(overrides: Sequence[str]) -> None:
    """Fit, print what it gains on other windows, and save."""
    folder = run_folder(given(overrides, "run"))
    cfg = compose_for("fit", overrides, folder)
    if cfg.json is not None:
        writable(cfg.json)
    writable_folder(folder)

    import torch

    from offline.checkpoint import write_atomic
    from offline.fitted import FITS, FITTED, KNOWN, MEASURED, OPTIONS, RECORDED, fitted_file, packed_fit
    from offline.tables import sampler_table

    if cfg.what not in KNOWN:
        raise nearest("fit", str(cfg.what), KNOWN)
    if cfg.what in MEASURED:
        measure(folder, cfg)
        return
    if cfg.data is None:
        raise UserError("no data given; add data=PATH ('pilotwave data PATH' shows what a data set holds)")
    learned = load(folder, ("planner", "policy"), ema=cfg.ema, device=cfg.device)
    command = f"pilotwave fit what={cfg.what} data={cfg.data}"
    if cfg.what in RECORDED:
        file = fitted_file(folder, cfg.what, {})
        numbers = RECORDED[cfg.what](learned, store_of(learned, cfg))
        write_atomic(file, packed_fit(learned.origin[1], {}, numbers, found_by=command))
        write_json(cfg.json, {"what": cfg.what, "file": str(file)})
        print(f"{file} written; what takes it finds it there")
        return
    if not hasattr(learned, "reference"):
        raise UserError(f"{learned.name} has no denoiser of its own to fit anything to")
    settings = sampler(learned, cfg)
    if cfg.what in OPTIONS:  # solvers of their own
        settings = {"name": cfg.what, "steps": settings["steps"]}
    before, schedule = sampler_table(learned, settings), learned.denoiser.schedule
    device = next(learned.parameters()).device
    generator = torch.Generator(device).manual_seed(cfg.seed)
    windows = learned.windows(store_of(learned, cfg), device)
    fit_on, check = (learned.reference(windows.sample(int(cfg.samples), generator), generator) for _ in range(2))
    numbers = FITS[cfg.what](fit_on, schedule, before, generator)
    command += f" samples={cfg.samples} seed={cfg.seed}"
    file = fitted_file(folder, cfg.what, settings)
    write_atomic(file, packed_fit(learned.origin[1], settings, numbers, found_by=command))
    used = {**settings, OPTIONS[cfg.what][0]: FITTED} if cfg.what in OPTIONS else {**settings, "correction": cfg.what}
    after = sampler_table(learned, used)
    x_T = check.noise(schedule, generator)
    metrics: dict[str, Any] = {
        "what": cfg.what,
        "sampler": f"{settings['name']}, {settings['steps']} steps",
        "windows": cfg.samples,
    }
    from diffusion.solvers._fit import to_data, to_small_steps

    for name, table in (("without", before), ("with", after)):
        metrics[name] = {
            "to_small_steps": to_small_steps(check, schedule, table, x_T),
            "to_data": to_data(check, table, x_T),
        }
    metrics["file"] = str(file)
    metrics_table(metrics, f"{folder}: distance of samples, in normalized units, to many small steps and to the data's moments")
    write_json(cfg.json, metrics)
    use = f"sampler={cfg.what} sampler.{OPTIONS[cfg.what][0]}=fitted" if cfg.what in OPTIONS else f"sampler.correction={cfg.what}"
    print(f"use it: pilotwave rollout {folder} {use} sampler.steps={settings['steps']}")


def measure(folder: Path, cfg: DictConfig) -> None:
    """How far robots stray from the planner's paths: quantiles, of 0, 1, .. 100 % of the steps."""
    from offline.checkpoint import write_atomic
    from offline.fitted import fitted_file, packed_fit
    from planners.tracking_margin import measured
    from robots.straying import straying

    if int(cfg.episodes) < 1:
        raise UserError(f"episodes={cfg.episodes}; at least 1 is needed")
    learned, task = load(folder, ("planner",), ema=cfg.ema, device=cfg.device), task_of(cfg, folder)
    controller = learned.controller(task.spec, sampler=sampler(learned, cfg), seed=cfg.seed)
    metres = straying(task, controller, int(cfg.episodes), cfg.seed)
    numbers = measured(metres)
    file, command = fitted_file(folder, cfg.what, {}), f"pilotwave fit what={cfg.what} episodes={cfg.episodes} seed={cfg.seed}"
    write_atomic(file, packed_fit(learned.origin[1], {}, numbers, found_by=command))
    found = {"steps": len(metres), "metres": {f"q{q}": float(numbers["quantiles"][q]) for q in (50, 70, 90, 95, 99)}}
    metrics_table({"what": cfg.what, **found, "file": str(file)}, f"{folder}: how far robots stray from planned paths")
    write_json(cfg.json, {"what": cfg.what, **found, "file": str(file)})
    print("safe plans keep what it says from barriers (controller.safety)")


def store_of(learned: Any, cfg: DictConfig) -> Any:
    """The data, which must look as the run's did."""
    import offline

    spec = learned.spec
    images = list(spec.images) or False
    store = offline.read(cfg.data, format=cfg.format, observation_keys=plain(cfg.observation_keys), images=images)
    found = tuple(store.columns[key].shape[1] if key in store.columns else 0 for key in ("observation", "action"))
    if found != (spec.observation_dim, spec.action_dim):
        raise UserError(
            f"{cfg.data} has {found[0]} observation and {found[1]} action features, the run's data {spec.observation_dim} and "
            f"{spec.action_dim}; give data of the same task"
        )
    return store
