"""The packaged `configs`, composed by Hydra: one file a command, one folder a group. Errors name the right word."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pilotwave.errors import UserError, nearest

Extra = Callable[[str], Mapping[str, Mapping[str, Any]]]

# Numbers that make no sense below these, wherever they stand in a configuration.
LEAST = {
    "steps": 1, "horizon": 1, "batch": 1, "episodes": 1, "samples": 1, "num_envs": 1, "width": 1, "depth": 1, "seed": 0,
    "held_out": 0, "replan_every": 0, "lead": 0, "history": 1, "evaluations": 1,
    "jump": 1, "points": 1, "discount": 0,
    "margin": 0, "deviation": 0, "lookahead": 0, "kp": 0, "kd": 0, "rising": 0, "seconds": 0, "delay": 0, "replan": 0,
}  # fmt: skip

# And above these.
MOST = {"discount": 1}

# Keys whose value is taken as it stands, so that a path needs no quotes against Hydra's grammar.
PATHS = frozenset(
    {"data", "out", "json", "video", "plot", "run", "actions", "baseline", "path", "port", "demonstrations", "behaviour"}
)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file (safe loader: nothing in it can run); UserError when it holds none."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not readable YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no settings; expected lines such as 'name: diffuser'")
    return content


@cache
def groups() -> dict[str, tuple[str, ...]]:
    """The packaged options of every group: {"planner": ("diffuser", ...), "task": (...), ...}."""
    found = {}
    for folder in files("configs").iterdir():
        if folder.is_dir() and not folder.name.startswith("_"):
            names = (entry.name for entry in folder.iterdir())
            found[folder.name] = tuple(sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml")))
    return found


def summary(group: str, name: str) -> str:
    """What a packaged option is: the first sentence of the first comment in its file."""
    lines = files("configs").joinpath(group, f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    comments = [line.removeprefix("# ") for line in lines if line.startswith("# ") and "@package" not in line]
    return re.split(r"(?<=\.) (?=[A-Z])", comments[0])[0] if comments else ""


@cache
def primary(command: str) -> dict[str, Any]:
    """A command's own file in `configs`, before composition."""
    return dict(yaml.safe_load(files("configs").joinpath(f"{command}.yaml").read_text(encoding="utf-8")))


def store(group: str, name: str, content: Mapping[str, Any]) -> None:
    """Make `content` an option of a group, as a file in `configs` would be.

    A mapping with the group's own key on top (`planner: {...}, train: {...}`) is laid over the whole configuration.
    """
    package = "_global_" if group in content else group
    ConfigStore.instance().store(group=group, name=name, node=dict(content), package=package)


def compose(command: str, overrides: Sequence[str] = (), extra: Extra | None = None) -> DictConfig:
    """The resolved configuration of a command.

    `overrides` are Hydra's (`planner=diffuser planner.horizon=256 +planner.extra=1 ~planner.guide`); a group also takes
    the path of a YAML file, and `extra(group)` gives further options, name to settings, that no file has.
    """
    file = primary(command)
    own_groups = {key for entry in file.get("defaults", ()) if isinstance(entry, Mapping) for key in entry}
    chosen: list[Override] = []
    values: list[Override] = []
    kept: dict[str, str | None] = {}
    for text in overrides:
        key, _, value = text.partition("=")
        if key in file and (key in PATHS or (key in groups() and key not in own_groups)):
            kept[key] = None if value in ("", "null") else value
        else:
            parsed = _parse(text)
            is_group = parsed.key_or_group in own_groups and not isinstance(parsed.value(), dict)
            (chosen if is_group else values).append(parsed)
    selected = [_choose(override, extra) for override in chosen]
    base = _compose(command, selected)
    texts = [_check_key(override, base, own_groups) for override in values]
    config = _compose(command, selected + texts) if texts else base
    OmegaConf.set_struct(config, False)
    for key, content in kept.items():
        config[key] = content
    for override in values:
        if not override.is_delete():
            _check_type(str(override.key_or_group), config, base)
    check_numbers(config)
    OmegaConf.set_struct(config, True)
    return config


def _parse(text: str) -> Override:
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise UserError(f"cannot read '{text}'; settings are written key=value, odd characters in quotes") from error


def _compose(command: str, overrides: list[str]) -> DictConfig:
    try:
        with initialize_config_module("configs", version_base="1.3"):
            config = hydra_compose(command, overrides)
        OmegaConf.resolve(config)
        return config
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"cannot put the settings together: {' '.join(str(error).split())}") from error


