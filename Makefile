# Everything runs in .venv, which the first target that is called creates.
ALGO = async_one_step_q
ENV = PongNoFrameskip-v4
# Environment steps, by default those of the hyperparameters' file
STEPS =
# Further options of `sb3-async1step train` or `enjoy`
OPTIONS =
# Atari's games run in ale_py's C++ engine. A game takes seconds: 20 evaluations instead of the Zoo's 400
ATARI_OPTIONS = $(if $(findstring NoFrameskip-v4,$(ENV)),--vec-env ale --eval-freq 500000)

PYTHON = python3
BIN = .venv/bin
INSTALLED = .venv/installed
LOWEST_BIN = .venv-lowest/bin
LOWEST_INSTALLED = .venv-lowest/installed
LOWEST_TESTS = tests/test_learn.py tests/test_callbacks.py tests/test_optimizers.py tests/test_packaging.py \
	tests/test_random_configurations.py tests/test_vec_env_split.py tests/test_ale_vec_env.py tests/test_zoo.py \
	tests/test_sb3_internals.py tests/test_save_load.py -k "not resumed"

.PHONY: train enjoy test test-slow test-lowest format lint type commit-checks docs bench report

train: $(INSTALLED)
	$(BIN)/sb3-async1step train --algo $(ALGO) --env $(ENV) $(if $(STEPS),--n-timesteps $(STEPS)) --progress \
		$(ATARI_OPTIONS) $(OPTIONS)

enjoy: $(INSTALLED)
	$(BIN)/sb3-async1step enjoy --algo $(ALGO) --env $(ENV) --folder logs $(OPTIONS)

# Small networks gain nothing from several threads of PyTorch. One process more than two cores, since tests wait for
# threads and processes a fifth of the time
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 3 --dist worksteal

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

# The lower ends of setup.cfg's ranges: tests that touch each package that has one
test-lowest: $(LOWEST_INSTALLED)
	OMP_NUM_THREADS=1 $(LOWEST_BIN)/python -m pytest --numprocesses 2 --dist worksteal $(LOWEST_TESTS)
	$(LOWEST_BIN)/ruff check .

format: $(INSTALLED)
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(INSTALLED)
	$(BIN)/mypy

# One after another, also with make --jobs
commit-checks:
	$(MAKE) format
	$(MAKE) lint
	$(MAKE) type

docs: $(INSTALLED)
	$(BIN)/sphinx-build -W -b html docs docs/_build/html

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.throughput

report: $(INSTALLED)
	$(BIN)/python -m benchmarks.report

$(INSTALLED): setup.cfg setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --constraint constraints.txt --editable '.[zoo,atari,box2d,minatar,ray,tests,docs]'
	touch $@

$(LOWEST_INSTALLED): setup.cfg setup.py pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv .venv-lowest
	$(LOWEST_BIN)/pip install --constraint constraints-lowest.txt --editable '.[zoo,atari,minatar,tests]'
	touch $@
