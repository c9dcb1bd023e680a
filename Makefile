# Two commands set everything up: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS := $(VENV)/.docs-installed
TORCH ?= 2.13.0

TIME ?= 600
# each of two workers has a core: more threads would only wait for one another
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: demo test test-integration test-slow docs notebooks walk coverage lint fuzz kills bench bench-quantization bench-calibrated bench-mixed-precision bench-rdo bench-executorch bench-coreml bench-onnx bench-peer bench-accuracy bench-encoder bench-e2e bench-memory bench-deep bench-workers bench-device clean

demo: $(STAMP)
	$(BIN)/python examples/digits/run.py --out out/digits

test: $(STAMP)
	$(PYTEST) -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-integration: $(STAMP)
	$(PYTEST) -m "integration and not slow" -n 2 --dist loadscope --no-loadscope-reorder $(ARGS)

# the guide with the API from docstrings, in out/docs; a dead link or an unknown name stops it
docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# technique pages of the guide as executed notebooks, in out/notebooks
notebooks: $(DOCS)
	$(BIN)/python examples/notebooks.py out/notebooks

# README and guide as a reader follows them: a fresh clone, a fresh environment, every step, with times
walk:
	$(PYTHON) tests/helpers/walk.py $(ARGS)

test-slow: $(DOCS)
	$(BIN)/python -m pytest -m slow $(ARGS)

# the first two tiers, with what they cover; the report's last line is the total
coverage: $(STAMP)
	$(PYTEST) -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder --cov --cov-report=term:skip-covered $(ARGS)

# random configs, files, pass pipelines and graphs for TIME seconds; what fails with a minimal reproduction
fuzz: $(STAMP)
	$(BIN)/python tests/fuzz/run.py --time $(TIME) $(ARGS)

kills: $(STAMP)
	$(BIN)/python tests/fuzz/kills.py $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Peers live in environments of their own; without these the benchmarks skip them and say so.
bench-peer:
	$(PYTHON) -m venv .venv-peer
	.venv-peer/bin/pip install --quiet torch==$(TORCH)
	.venv-peer/bin/pip install --quiet "coreai-opt[coreai]==0.4.0" "transformers>=5.0,<6"
	$(PYTHON) -m venv .venv-nncf
	.venv-nncf/bin/pip install --quiet torch==$(TORCH)
	.venv-nncf/bin/pip install --quiet nncf

# what people wait for first, then the kernels, both beside the peer
bench: $(STAMP)
	$(BIN)/python tests/benchmarks/end_to_end.py --targets coreai
	$(BIN)/python tests/benchmarks/palettization.py

bench-quantization: $(STAMP)
	$(BIN)/python tests/benchmarks/quantization.py

bench-mixed-precision: $(STAMP)
	$(BIN)/python tests/benchmarks/mixed_precision.py

bench-rdo: $(STAMP)
	$(BIN)/python tests/benchmarks/rdo.py

bench-executorch: $(STAMP)
	$(BIN)/python tests/benchmarks/tables_in_pte.py

bench-coreml: $(STAMP)
	$(BIN)/python tests/benchmarks/coreml_weights.py

bench-onnx: $(STAMP)
	$(BIN)/python tests/benchmarks/onnx_runtime.py

bench-calibrated: $(STAMP)
	$(BIN)/python tests/benchmarks/calibrated.py

bench-e2e: $(STAMP)
	$(BIN)/python tests/benchmarks/end_to_end.py $(ARGS)

# one net, form or maker: ARGS="--nets vit --methods w8a8 --seeds 0"
bench-accuracy: $(STAMP)
	$(BIN)/python tests/benchmarks/accuracy.py $(ARGS)

bench-encoder: $(STAMP)
	$(BIN)/python tests/benchmarks/accuracy_encoder.py $(ARGS)

# peak memory of a model on disk: ARGS="12" makes it of 12 GiB
bench-memory: $(STAMP)
	$(BIN)/python tests/benchmarks/low_memory.py $(ARGS)

# clustering, error feedback, soft palettes and tuning on every device here, beside what runs without one
bench-device: $(STAMP)
	$(BIN)/python tests/benchmarks/device.py $(ARGS)

# what a second worker gains in clustering: threads and processes, with the same bytes
bench-workers: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/workers.py $(ARGS)

# time and memory of error feedback on 6, 12 and 24 layers, and what two workers gain
bench-deep: $(STAMP)
	$(BIN)/python tests/benchmarks/deep_models.py $(ARGS)

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	# torch first, in the version that is tested: it then holds for everything that depends on it
	$(BIN)/pip install --quiet torch==$(TORCH)
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

$(DOCS): $(STAMP)
	$(BIN)/pip install --quiet --editable ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) .venv-peer build dist out *.egg-info