def _choose(override: Override, extra: Extra | None) -> str:
    """The Hydra override of a group's choice, once the option exists."""
    group, name = str(override.key_or_group), override.value()
    if name is None:
        return f"{group}=null"
    name = str(name)
    further = extra(group) if extra else {}
    known = {*groups()[group], *(entry[:-5] for entry in _stored(group)), *further}
    if name.endswith((".yaml", ".yml", ".txt")):
        path = Path(name).expanduser()
        if not path.is_file():
            choices = ", ".join(sorted(known))
            raise UserError(f"no settings file '{name}' for {group}=; give a .yaml file or one of: {choices}")
        name = path.stem
        store(group, name, _users_file(group, path))
    elif name not in known:
        raise nearest(group.replace("_", " "), name, known)
    elif name in further and name not in groups()[group]:
        store(group, name, further[name])
    return f"{group}={name}"


def _users_file(group: str, path: Path) -> dict[str, Any]:
    """The settings in a user's file; a maze map (rows of characters, or `maze:` and no `name:`) is a pointmaze task."""
    content = {} if path.suffix == ".txt" else read_yaml(path)
    if group == "task" and "name" not in content:
        maze = yaml.safe_load(files("configs").joinpath("task", "pointmaze.yaml").read_text(encoding="utf-8"))
        return {**maze, "maze": str(path.resolve())}
    return content


def _stored(group: str) -> Iterable[str]:
    return (name for name in ConfigStore.instance().repo.get(group, {}) if name.endswith(".yaml"))


def _check_key(override: Override, base: DictConfig, own_groups: Iterable[str]) -> str:
    """The override's text, once its key exists in `base`; what goes below an empty mapping is free."""
    text, key = str(override.input_line), str(override.key_or_group)
    if override.is_add() or override.is_force_add():
        return text
    node: Any = base
    parts = key.split(".")
    for depth, part in enumerate(parts):
        where = ".".join(parts[:depth])
        if node is None:
            kind = where.replace("_", " ")
            hint = f"choose it first: {where}=NAME" if where in own_groups else f"'{where}' is empty"
            raise UserError(f"'{key}' sets a part of the {kind}, but none is chosen; {hint}")
        if not isinstance(node, DictConfig):
            raise UserError(f"'{key}' goes below '{where}', which is a plain value ({node})")
        if not node and depth:
            return f"++{text}"
        if part not in node:
            raise nearest("key", key, [f"{where}.{name}".lstrip(".") for name in map(str, node)])
        node = node[part]
    return text


def _check_type(key: str, config: DictConfig, base: DictConfig) -> None:
    """A value must be of its default's type; a whole number may be written 1e5."""
    default, value = OmegaConf.select(base, key), OmegaConf.select(config, key)
    if default is None or value is None or isinstance(default, str) != isinstance(value, str):
        wrong = default is not None and value is not None
    elif isinstance(default, bool) or isinstance(value, bool):
        wrong = type(default) is not type(value)
    elif isinstance(default, int) and isinstance(value, float):
        wrong = not value.is_integer()
        if not wrong:
            OmegaConf.update(config, key, int(value))
    else:
        wrong = isinstance(default, DictConfig) != isinstance(value, DictConfig)
    if wrong:
        kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}
        kind = kinds.get(type(default), "of its default's kind")
        raise UserError(f"{key} is '{value}'; it must be {kind} such as {default}")


def plain(config: Any) -> Any:
    """Plain Python mappings and lists, interpolations resolved."""
    return OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config


def check_numbers(config: Any, where: str = "") -> None:
    """UserError for NaN, and for a number below what its name allows (`steps=0`, `planner.horizon=-8`)."""
    if isinstance(config, DictConfig | ListConfig):
        for name, part in config.items() if isinstance(config, DictConfig) else enumerate(config):
            check_numbers(part, f"{where}.{name!s}".lstrip("."))
        return
    if not isinstance(config, int | float):
        return
    if config != config:
        raise UserError(f"{where} is not a number; it must be one")
    least = LEAST.get(where.rpartition(".")[2])
    if least is not None and not config >= least:
        raise UserError(f"{where} is {config}; it must be at least {least}")
    most = MOST.get(where.rpartition(".")[2])
    if most is not None and config > most:
        raise UserError(f"{where} is {config}; it must be at most {most}")
