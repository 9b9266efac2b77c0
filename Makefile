# Every target installs what it needs first; on a fresh machine `make demo` is enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV_READY := $(VENV)/.uv
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test lint soak bench clean lock

help:
	@echo "make demo   draw a collection, train a model, label everything, look at the result"
	@echo "make test   the tests (IMGBATCH_TEST_DATA=FOLDER adds those on real images)"
	@echo "make lint   ruff and mypy"
	@echo "make soak   the long tests"
	@echo "make bench  the short benchmarks"
	@echo "make lock   resolve the dependencies of pyproject.toml into requirements.lock"
	@echo "make clean  remove the environment, caches and the demo's output"

demo: $(INSTALLED)
	$(BIN)/imgbatch demo -o out/demo --images 3000 --seed 0

test: $(INSTALLED)
	$(BIN)/pytest -m "not soak" -n 2 --dist loadgroup

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

soak: $(INSTALLED)
	$(BIN)/pytest -m soak

# Without arguments a benchmark runs its short form.
bench: $(INSTALLED)
	set -e; for name in decode plan efficiency peers; do echo "== $$name"; $(BIN)/python -m jobs.bench.$$name; done

lock: $(UV_READY)
	$(BIN)/uv pip compile --universal --generate-hashes --python-version 3.11 --no-emit-index-url --no-header \
		--extra dev pyproject.toml -o requirements.lock

clean:
	rm -rf $(VENV) out/demo dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# uv comes from its own entry in the lock, so that its hash is checked like every other. An environment without pip is
# what Debian's Python leaves behind where python3-venv is not installed.
$(UV_READY): requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "make: $(PYTHON) is no Python 3.11 or newer; say which one is: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	awk '/^uv==/ { found = 1; print; next } /^[^ ]/ { found = 0 } found' requirements.lock > $(VENV)/uv.txt
	$(BIN)/python -m pip install --quiet --require-hashes --no-deps -r $(VENV)/uv.txt
	touch $@

$(INSTALLED): $(UV_READY) pyproject.toml
	$(BIN)/uv pip install --python $(BIN)/python --require-hashes -r requirements.lock
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --no-build-isolation -e .
	touch $@
