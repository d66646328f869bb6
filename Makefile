PYTHON ?= python3
# The version the tests were last run with. Any torch>=2.11 does: make clean test TORCH=torch
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo test test-nightly test-matrix oldest newest inception lint docs notebooks bench gpu hub \
	wheels clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## draw digits and emoji with the shipped models at 1 to 32 steps
	$(BIN)/tim demo

test: lint ## lint, then run every test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-nightly: lint inception ## the same and longer sweeps over shapes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not inception"

# torch-fidelity needs torchvision, which does not import beside a CPU build of torch.
inception: ## test FID's network with the real torch-fidelity, in an environment of its own
	test -d build/matrix/$@ || $(PYTHON) -m venv build/matrix/$@
	TIM_KERNELS_CUDA_ARCHS=none build/matrix/$@/bin/python -m pip install \
		torch==2.14.1 torchvision==0.29.1 pytest --editable ".[eval]"
	OMP_NUM_THREADS=1 build/matrix/$@/bin/python -m pytest -m inception tests/system/test_evaluation_inception.py

# One end, another Python, some tests:
#   make test-matrix ENDS=oldest PYTHON=python3.10 TESTS=tests/kernels/test_swiglu.py
ENDS := oldest newest
TESTS := tests/kernels tests/test_packaging.py
oldest: VERSIONS := torch==2.11.0 triton==3.6.0 "numpy<2.3"
newest: VERSIONS := torch==2.15.0 triton==3.9.0

test-matrix: $(ENDS) ## test the kernels with the oldest and the newest torch and Triton

oldest newest:
	test -d build/matrix/$@ || $(PYTHON) -m venv build/matrix/$@
	TIM_KERNELS_CUDA_ARCHS=none build/matrix/$@/bin/python -m pip install $(VERSIONS) --editable ".[test]"
	OMP_NUM_THREADS=1 build/matrix/$@/bin/python -m pytest -n 2 $(TESTS)
	build/matrix/$@/bin/python -m pytest -m "nightly or not nightly" tests/bench/test_resources.py

lint: $(VENV)/.test ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/* tests/csrc/emulation/*

docs: $(VENV)/.docs ## build the site of docs/ into build/site
	$(BIN)/python docs/build.py
	$(BIN)/zensical build --strict --clean

notebooks: $(VENV)/.docs ## run docs/notebooks/ again and keep what they print
	$(BIN)/python docs/execute.py

bench: $(VENV)/.bench ## count, read the compiled kernels, time what runs here, and report
	$(BIN)/python -m benchmarks traffic
	$(BIN)/python -m benchmarks resources
	mkdir -p build
	$(BIN)/python -m pytest -q benchmarks --benchmark-json build/benchmarks.json
	$(BIN)/python -m benchmarks report --write

# On a bare GPU machine: system Python with torch, triton and pytest, no download, no environment.
# PART=tests, ops or model runs one of the three, PART=short some of each in nine minutes; OUT is the
# folder for the results.
gpu: ## build, prove and measure on this machine's GPU: make gpu PART=all OUT=benchmarks/results
	$(PYTHON) -m benchmarks.gate --part $(or $(PART),all) --out $(or $(OUT),build/gate) \
		$(if $(COMMIT),--commit $(COMMIT)) $(if $(WHEELS),--wheels $(WHEELS))

hub: $(VENV)/.test ## lay out a repository for Hugging Face's kernel hub: make hub OUT=build/hub
	$(BIN)/python setup.py hub --out $(or $(OUT),build/hub)

wheels: $(VENV)/.torch ## download, into wheels/, what a bare GPU machine may lack
	$(BIN)/python -m pip download --no-deps --only-binary=:all: --python-version 3.12 \
		--implementation py --platform any --dest wheels --requirement benchmarks/gate/wheels.txt

clean: ## remove the environment, builds and caches
	rm -rf $(VENV) build dist wheels *.egg-info .benchmarks .cache .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install "$(TORCH)"
	touch $@

# .venv/.EXTRA: the package is installed with that extra. timm comes alone, for its layers: the
# torchvision that it asks for needs a CUDA build of PyTorch, and breaks transformers beside another.
# Pillow 13 resized the golden pictures; gradio asks for an older one and runs with it.
$(VENV)/.demo $(VENV)/.test $(VENV)/.docs $(VENV)/.bench: $(VENV)/.%: $(VENV)/.torch pyproject.toml setup.py
	$(BIN)/python -m pip install --editable ".[$*]"
	$(if $(filter test,$*),$(BIN)/python -m pip install --no-deps "timm>=1.0" "pillow==13.*")
	touch $@
