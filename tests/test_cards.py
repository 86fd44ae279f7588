"""Shipped checkpoints: the command on the card still asks for what was trained."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path

import pytest

from pilotwave.config import compose, plain, read_yaml
from robots.behaviour import load

FOLDERS = sorted(path for path in (Path(__file__).parent.parent / "checkpoints").iterdir() if path.is_dir())
BEHAVIOURS = [path for path in FOLDERS if path.name.endswith("-behaviour")]
CHECKPOINTS = [path for path in FOLDERS if path not in BEHAVIOURS]
# options that came since, off
LATER = {"input_perturbation": 0.0, "variance": "fixed", "forecast": "hold", "past_actions": 0, "dense": False, "discount": 0.0}
HOUSEKEEPING = {"seed", "save_every"}  # the seed is compared by itself


def differences(wanted: Mapping, trained: Mapping, where: str = "") -> list[str]:
    """The keys whose values differ, but for options that did not exist then and are off now."""
    found = []
    for key in sorted((wanted.keys() | trained.keys()) - HOUSEKEEPING):
        a, b = wanted.get(key), trained.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{where}{key}.")
        elif a != b and not (key not in trained and a == LATER.get(key)):
            found.append(f"{where}{key}: {a} asked for, {b} trained")
    return found


@pytest.mark.parametrize("folder", CHECKPOINTS, ids=lambda path: path.name)
def test_the_cards_command_asks_for_what_was_trained(folder):
    card, config = json.loads((folder / "card.json").read_text()), read_yaml(folder / "config.yaml")
    program, command, *overrides = shlex.split(card["command"])
    assert (program, command) == ("pilotwave", "train")
    cfg = compose("train", overrides)
    assert differences(plain(cfg[config["kind"]]), config["algorithm"]) == []
    assert differences(plain(cfg.train), config["train"]) == []
    assert (cfg.seed or 0) == config["train"]["seed"]
    assert f"{config['task']}-{config['name'].replace('_', '-')}" == folder.name
    for fact in ("data", "data_description", "training_note", "scores", "training_seconds", "commit", "sha256"):
        assert card[fact]


@pytest.mark.parametrize("folder", BEHAVIOURS, ids=lambda path: path.name)
def test_behaviour_policies_cards(folder):
    """The command asks for what was trained; the qualities are on the card, from 20 episodes or more; small and NumPy's."""
    card, config, behaviour = json.loads((folder / "card.json").read_text()), read_yaml(folder / "config.yaml"), load(folder)
    program, command, *overrides = shlex.split(card["command"])
    assert (program, command) == ("pilotwave", "behaviour")
    cfg = plain(compose("behaviour", overrides))
    assert differences({key: cfg[key] for key in config["algorithm"]}, config["algorithm"]) == []
    assert cfg["seed"] == config["algorithm"]["seed"]
    assert f"{cfg['task']['name']}-behaviour" == f"{config['task']}-behaviour" == folder.name
    for fact in ("training_note", "training_seconds", "steps", "commit", "sha256"):
        assert card[fact]
    assert not card["commit"].endswith("-dirty")
    assert card["scores"]["episodes"] >= 20
    for quality in ("random", "medium", "expert"):
        assert card["scores"][quality]["trained_steps"] == behaviour.qualities[quality][-1]
        assert behaviour.policies(quality)
    assert behaviour.qualities["replay"][0] == 0
    assert behaviour.qualities["replay"][-1] == behaviour.qualities["medium"][0]
    assert (folder / "model.safetensors").stat().st_size < 1_000_000
