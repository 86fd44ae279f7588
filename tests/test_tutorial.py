"""The tutorial: its code and its commands run as they stand, in the order of the page."""

import json
import re
import shlex
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parent.parent / "docs" / "tutorial.md"


def blocks():
    return re.findall(r"^```(python|sh)\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.M | re.S)


def test_the_tutorial_runs(tmp_path, monkeypatch, capsys):
    from pilotwave.cli import main

    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for language, code in blocks():
        if language == "python":
            exec(compile(code, str(PAGE), "exec"), names)
            continue
        for line in code.strip().splitlines():
            program, *words = shlex.split(line)
            assert program == "pilotwave"
            assert main(words) in (0, None), line
    errors = json.loads((tmp_path / "runs/cups/card.json").read_text())["held_out"]["groups"]
    for group in errors.values():  # what the page promises of step 3
        assert group["policy"]["mae"] < min(group["hold_last_action"]["mae"], group["linear_regression"]["mae"])
    assert names["reached"].count(True) >= 8
    assert json.loads((tmp_path / "umaze.json").read_text())["episodes"] == 4
    assert "cups reached" in capsys.readouterr().out


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#]+)\)", PAGE.read_text(encoding="utf-8")))))
def test_its_links_lead_somewhere(link):
    assert (PAGE.parent / link).exists()
