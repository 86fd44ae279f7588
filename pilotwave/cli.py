"""The command line: `pilotwave COMMAND [RUN] key=value ...`. It wires; the packages compute."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from pilotwave import __version__
from pilotwave.errors import UserError, nearest
from pilotwave.plugins import load_plugins

# Command: (the setting that its first word gives, one line on what it does).
COMMANDS: dict[str, tuple[str, str]] = {
    "collect": (
        "",
        "drive a task with its scripted controller or behaviour policies and record it: task=NAME steps=N out=FILE.hdf5",
    ),
    "data": ("path", "print what a data set holds and what is wrong with it: pilotwave data PATH"),
    "train": ("", "learn from recorded data: planner=NAME (or policy=, world_model=) task=NAME data=PATH out=FOLDER"),
    "behaviour": ("", "train a locomotion task's behaviour policies, whose data `collect` records: task=hopper out=FOLDER"),
    "rollout": ("run", "measure a planner or policy on its task: pilotwave rollout RUN episodes=100 json=out.json"),
    "tune": ("run", "find the best sampler's table for a run's weights: pilotwave tune RUN evaluations=5"),
    "fit": ("run", "fit a correction, statistics or safe plans' margin to a run: pilotwave fit RUN what=calibration data=PATH"),
    "dream": ("run", "measure a world model beside the simulator: pilotwave dream RUN episodes=50 horizon=100"),
    "deploy": ("", "drive a robot in real time: robot=mujoco task=NAME policy=RUN seconds=60"),
    "demo": ("", "from nothing to a moving robot: collect, train, roll out, drive; writes a video and a report"),
    "tasks": ("", "list the tasks, algorithms, samplers and robots there are"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, 2 for what the user got wrong, 130 when interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # OpenMP's threads spin while they wait for each other: on a busy machine that slows training many times over
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        print("pilotwave: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader (`| head`) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UserError, OSError, MemoryError) as error:
        if os.environ.get("PILOTWAVE_DEBUG"):
            raise
        print(f"pilotwave: error: {' '.join(_explain(error).split())}", file=sys.stderr)
        return 2


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"pilotwave {__version__}")
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        raise nearest("command", command, COMMANDS)
    if any(word in ("-h", "--help") for word in rest):
        print(usage(command))
        return 0
    overrides, plugins = _split(command, rest)
    load_plugins(plugins)
    module = importlib.import_module(f"pilotwave.commands.{command}")
    return int(module.run(overrides) or 0)


def _split(command: str, words: list[str]) -> tuple[list[str], list[str]]:
    """The overrides (the positional argument among them, under its own key) and the plug-ins to import."""
    positional = COMMANDS[command][0]
    overrides: list[str] = []
    plugins: list[str] = []
    for index, word in enumerate(words):
        is_positional = positional and index == 0 and ("=" not in word or Path(word).exists())
        if word.startswith("plugins="):
            plugins += [name.strip() for name in word.removeprefix("plugins=").strip("[]").split(",") if name.strip()]
        elif word.startswith("-"):
            name, _, value = word.lstrip("-").partition("=")
            raise UserError(f"unknown option '{word}'; settings are written key=value: {name}={value or 'VALUE'}")
        elif is_positional:
            overrides.append(f"{positional}={word}")
        elif "=" not in word and not word.startswith("~"):
            raise UserError(f"cannot read '{word}'; settings are written key=value (see 'pilotwave {command} --help')")
        else:
            overrides.append(word)
    return overrides, plugins


def usage(command: str | None = None) -> str:
    """What `--help` prints: the list of commands, or one command's settings with their defaults."""
    if command is None:
        width = max(map(len, COMMANDS))
        lines = [f"  {name:<{width}}  {line}" for name, (_, line) in COMMANDS.items()]
        return "\n".join(
            [
                "usage: pilotwave COMMAND [RUN] key=value ...",
                "",
                *lines,
                "",
                "pilotwave COMMAND --help lists a command's settings, in Hydra's grammar (planner.horizon=256).",
                "plugins=MODULE imports your own algorithms. PILOTWAVE_DEBUG=1 shows tracebacks.",
            ]
        )
    positional, line = COMMANDS[command]
    head = f"usage: pilotwave {command} {positional.upper() + ' ' if positional else ''}key=value ...\n{line}"
    file = files("configs").joinpath(f"{command}.yaml")
    return f"{head}\n\n{file.read_text(encoding='utf-8').strip()}" if file.is_file() else head


_OS_ADVICE = {
    errno.ENOENT: "no such file or folder",
    errno.EACCES: "no permission; choose a place you may write to",
    errno.EROFS: "a read-only file system; choose a place you may write to",
    errno.ENOSPC: "the disk is full; free some space and run the same command again",
    errno.EDQUOT: "the disk quota is used up; free some space and run the same command again",
    errno.EISDIR: "a folder; expected a file",
    errno.ENOTDIR: "a file stands where a folder is needed",
    errno.EEXIST: "exists already",
}


def _explain(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        advice = _OS_ADVICE.get(error.errno, error.strerror or "input or output failed")
        return f"{error.filename}: {advice}" if error.filename is not None else advice
    if isinstance(error, MemoryError):
        return "out of memory; use a smaller batch, fewer samples or environments"
    return str(error)


if __name__ == "__main__":
    sys.exit(main())
