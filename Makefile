.DEFAULT_GOAL := help
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
PY := .venv/bin/python
export PYTHONPATH := $(CURDIR):$(CURDIR)/gen

.PHONY: help setup demo test test-unit bench chaos upgrade-test fuzz check image k8s-lint k8s-test sbom format up down lock clean

help: ## list the targets
	@awk -F ":.*## " '/^[a-z0-9-]+:.*## / { printf "%-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## install everything that the other targets need, once
	@bash localstack/setup.sh

demo: setup ## run the whole journey on real servers and show it (INPUT=file.csv streams that file)
	@$(PY) -m demo $(if $(INPUT),--input "$(INPUT)")

test: setup ## unit, integration and end-to-end tests against real servers
	@$(PY) -m pytest

test-unit: setup ## only the tests that need no server
	@$(PY) -m pytest tests/unit

bench: setup ## how fast it is, as ratios to limits of the same run (JSON lines)
	@$(PY) -m bench

chaos: setup ## faults under load, judged by what was acknowledged (JSON lines; more than an hour)
	@$(PY) -m chaos

upgrade-test: setup ## the release before and this one side by side under load: nothing lost, no request failed
	@$(PY) -m chaos --scenario upgrade

fuzz: setup ## odd input for every parser and door, some 8 minutes (JSON lines; FUZZ_SECONDS=n)
	@$(PY) -m fuzz

check: setup k8s-lint ## what CI runs before the tests: style, types, import rules, contracts, manifests, docs
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy
	@.venv/bin/lint-imports
	@.venv/bin/buf lint proto
	@! git grep -nE '^(<{7}|>{7})( |$$)' || { echo 'a merge was committed before it was done'; exit 1; }
	@$(PY) -m localstack.doclinks README.md docs
	@.venv/bin/bandit -q -c pyproject.toml -r services smdih_client localstack
	@$(PY) -m localstack.secrets_scan

sbom: setup ## what the product is made of, with licences, as .local/sbom.json (CycloneDX)
	@$(PY) -m localstack.sbom .local/sbom.json

image: setup ## the one image of all processes, into .local/image (as root; no container engine)
	@bash deploy/image/build.sh

k8s-lint: setup ## the Kubernetes manifests against schemas and checkov; needs no cluster
	@bash deploy/k8s/lint.sh

k8s-test: setup ## the image and the hub on the cluster that kubectl reaches, after `make image` (docs/kubernetes.md)
	@$(PY) -m deploy.image.confined
	@$(PY) -m deploy.k8s.check

format: setup ## put the code into the agreed form
	@.venv/bin/ruff check --fix -q . || true
	@.venv/bin/ruff format .

up: setup ## start the stack and all services and leave them running
	@$(PY) -m localstack up

down: ## stop what `make up` started
	@if [ -x $(PY) ]; then $(PY) -m localstack down; fi

lock: ## pin the requirements anew, with hashes
	@for name in base dev image k8s; do .venv/bin/uv pip compile -q --generate-hashes --no-header requirements/$$name.in -o requirements/$$name.txt; done
	@.venv/bin/uv pip compile -q --generate-hashes --no-header --no-deps requirements/model.in -o requirements/model.txt
	@.venv/bin/uv pip compile -q --generate-hashes --no-header requirements/uv.in -o requirements/uv.txt

clean: down ## remove everything that setup and the local stack made
	rm -rf .local .venv gen
