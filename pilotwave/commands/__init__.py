"""One module a command, each with `run(overrides) -> int | None`; `pilotwave.cli.COMMANDS` lists them."""
