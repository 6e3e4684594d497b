# `make demo` runs the main job, `make test` everything that a change must pass. `make help` lists the rest.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
VENV := target/venv/bin
# The tools of the virtual environment (helm, buf) come first.
export PATH := $(CURDIR)/$(VENV):$(PATH)

# Where a tree is built once and thrown away, what cargo keeps for the next build is gigabytes for nothing.
ifdef CI
export CARGO_INCREMENTAL := 0
endif

DEMO_MODELS := models/demo/weights
ROUNDS := 200
LOAD_SECONDS := 60
PROMPT := A person speaks calmly to the camera.

.PHONY: help demo demo-picture quality test setup fmt lint proto-lint build rust fuzz python chaos load parity memory-proof \
  seconds-proof full-size-proof cuda gpu-pack

help: ## Shows this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-15s %s\n", $$1, $$2}'

demo: ## Builds, and makes out/demo.mp4 of the bundled portrait, recording and small model
	scripts/setup demo
	cargo build --release --locked -p avatar
	mkdir -p out
	target/release/avatar generate --models $(DEMO_MODELS) --image models/demo/portrait.png \
	  --audio models/demo/speech.wav --prompt "$(PROMPT)" --out out/demo.mp4

demo-picture: demo ## Makes the README's animation of out/demo.mp4
	ffmpeg -v error -y -i out/demo.mp4 -vf 'scale=256:-1:flags=lanczos,fps=12.5,split[a][b];[a]palettegen[p];[b][p]paletteuse' \
	  docs/demo.gif

quality: ## Makes videos of the bundled held-out clips, and measures how well the mouth follows the voice
	cargo build --release --locked -p avatar -p e2e --bins
	target/release/quality models/demo/held-out --videos out/quality --models $(DEMO_MODELS)

test: setup fmt lint proto-lint rust python ## Installs what is missing, then format, lints and all tests
	@echo "all tests passed"

setup: ## Installs what the tests need
	scripts/setup test

fmt: ## Checks the format
	cargo fmt --all --check

lint: ## Compiles with warnings as errors
	cargo clippy --workspace --all-targets --locked -- -D warnings

proto-lint: setup ## Checks the wire contract's style
	buf lint proto

build: ## Builds everything that the tests use
	cargo build --workspace --all-targets --locked

rust: build ## Runs the Rust tests
	cargo nextest run --workspace --locked

fuzz: build ## Runs the crates' tests with other cases of the properties, until one fails
	for ((seed = 2; ; seed++)); do \
	  echo "PROPTEST_RNG_SEED=$$seed"; PROPTEST_RNG_SEED=$$seed cargo nextest run --workspace --lib --locked || exit; done

python: setup build ## Runs the clients and the chart's tests in Python
	$(VENV)/python -m pytest -q tests/python

chaos: build ## Kills processes at random moments, ROUNDS times on each database, cancels as often, and stops one of two gateways for 60 s
	cargo bench --workspace --profile dev --locked --bench chaos -- --rounds $(ROUNDS)

load: ## Measures what a gateway answers to many callers at once, for LOAD_SECONDS
	cargo bench --workspace --profile dev --locked --bench load -- --seconds $(LOAD_SECONDS)

memory-proof: ## Generates at full width and reduced depth within 4, 6, 8 and 12 GiB in proportion (6 GB of disk)
	cargo build --release --locked -p avatar -p e2e --bins
	target/release/proof

seconds-proof: ## Holds predicted seconds against measured ones at three sizes, on a quiet machine
	cargo build --release --locked -p avatar -p e2e --bins
	target/release/proof --seconds

full-size-proof: ## Generates with all 13 billion weights and all steps of tier emergency within 4 GiB (16 GB of disk, half an hour)
	cargo build --release --locked -p avatar -p e2e --bins
	target/release/proof --full-size --steps 10

parity: ## Holds the networks against the reference cases, with a row for every tensor
	cargo run --release --locked -p e2e --bin parity -- tests/goldens

cuda: ## Builds every binary for NVIDIA cards (fetches the compiler; needs no card), into target/cuda/bin
	deploy/cuda/build

gpu-pack: ## Makes target/gpu-pack, whose `run` asks a card what can only be known on one
	deploy/cuda/pack
