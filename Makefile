# SPDX-License-Identifier: Apache-2.0
# Every verb of the project. `./dev VERB` is `make VERB` on a machine that may
# not have make yet. Outside binaries are always named: make bench ZTUNNEL=PATH.
SHELL := /bin/sh
PY := .venv/bin/python
export ZTUNNEL ZTUNNEL_CA H2SPEC ISTIOCTL K8S_BIN

.DEFAULT_GOAL := help
.PHONY: help ready setup demo test lint types unit bpf netns containerd peers interop slow cni cni-test deb nspawn bench bench-quick bench-attach bench-scale bench-waypoint fresh-test check protos vagrant-up vagrant-scenarios vagrant-down vagrant-test clean bench-store helm-lint image soak

help:  ## list the verbs
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

setup: ready  ## install what is missing, and make the node that `make nspawn` boots
	@[ "$$(stat -f -c %T .)" = overlayfs ] || $(PY) -m tests.nspawn.fixture

# Without the node, which takes a minute or two and only the tests of it need.
ready:
	@tools/setup

demo: ready  ## the main job on two nodes made of network namespaces
	@$(PY) -m tests.demo

test:  ## every check and test, with the seconds of each stage
	@tools/run-tests

lint:  ## style, imports, file sizes, shell scripts
	@tools/lint

types:  ## mypy, strict
	@.venv/bin/mypy

unit:  ## tests that need no kernel feature
	@$(PY) -m pytest -m "not slow" tests/unit tests/playbook tests/cli

bpf:  ## the BPF programs on this kernel
	@$(PY) -m pytest -m "root and not slow" tests/bpf

netns:  ## whole agents in network namespaces
	@$(PY) -m pytest -m "netns and not slow" tests/netns

containerd:  ## pods that a real containerd makes, attached by name
	@$(PY) -m pytest -m "containerd and not slow" tests/containerd

peers:  ## programs that are not ours against our HBONE (ZTUNNEL=PATH adds ztunnel)
	@$(PY) -m pytest -m peer tests/peers

interop:  ## meshbpf and ztunnel in one mesh, both ways (ZTUNNEL=PATH of a build with its test CA)
	@$(PY) -m pytest -m "interop and not slow" tests/peers

slow:  ## the long cases: gigabytes, thousands of streams, leak rounds
	@$(PY) -m pytest -m slow tests

cni:  ## the CNI plugin, as build/meshbpf-cni
	@mkdir -p build && gcc -static -Os -Wall -Wextra -Werror -s -o build/meshbpf-cni packaging/cni/meshbpf-cni.c

cni-test:  ## each verb of the plugin, and pods that a real containerd makes with it
	@$(PY) -m pytest -m "cni and not slow" tests/cni tests/containerd

helm-lint:  ## the Helm chart: helm lint --strict, helm template, the output against the API's types
	@tools/helm-lint

image:  ## the container image of dist/meshbpf_*.deb (BUILDER=podman or docker)
	@$(or $(BUILDER),podman) build -t meshbpf:dev -f packaging/image/Containerfile .

deb:  ## the Debian package, in dist/
	@packaging/build

nspawn:  ## a node of the built package under systemd-nspawn
	@$(PY) -m pytest -m "nspawn and not slow" tests/nspawn

vagrant-up:  ## two node VMs with containerd pods and the package (vagrant/README.md)
	@vagrant/up

vagrant-scenarios:  ## the scenarios on the VMs that are up (SCENARIOS="demo kill")
	@$(PY) -m vagrant.scenarios $(SCENARIOS)

vagrant-down:  ## destroy the VMs
	@vagrant/down

vagrant-test:  ## box, two VMs, every scenario, summary, nothing left
	@vagrant/test

cluster-test: ready  ## a real istiod on a real kube-apiserver: ISTIOD=PATH K8S_BIN=DIR
	@$(PY) -m pytest tests/cluster

bench: ready  ## throughput, latency, connection rate; with ZTUNNEL=PATH side by side
	@$(PY) -m tests.bench

bench-quick: ready  ## nine ratios to no mesh in less than a minute, one JSON object on the last line
	@$(PY) -m tests.bench.quick

SECONDS ?= 600
soak:  ## ten minutes of churn (SECONDS=N for less), after which nothing may have grown
	@$(PY) -m tests.soak --seconds $(SECONDS)

bench-store:  ## the mesh state at 200,000 workloads: memory, deltas, lookups
	@$(PY) -m tests.bench.store

bench-scale:  ## memory and CPU as the number of open connections grows
	@$(PY) -m tests.bench.scale

bench-attach:  ## seconds for 100 attaches and one more, memory of the agent
	@$(PY) -m tests.bench.attach

bench-waypoint: ready  ## a waypoint beside nginx: requests/s, latency, CPU (needs wrk, nginx, h2load)
	@$(PY) -m tests.waypoint.bench --output docs/performance/waypoint.md

fresh-test:  ## demo and tests, twice each, in a minimal Debian 12 under systemd-nspawn
	@tools/fresh-test

check: ready  ## what this kernel can do for meshbpf
	@.venv/bin/meshbpf check

protos:  ## write agent/wire/pb from agent/wire/protos
	@tools/protos

clean:  ## remove the venv and everything generated
	rm -rf .venv build dist meshbpf.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .cache
	rm -f agent/runtime/_relay.*.so
