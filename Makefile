# Each target sets up what it needs in .venv, from Python 3.11 or newer and the network.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two workers: more cost more in compilation than they gain.
WORKERS ?= 2

.PHONY: test demo spikes lint format wheel bench rules clean

test: lint
	$(BIN)/pytest -n $(WORKERS) --cov --cov-report=term

lint: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: $(VENV)/demo
	$(BIN)/python examples/train_text.py

spikes: $(VENV)/demo
	$(BIN)/python benchmarks/spikes.py

# The wheel of a clean tree, installed into an environment with its dependencies and nothing else.
wheel:
	rm -rf dist && mkdir dist
	git archive --format=tar --output=dist/source.tar HEAD
	mkdir dist/source && tar -xf dist/source.tar -C dist/source
	$(PYTHON) -m venv dist/venv
	dist/venv/bin/python -m pip wheel --quiet --no-deps --wheel-dir dist dist/source
	dist/venv/bin/python -m pip install --quiet dist/*.whl
	cd dist && venv/bin/python -c "import optax_smartclip as s; print(s.__version__, s.autoclip())"

bench: $(VENV)/test
	$(BIN)/python benchmarks/bench.py

# Why autoclip() follows the rule that it does.
rules: $(VENV)/test
	$(BIN)/python benchmarks/auto_rules.py

# A stamp per set of extras, renewed when the dependencies change.
$(VENV)/test $(VENV)/demo: $(VENV)/%: pyproject.toml | $(BIN)/uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable ".[$*]"
	@touch $@

# It takes seconds where pip takes two minutes.
$(BIN)/uv: | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "uv>=0.5"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage dist
