# Each target sets up what it needs in .venv or beside it, from Python 3.11 or newer and the network.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest
LINT := .venv-lint
ACCELERATORS := .venv-accelerators
# Two workers: more cost more in compilation than they gain.
WORKERS ?= 2
# Each worker runs a part of the files, whose tests share programs, and then helps the others.
PYTEST_OPTIONS := -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := test
.PHONY: help test coverage test-long test-lowest test-deprecations demo spikes lint format wheel bench accelerators memory memory-accelerators soak study study-rules study-updates rules placements micro-batches mutation docs links colabs clean

help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-20s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

test: lint $(VENV)/test ## Lint and run the tests, except for those marked as long.
	$(BIN)/pytest $(PYTEST_OPTIONS)

coverage: $(VENV)/test ## Show how much of the package the tests run, in a sixth more time.
	$(BIN)/pytest $(PYTEST_OPTIONS) --cov --cov-report=term

# See tests/helpers/breadth.py.
test-long: $(VENV)/test ## Test all combinations of clippers, layouts and modes.
	$(BIN)/pytest $(PYTEST_OPTIONS) -m ""

test-lowest: $(LOWEST)/test ## Test with the lowest versions that pyproject.toml allows.
	$(LOWEST)/bin/pytest $(PYTEST_OPTIONS)

test-deprecations: $(VENV)/test ## Test with warnings as errors.
	$(BIN)/pytest $(PYTEST_OPTIONS) -W error

mutation: $(VENV)/mutation ## Find small mistakes that the tests miss: over an hour; ARGS="--modules norms" for a part.
	$(BIN)/python tests/mutation/run.py $(ARGS)

lint: $(LINT)/lint ## Check style and types.
	$(LINT)/bin/ruff check .
	$(LINT)/bin/ruff format --check .
	$(LINT)/bin/mypy

format: $(LINT)/lint ## Mend the style.
	$(LINT)/bin/ruff check --fix .
	$(LINT)/bin/ruff format .

demo: $(VENV)/demo ## Train a recurrent network with five clippers: two minutes.
	$(BIN)/python examples/train_text.py

bench: $(VENV)/test ## Compare time, memory and compilation with Optax's clippers.
	$(BIN)/python benchmarks/bench.py

accelerators: $(ACCELERATORS)/accelerators ## Compile for a TPU and a GPU, which need not be there: traffic and kernels.
	$(ACCELERATORS)/bin/python benchmarks/accelerators.py $(ARGS)

memory: $(VENV)/test ## Measure temporary memory and time of gradients that are computed block by block.
	$(BIN)/python benchmarks/memory.py

memory-accelerators: $(ACCELERATORS)/accelerators ## The memory of these gradients on a TPU and a GPU, by their compilers.
	$(ACCELERATORS)/bin/python benchmarks/memory.py --devices v5e h100

spikes: $(VENV)/demo ## Run all clippers over thirteen streams of norms.
	$(BIN)/python benchmarks/spikes.py

rules: $(VENV)/test ## Run candidates for the rule of autoclip() over these streams.
	$(BIN)/python benchmarks/auto_rules.py

placements: $(VENV)/test ## Run clippers before and after eight optimizers, through a spike.
	$(BIN)/python benchmarks/placements.py

soak: $(VENV)/test ## Run a million steps of every clipper against float64.
	$(BIN)/python benchmarks/soak.py

study: $(VENV)/study ## Train all clippers on sixteen tasks: hours; ARGS="--task regression" for a part.
	PYTHONPATH=benchmarks:examples $(BIN)/python -m study $(ARGS)

study-rules: $(VENV)/study ## Train candidates for the rule of autoclip() on half of the study.
	PYTHONPATH=benchmarks:examples $(BIN)/python -m study.rules $(ARGS)

study-updates: $(VENV)/study ## Train clippers of the update, StableAdamW and spectral clipping on the transformers.
	PYTHONPATH=benchmarks:examples $(BIN)/python -m study.updates $(ARGS)

micro-batches: $(VENV)/study ## Clip examples, micro-batches or the batch where examples are damaged.
	PYTHONPATH=benchmarks:examples $(BIN)/python benchmarks/micro_batches.py $(ARGS)

docs: $(VENV)/docs ## Build the site; warnings are errors.
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

links: $(VENV)/docs ## Check the links that leave the site.
	$(BIN)/sphinx-build -b linkcheck docs docs/_build/links

colabs: $(VENV)/colabs ## Run every notebook from top to bottom, in a copy.
	$(BIN)/python docs/colabs/execute.py --check

wheel: ## Build the wheel of a clean tree and install it into an empty environment.
	rm -rf dist && mkdir dist
	git archive --format=tar --output=dist/source.tar HEAD
	mkdir dist/source && tar -xf dist/source.tar -C dist/source
	$(PYTHON) -m venv dist/venv
	dist/venv/bin/python -m pip wheel --quiet --no-deps --wheel-dir dist dist/source
	dist/venv/bin/python -m pip install --quiet dist/*.whl
	cd dist && venv/bin/python -c "import optax_smartclip as s; print(s.__version__, s.autoclip())"

clean: ## Remove all that these targets make.
	rm -rf $(VENV) $(LOWEST) $(LINT) $(ACCELERATORS) .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage build dist docs/_build

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
