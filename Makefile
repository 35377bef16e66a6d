# Targets for people. `make` alone shows them.
PY := .venv/bin/python

.PHONY: help setup demo demo-kafka test test-kernels test-faults test-cluster check format bench wheel lock clean

help: ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## install what is missing: system packages (as root), .venv, the BPF object
	@scripts/setup

demo: setup ## trace real binds into files and replay them (root; no server)
	@$(PY) scripts/demo.py

demo-kafka: setup ## the same through a real Apache Kafka and schema registry, started and stopped here
	@$(PY) -m tests.broker run --registry -- $(PY) scripts/demo.py --kafka

check: setup ## ruff and mypy
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check --quiet .
	@.venv/bin/mypy

test: check ## everything, on real parts: BPF on this kernel and in others, Apache Kafka, a schema registry (root)
	@scripts/setup test
	@$(PY) -m pytest

test-kernels: setup ## every tier in Debian's kernels 5.10 to 7.3 and on arm64, in QEMU; writes the README's table
	@$(PY) -m tests.kernel matrix --readme

test-faults: setup ## faults under load, and what becomes of every attempt; writes the table of docs/delivery.md (root; 10 minutes)
	@scripts/setup test
	@$(PY) -m tests.faults matrix --write

test-cluster: setup ## the agent as a DaemonSet of a real Kubernetes, built, started and stopped here (root; first time 15 minutes)
	@scripts/setup test
	@echo "test-cluster: building what is missing: Kubernetes, containerd and etcd, and the agent's image by docker"
	@$(PY) -m tests.cluster fetch
	@echo "test-cluster: the agent in pods of a cluster of one node, the API server gone and back, and the host as before"
	@$(PY) -m pytest tests/cluster/cases

format: setup ## put the sources into their form
	@.venv/bin/ruff check --fix-only --quiet .
	@.venv/bin/ruff format --quiet .

bench: ## measure beside what a user would take instead; prints the README's table (root; about 20 minutes)
	@scripts/setup bench
	@$(PY) -m benchmarks

wheel: setup ## dist/*.whl and dist/*.tar.gz, with the compiled BPF object and the schemas
	@.venv/bin/hatchling build

lock: ## renew requirements*.txt from pyproject.toml (needs uv)
	uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --extra signing pyproject.toml -o requirements.txt
	uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --extra signing --group dev pyproject.toml -o requirements-dev.txt

clean: ## remove what was built here
	rm -rf .venv dist build demo bpf/*.o benchmarks/bindload .mypy_cache .ruff_cache
