# The two commands of README, and what developers need. The work is in tools/.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup build deb demo test bench lint

help:
	@echo 'make demo    set up, build and run the notes image, bake and boot the appliance, fetch a page of each'
	@echo 'make test    set up, run all tests'
	@echo 'make bench   set up, measure, write docs/benchmarks.md'
	@echo 'make lint    formatting and clippy'
	@echo 'make setup   install what building and running need'
	@echo 'make build   target/release/pipeline'
	@echo 'make deb     a Debian package of it in target/debian'

setup:
	@tools/setup

build: setup
	cargo build --release --locked

deb: build
	@tools/deb

demo:
	@tools/demo

test:
	@tools/test

bench:
	@tools/setup --test
	cargo build --release --locked
	benches/run

lint:
	cargo fmt --all --check
	cargo clippy --release --locked --all-targets -- --deny warnings
