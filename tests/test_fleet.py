"""Rollouts without a broker: the state machine, what devices refuse, and every order of loss, doubles and crashes by chance."""

from __future__ import annotations

import json

import pytest
from fleet_memory import Fleet, quick
from tiny import tiny_bundle

from edgesdk.bundles import bundle_digest


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    for seed, name in enumerate("abc"):
        tiny_bundle(folder / f"{name}.edge", seed=seed)
    tiny_bundle(folder / "big.edge", seed=9, cols=40000)
    return {p.stem: p for p in folder.glob("*.edge")}


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGESDK_ROLLOUTS", str(tmp_path / "rollouts"))
    quick(monkeypatch)


@pytest.fixture
def made(tmp_path):
    """Fleets of this test's folder; their controllers are gone behind it."""
    fleets = []

    def make(bundle, *args, **options):
        for other in fleets:
            other.leave()
        fleets.append(Fleet(tmp_path, bundle, NAMES, *args, **options))
        fleets[-1].drive()
        return fleets[-1]

    yield make
    for fleet in fleets:
        fleet.leave()


NAMES = [f"d{i}" for i in range(8)]


def test_a_good_rollout_reaches_all(made, bundles):
    fleet = made(bundles["a"])
    rollout = fleet.settle()
    assert rollout.status == "finished" and rollout.counts() == {"good": 8}
    for name in NAMES:
        assert fleet.current(name) == bundle_digest(bundles["a"]) and len(fleet.installs(name)) == 1
    assert not [t for t in fleet.broker.retained if "/blob/" in t], "the bundle is taken back from the broker"


def test_a_bad_canary_halts_and_everything_goes_back(made, bundles):
    made(bundles["a"]).settle()
    fleet = made(bundles["b"], bad=lambda n: n == "d3", canaries=("d5", "d3"), stages=(2, 4, 8), rollout="r2")
    rollout = fleet.settle()
    assert rollout.status == "halted" and "d3" in rollout.why and "wrong outputs" in rollout.why
    assert rollout.stage == 1 and set(rollout.told) == {"d3", "d5"} and rollout.counts() == {"rolled-back": 2, "waiting": 6}
    assert all(fleet.current(n) == bundle_digest(bundles["a"]) for n in NAMES)


@pytest.mark.parametrize("seed", range(12))
def test_any_order_of_loss_doubles_and_crashes(made, bundles, seed):
    """Whatever happens on the way: all have it, each installed it once; or it halted, and nobody has it."""
    bad = f"d{seed % 8}" if seed % 3 == 2 else None
    fleet = made(bundles["big"], seed=seed, bad=lambda n: n == bad, stages=(2, 5, 8))
    fleet.kills = 0.004
    for _ in range(700):
        fleet.act()
    rollout = fleet.settle()
    digest = bundle_digest(bundles["big"])
    if bad is None:
        assert rollout.status == "finished" and rollout.counts() == {"good": 8}, (fleet.crashes, rollout)
    else:
        assert rollout.status == "halted" and rollout.counts().get("good") is None
    for name in NAMES:
        assert len(fleet.installs(name)) <= 1
        assert fleet.current(name) == (digest if bad is None else None)
    counters = [
        json.loads(line)["counter"] for line in (fleet.rollout_folder.path / "journal").read_text().splitlines() if '"tell"' in line
    ]
    assert len(set(counters)) == len(counters)
