# Two commands for a newcomer: `make demo` and `make test`. Everything runs in .venv, which the first one makes.
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOCKS := requirements.lock requirements-nodeps.lock
WORKERS := 2

.PHONY: setup test test-all lint demo bench clean
.DELETE_ON_ERROR:

setup: $(STAMP)

# The stamp is the last thing written, so that a second run skips the setup and a broken one starts again.
$(STAMP): $(LOCKS) pyproject.toml
	@python=; for name in $(PYTHON) python3.11 python3.12 python3.13 python3 python; do \
	  if $$name -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then python=$$name; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "make: no Python 3.11 or newer with venv found; install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python" >&2; exit 2; \
	fi; \
	echo "Making $(VENV) with $$($$python --version); this happens once"; \
	$$python -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-nodeps.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

test: setup
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-all: setup
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m ''

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

demo: setup
	$(BIN)/pilotwave demo out=demo

bench: setup
	$(BIN)/python benchmarks/executor.py
	$(BIN)/python benchmarks/training_throughput.py
	$(BIN)/python benchmarks/control_loop.py

clean:
	rm -rf $(VENV) build dist *.egg-info demo
