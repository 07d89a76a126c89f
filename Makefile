# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What is never imported is not compiled to bytecode: a minute of the first run.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
BUILT := pyproject.toml setup.py constraints.txt $(wildcard csrc/*.* csrc/*/*.*)
CHECKED := samfast kernels benchmarks tests docs examples setup.py

# Test files run side by side in that many processes, which share the cores between them.
WORKERS ?= 2

# Threads that wait without spinning: on shared cores that is the difference of a factor of ten.
export OMP_WAIT_POLICY ?= PASSIVE

# Without bytecode each of the tests' processes compiles the sources of torch again.
unexport PYTHONDONTWRITEBYTECODE

# Tests of modules that a GPU runs too.
ON_GPU := adapt_former adapt_former_black_box aux_loss black_box cobot cobot_adapt_former \
  conv_lora_black_box conv_lora_golden conv_lora_in_windows fuse hypercomplex_black_box \
  kronecker kronecker_black_box \
  rel_pos_attention rel_pos_attention_black_box sam_block sam_block_black_box task_lora

# For the GPU that is here alone: six architectures take six times as long.
ARCH = $$($(PYTHON) -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
BUILD_HERE = TORCH_CUDA_ARCH_LIST=$${TORCH_CUDA_ARCH_LIST:-$(ARCH)} $(PYTHON) setup.py --quiet build_ext --inplace

# Beside a GPU, where pytest-xdist is installed: most of the time goes to compiling kernels.
GPU_WORKERS ?= 12

.PHONY: demo test test-slow test-elsewhere test-gpu smoke-gpu sanitize-gpu bench bench-gpu carry-gpu first-gpu \
  docs docs-check lint hashes clean

demo: $(VENV)/.train
	$(BIN)/python -m samfast.training.demo --output runs/demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 15 \
	  -m "not (slow or slow_on_cpu)"

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m "slow or slow_on_cpu"

# As processors of other kinds would compute: 25 minutes at most.
test-elsewhere: $(VENV)/.dev
	$(BIN)/python tests/elsewhere.py

# On a machine with a GPU, in whatever environment PYTHON is: nothing is downloaded.
test-gpu:
	$(BUILD_HERE)
	TORCHINDUCTOR_COMPILE_THREADS=2 $(PYTHON) -m pytest -q -m "not slow" --ignore-glob='*/test_*offline.py' \
	  $$($(PYTHON) -c 'import xdist' 2>/dev/null && printf '%s ' -n $(GPU_WORKERS) --dist worksteal) \
	  tests/gpu tests/kernels tests/test_counters.py tests/test_benchmarks.py \
	  tests/instruments $(addprefix tests/modules/test_, $(addsuffix .py, $(ON_GPU)))

# The first tests for a GPU, in 150 s at most where Triton's cache is filled.
smoke-gpu:
	@$(PYTHON) -m benchmarks.smoke --look
	$(BUILD_HERE)
	$(PYTHON) -m benchmarks.smoke

# Every operation and backend at small sizes, each allocation by itself so that its bounds are known.
sanitize-gpu:
	$(BUILD_HERE)
	for tool in memcheck racecheck initcheck; do PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
	  compute-sanitizer --tool $$tool --error-exitcode 9 $(PYTHON) -c \
	  'from samfast.info import main; raise SystemExit(main(check=True))' || exit 1; done

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks.run --op lora_linear --record
	$(BIN)/python -m benchmarks.run --op conv_lora --record
	$(BIN)/python -m benchmarks.run --op cobot --record
	$(BIN)/python -m benchmarks.run --op hypercomplex --record
	$(BIN)/python -m benchmarks.run --op task_core --record
	$(BIN)/python -m benchmarks.run --op adapt_former --record
	$(BIN)/python -m benchmarks.run --op relpos_attention --record
	$(BIN)/python -m benchmarks.run --op block --record
	$(BIN)/python -m benchmarks.run --op saved_bytes

# QUICK=1: the blocks and attention of ViT-B and ViT-H, 100 s at most.
QUICK ?=
bench-gpu:
	@$(PYTHON) -m benchmarks.smoke --look
	$(BUILD_HERE)
	$(PYTHON) -m benchmarks.gpu $(if $(QUICK),--quick)

# The first minutes on a GPU: CALL=call1 or call2; REHEARSE=1: what needs no GPU.
CALL ?= call1
REHEARSE ?=
first-gpu:
	$(PYTHON) -m benchmarks.first_gpu $(CALL) $(if $(REHEARSE),--rehearse)

# Wheels for a GPU machine without a network, on a machine that has one. There, they install with
# pip install --no-index --no-deps --find-links .gpu/wheels -r benchmarks/gpu_wheels.txt
GPU_PYTHON ?= 3.12
carry-gpu:
	$(PYTHON) -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
	  --implementation cp --python-version $(GPU_PYTHON) \
	  $(foreach glibc,2_17 2_27 2_28,--platform manylinux_$(glibc)_x86_64) \
	  --dest .gpu/wheels -r benchmarks/gpu_wheels.txt
	@git describe --always --dirty --abbrev=12 > .gpu/commit
	@ls .gpu .gpu/wheels

# The site, in build/site: strict, and without a network. Its pages open from the folder, too.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "open build/site/index.html"

# Whatever a reader can copy from the built pages runs, in a clean folder.
docs-check: $(VENV)/.dev docs
	$(BIN)/python docs/check_pages.py build/site

# Of torch it reads the types; nothing is compiled. The link is where an installed samfast has them.
lint: $(VENV)/.lint
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)
	@mkdir -p build/types/samfast && ln -sfn ../../../kernels build/types/samfast/kernels
	$(BIN)/mypy

# Needs uv. The marker is that of [tool.uv] in pyproject.toml; what has one version goes without.
hashes:
	mkdir -p build
	uv pip compile --quiet --universal --python-version 3.10 --generate-hashes --no-deps --no-header \
	  --no-annotate $(foreach own,torch torchvision triton,--no-emit-package $(own)) constraints.txt \
	  --output-file build/pins.txt > /dev/null
	sed -i "s/ ; python_full_version < '3.11' or python_full_version >= '3.11.5' / /" build/pins.txt
	grep '^#' requirements-dev.txt | cat - build/pins.txt > build/requirements.txt
	mv build/requirements.txt requirements-dev.txt

clean:
	rm -rf $(VENV) .mypy_cache build dist runs *.egg-info samfast/_build.json samfast/_C*.so
	find . -name __pycache__ -prune -exec rm -rf {} +

# torch comes first: the extension is built against it, without build isolation.
$(VENV)/.base: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "samfast needs Python 3.10 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0 setuptools wheel ninja numpy
	@touch $@

$(VENV)/.lint: $(VENV)/.base
	$(PIP) mypy ruff
	@touch $@

$(VENV)/.train: $(VENV)/.base $(BUILT)
	$(PIP) --no-build-isolation -e ".[train]"
	@touch $@

$(VENV)/.docs: $(VENV)/.base $(BUILT)
	$(PIP) --no-build-isolation -e ".[docs]"
	@touch $@

# What constraints.txt lists is what ".[dev]" needs; it arrives while the extension is built.
# Of sam3 tests read one file, so that it stays apart, without the dozen packages that it needs.
$(VENV)/.dev: $(VENV)/.base $(BUILT)
	$(PIP) -r constraints.txt & others=$$!; \
	$(PIP) --no-build-isolation --no-deps -e . && wait $$others
	$(BIN)/python -m pip --disable-pip-version-check check
	$(PIP) --upgrade --no-deps --target $(VENV)/sam3 sam3==0.1.4 || echo "tests of sam3 are left out"
	@touch $@
