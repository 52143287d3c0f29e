# Two commands are all that is needed: `make demo` and `make test`. Each makes its environment first.
PYTHON ?= python3
VENV ?= .venv
OLD_VENV ?= .venv-trl-1.9
PYTEST_FLAGS ?= -q
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test test-trl-1.9 lint clean

demo: $(VENV)/.ready
	$(VENV)/bin/star-dss demo

test: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(PYTEST_FLAGS)

test-trl-1.9: $(OLD_VENV)/.ready
	OMP_NUM_THREADS=1 $(OLD_VENV)/bin/python -m pytest $(PYTEST_FLAGS)

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# torch goes first and alone: its pinned version then satisfies everything installed after it.
$(VENV)/.ready: pyproject.toml constraints/newest.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -c constraints/newest.txt torch
	$(VENV)/bin/pip install --quiet -c constraints/newest.txt -e '.[dev]'
	touch $@

$(OLD_VENV)/.ready: pyproject.toml constraints/trl-1.9.txt
	$(PYTHON) -m venv $(OLD_VENV)
	$(OLD_VENV)/bin/pip install --quiet -c constraints/trl-1.9.txt torch
	$(OLD_VENV)/bin/pip install --quiet -c constraints/trl-1.9.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) $(OLD_VENV) runs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
