# Each target sets up what it needs in .venv or beside it, from Python 3.11 or newer and the network.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest
LINT := .venv-lint
ACCELERATORS := .venv-accelerators
# Two workers: more cost more in compilation than they gain.
WORKERS ?= 2

.PHONY: test coverage test-long test-lowest test-deprecations demo spikes lint format wheel bench accelerators memory memory-accelerators soak study study-rules rules mutation docs links colabs clean

test: lint $(VENV)/test
	$(BIN)/pytest -n $(WORKERS)

# How much of the package the tests run: apart, because it takes a sixth more of their time.
coverage: $(VENV)/test
	$(BIN)/pytest -n $(WORKERS) --cov --cov-report=term

# With the combinations of clippers, layouts and modes that `make test` leaves out: tests/breadth.py.
test-long: $(VENV)/test
	$(BIN)/pytest -n $(WORKERS) -m ""

# With the lowest versions that pyproject.toml allows of all that it names.
test-lowest: $(LOWEST)/test
	$(LOWEST)/bin/pytest -n $(WORKERS)

# What a later version of JAX, NumPy or Python will refuse.
test-deprecations: $(VENV)/test
	$(BIN)/pytest -n $(WORKERS) -W error

lint: $(LINT)/lint
	$(LINT)/bin/ruff check .
	$(LINT)/bin/ruff format --check .
	$(LINT)/bin/mypy

format: $(LINT)/lint
	$(LINT)/bin/ruff check --fix .
	$(LINT)/bin/ruff format .

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

# What the same costs on a TPU and on a GPU, by their compilers: it needs neither.
accelerators: $(ACCELERATORS)/accelerators
	$(ACCELERATORS)/bin/python benchmarks/accelerators.py $(ARGS)

# Temporary memory and time of gradients that are computed block by block.
memory: $(VENV)/test
	$(BIN)/python benchmarks/memory.py

# The memory of these gradients on a TPU and on a GPU, by their compilers.
memory-accelerators: $(ACCELERATORS)/accelerators
	$(ACCELERATORS)/bin/python benchmarks/memory.py --devices v5e h100

# Why autoclip() follows the rule that it does: what candidates do about thirteen streams of norms.
rules: $(VENV)/test
	$(BIN)/python benchmarks/auto_rules.py

# A million steps of every clipper against float64.
soak: $(VENV)/test
	$(BIN)/python benchmarks/soak.py

# Which clipper, at which learning rate: hours; ARGS="--task regression" for a part.
study: $(VENV)/study
	PYTHONPATH=benchmarks:examples $(BIN)/python -m study $(ARGS)

# Why autoclip() follows the rule that it does: what candidates lose on half of the study.
study-rules: $(VENV)/study
	PYTHONPATH=benchmarks:examples $(BIN)/python -m study.rules $(ARGS)

# Which small mistakes would the tests not notice? Half an hour; ARGS="--modules norms" for a part.
mutation: $(VENV)/mutation
	$(BIN)/python mutation/run.py $(ARGS)

# Every notebook from top to bottom, in a copy. To renew what they show: colabs/execute.py
colabs: $(VENV)/colabs
	$(BIN)/python colabs/execute.py --check

# Warnings are errors. It needs no network once its tools are installed.
docs: $(VENV)/docs
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

# The links that leave the site.
links: $(VENV)/docs
	$(BIN)/sphinx-build -b linkcheck docs docs/_build/links

# A stamp per set of extras, renewed when the dependencies change.
$(VENV)/test $(VENV)/demo $(VENV)/study $(VENV)/docs $(VENV)/colabs $(VENV)/mutation: $(VENV)/%: pyproject.toml | $(BIN)/uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable ".[$*]"
	@touch $@

# From nothing each time: a newer version that is installed already would be kept.
$(LOWEST)/test: pyproject.toml | $(BIN)/uv
	rm -rf $(LOWEST)
	$(BIN)/uv venv --quiet --python $(BIN)/python $(LOWEST)
	$(BIN)/uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct \
		--editable ".[test]"
	@touch $@

# The versions that pyproject.toml names, and nothing that they require.
$(LINT)/lint: pyproject.toml | $(BIN)/uv
	rm -rf $(LINT)
	$(BIN)/uv venv --quiet --python $(BIN)/python $(LINT)
	$(BIN)/uv pip install --quiet --python $(LINT)/bin/python --no-deps --group lint
	@touch $@

# Apart from the others: two gigabytes of compilers, and a JAX that has plugins for devices.
$(ACCELERATORS)/accelerators: pyproject.toml | $(BIN)/uv
	$(BIN)/uv venv --quiet --allow-existing --python $(BIN)/python $(ACCELERATORS)
	$(BIN)/uv pip install --quiet --python $(ACCELERATORS)/bin/python \
		--editable ".[accelerators]"
	@touch $@

# It takes seconds where pip takes two minutes.
$(BIN)/uv: | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "uv>=0.7"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) $(LOWEST) $(LINT) $(ACCELERATORS) .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage build dist docs/_build docs/colabs
