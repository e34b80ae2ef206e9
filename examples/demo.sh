#!/usr/bin/env bash
# The whole loop on the built-in examples: plan for three devices, then build, install, run and profile on this machine.
set -euo pipefail
started=$SECONDS
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
show() { echo; echo "\$ $*"; "$@"; }

show edgesdk plan --device jetson
show edgesdk plan --device pi5 --model example:normalizer --latency 100ms
show edgesdk plan --device phone --quality-drop 1%
show edgesdk calibrate --runtime litert
show edgesdk plan --device host --runtime litert --out "$work/plan.json"
show edgesdk build "$work/plan.json" --out "$work/digits.edge"
show edgesdk flash "$work/digits.edge" --on "local:$work/device"
show edgesdk profile "$work/digits.edge" --on "local:$work/device" --out "$work/report.json"
mkdir -p build
show edgesdk report "$work/report.json" "$work/digits.edge" --out build/demo.html
echo
echo "demo took $((SECONDS - started)) s; its report as a page: build/demo.html"
