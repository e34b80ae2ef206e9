"""Rollouts without a broker: the state machine, what devices refuse, and every order of loss, doubles and crashes by chance."""

from __future__ import annotations

import hashlib
import json

import pytest
from fleet_memory import Fleet, Killed, quick, raw_key
from tiny import tiny_bundle

from edgesdk.agent.ed25519 import holds
from edgesdk.bundles import bundle_digest, extract
from edgesdk.cli import main
from edgesdk.errors import DeviceError, InputError, UnknownName
from edgesdk.fleet.agent import serve
from edgesdk.fleet.broker import Broker
from edgesdk.fleet.device import Device
from edgesdk.fleet.files import files_of
from edgesdk.fleet.journal import Folder
from edgesdk.fleet.rollout import parse_halt, parse_stages
from edgesdk.fleet.store import Full, Store, members_of
from edgesdk.fleet.wire import Refused, envelope, pack
from edgesdk.signing import new_key, own_key, revoke, sign, signature_of


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
        time = max((f.time for f in fleets), default=1000.0)
        fleets.append(Fleet(tmp_path, bundle, NAMES, *args, **options))
        fleets[-1].time = time
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


@pytest.mark.parametrize("seed", [*range(5), *(pytest.param(n, marks=pytest.mark.wide) for n in range(5, 100))])
def test_any_order_of_loss_doubles_and_crashes(made, bundles, seed):
    """Whatever happens on the way: all have it, each installed it once; or it halted, and nobody has it."""
    bad = f"d{seed % 8}" if seed % 3 == 2 else None
    fleet = made(bundles["big"], seed=seed, bad=lambda n: n == bad, stages=(2, 5, 8))
    fleet.kills = 0.03
    for _ in range(900):
        fleet.act()
    assert fleet.crashes, "nothing was killed: not what this is about"
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


# ---- what a rollout does


def test_first_devices_are_waited_for_others_are_not_and_catch_up(made, bundles):
    fleet = made(bundles["a"], unplugged=("d1",), canaries=("d1",), away_s=30.0)
    with pytest.raises(AssertionError, match="did not settle"):
        fleet.settle(turns=30)
    assert fleet.controller.rollout.stage == 1
    fleet.plug("d1")
    fleet.unplug("d2")
    rollout = fleet.settle()
    assert rollout.status == "finished" and rollout.counts() == {"good": 7, "told": 1}
    assert [t for t in fleet.broker.retained if "/blob/" in t], "d2 still needs the bundle"
    fleet.plug("d2")  # long after: its order is kept by the broker
    while fleet.device_turn("d2"):
        pass
    assert fleet.current("d2") == bundle_digest(bundles["a"])
    fleet.leave()
    fleet.rollout_folder.ask("resume")
    fleet.drive()
    assert fleet.settle().counts() == {"good": 8}
    assert not [t for t in fleet.broker.retained if "/blob/" in t]


def test_a_stage_has_to_be_good_for_a_while(made, bundles):
    fleet = made(bundles["a"], wait_s=600.0)
    begun = {}
    while not fleet.controller.rollout.ended:
        fleet.turn()
        for name in NAMES:
            while fleet.device_turn(name):
                pass
        begun.setdefault(fleet.controller.rollout.stage, fleet.time)
        fleet.time += 5.0
    assert begun[2] - begun[1] >= 600 and begun[3] - begun[2] >= 600


def test_a_device_that_is_there_and_silent_counts_as_failed(made, bundles):
    fleet = made(bundles["a"], timeout_s=300.0)
    first = fleet.spec.devices[0]
    fleet.devices[first].message = lambda topic, payload: None
    rollout = fleet.settle()
    assert rollout.status == "halted" and "did not end within 300 s" in rollout.why and first in rollout.why


def test_a_share_of_failures_is_borne_and_more_is_not(made, bundles):
    fleet = made(bundles["a"], bad=lambda n: n == "d4", canaries=("d0",), halt_on=None, halt_share=0.25, stages=(1, 8))
    rollout = fleet.settle()
    assert rollout.status == "finished" and rollout.counts() == {"good": 7, "failed": 1}
    fleet = made(
        bundles["b"], bad=lambda n: n in ("d4", "d5"), canaries=("d0",), halt_on=None, halt_share=0.25, stages=(1, 8), rollout="r2"
    )
    rollout = fleet.settle()
    assert rollout.status == "halted" and rollout.counts() == {"rolled-back": 8}
    assert [fleet.current(n) for n in NAMES] == [None if n == "d4" else bundle_digest(bundles["a"]) for n in NAMES]


def test_pause_resume_abort_and_rollback(made, bundles):
    fleet = made(bundles["a"])
    fleet.rollout_folder.ask("pause")
    with pytest.raises(AssertionError, match="did not settle"):
        fleet.settle(turns=20)
    assert fleet.controller.rollout.status == "paused" and len(fleet.controller.rollout.told) <= 1
    fleet.rollout_folder.ask("resume")
    assert fleet.settle().status == "finished"
    fleet.leave()
    fleet.rollout_folder.ask("rollback")
    fleet.drive()
    rollout = fleet.settle()
    assert rollout.status == "rolling-back" and rollout.counts() == {"rolled-back": 8} and fleet.current("d0") is None
    fleet = made(bundles["b"], rollout="r2")
    for name in NAMES:
        fleet.devices[name].store.accept = None  # never gets so far
    fleet.turn()
    fleet.turn()
    fleet.rollout_folder.ask("abort")
    rollout = fleet.settle()
    assert rollout.status == "aborted" and rollout.counts() == {"held": 1, "waiting": 7}


def test_a_controller_that_was_restored_from_a_copy_is_understood(made, bundles):
    fleet = made(bundles["a"])
    fleet.settle()
    fleet.leave()
    later = made(bundles["b"], rollout="r2")
    later.controller.now = lambda: 1.0  # a clock that is far behind: counters of old
    rollout = later.settle()
    assert rollout.status == "finished" and all(later.current(n) == bundle_digest(bundles["b"]) for n in NAMES)


def test_another_rollout_takes_over(made, bundles):
    fleet = made(bundles["a"], stages=(8,))
    fleet.turn()
    fleet.turn()
    assert len(fleet.controller.rollout.told) == 8
    fleet.time += 10
    newer = made(bundles["b"], rollout="r2", stages=(8,))
    assert newer.settle().status == "finished"
    newer.leave()
    fleet.broker, fleet.devices, fleet.wires, fleet.time = newer.broker, newer.devices, newer.wires, newer.time
    fleet.drive()
    rollout = fleet.settle()
    assert rollout.counts() == {"superseded": 8} and all(fleet.current(n) == bundle_digest(bundles["b"]) for n in NAMES)


# ---- its journal


def test_a_torn_line_is_cut_off_and_a_changed_one_refused(made, bundles):
    fleet = made(bundles["a"])
    fleet.settle()
    fleet.leave()
    path = fleet.rollout_folder.path / "journal"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"e":"command","comma')
    fleet.drive()
    assert path.read_bytes() == whole and fleet.controller.rollout.counts() == {"good": 8}
    fleet.leave()
    path.write_bytes(b"x" + whole)
    with pytest.raises(InputError, match="line 1 is damaged"):
        fleet.rollout_folder.read()


def test_two_at_one_rollout_are_refused(made, bundles):
    fleet = made(bundles["a"])
    with pytest.raises(DeviceError, match=r"is driven by .*process") as caught, Folder("r1").alone():
        pass
    assert caught.value.exit_code == 3
    with pytest.raises(InputError, match="there already"):
        Folder.create(fleet.spec, bundles["a"])
    with pytest.raises(UnknownName, match="did you mean 'r1'"):
        Folder("r11")


@pytest.mark.parametrize(
    ("text", "count", "canaries", "wanted"),
    [
        ("1,10%,50%,100%", 1000, 0, (1, 100, 500, 1000)),
        ("1,10%,50%,100%", 3, 0, (1, 2, 3)),
        ("1,10%,50%,100%", 1, 0, (1,)),
        ("1,100%", 50, 4, (4, 50)),
        ("100%", 7, 0, (7,)),
        ("5,20", 20, 0, (5, 20)),
        ("33.3%,100%", 3, 0, (1, 3)),
    ],
)
def test_stages(text, count, canaries, wanted):
    assert parse_stages(text, count, canaries) == wanted


@pytest.mark.parametrize("text", ["", "0,100%", "50%,10%,100%", "1,50%", "x", "1.5,100%", "120%", "-1", "1,,100%"])
def test_stages_that_are_none(text):
    with pytest.raises(InputError, match="--stages"):
        parse_stages(text, 100)


def test_halt_on():
    assert parse_halt("3") == (3, None) and parse_halt(" 5% ") == (None, 0.05)
    for text in ("0", "x", "1.5", "101%", ""):
        with pytest.raises(InputError, match="--halt-on"):
            parse_halt(text)


# ---- what a device refuses


class Recorded:
    """A wire that only notes."""

    def __init__(self):
        self.said = []

    def publish(self, topic, payload):
        self.said.append((topic, json.loads(payload)))

    def subscribe(self, topics):
        pass

    unsubscribe = subscribe


@pytest.fixture
def device(tmp_path):
    store = Store(str(tmp_path / "dev"), lambda folder, calls: {"cases": [], "seconds": {}}, sync=False)
    return Device("d1", "test", store, Recorded(), {own_key().id: raw_key(own_key())}, holds, lambda: 0.0)


def order(**changed):
    file = {"sha256": "a" * 64, "size": 10}
    whole = {
        "fleet": "test",
        "device": "d1",
        "rollout": "r1",
        "counter": 5,
        "step": "install",
        "bundle": "a" * 64,
        "manifest": file,
        "signature": file,
    }
    return {**whole, **changed}


def signed(key="default", **changed):
    return envelope(order(**changed), lambda text: signature_of(text, key))


def test_a_device_follows_only_signed_new_orders_of_its_own(device):
    topic = "edgesdk/1/test/desired/d1"
    new_key("stranger")
    revoke("stranger")
    good = signed()
    for payload, words in (
        (b"{", "not JSON"),
        (b"[" * 100_000, "an order of"),
        (pack({"order": "{}"}), "version None"),
        (pack({"order": pack(order()).decode()}), "not signed"),
        (good.replace(b'\\"counter\\":5', b'\\"counter\\":9'), "changed since"),
        (signed("stranger"), "not trusted on this device"),
        (signed(device="d2"), "another device"),
        (signed(fleet="other"), "another device"),
        (signed(counter=0), "no counter"),
        (signed(counter=True), "no counter"),
        (signed(step="explode"), "unknown step"),
        (signed(bundle="../../etc"), "no bundle"),
        (signed(manifest={"sha256": "x", "size": 1}), "no manifest"),
    ):
        device.message(topic, payload)
        assert device.state["counter"] == 0 and words in device.wire.said[-1][1]["refused"]["why"], payload[:80]
    device.message(topic, good)
    assert device.state["counter"] == 5 and device.state["state"] == "fetching" and device.wire.said[-1][1]["refused"] is None
    device.message(topic, signed(counter=4, rollout="r0"))
    assert device.state["counter"] == 5 and "older than the last order" in device.wire.said[-1][1]["refused"]["why"]
    device.message(topic, good)  # once more: nothing new
    assert device.state["tries"] == 0
    again = Device("d1", "test", device.store, Recorded(), device.trusted, holds, lambda: 0.0)
    again.message(topic, signed(counter=4, rollout="r0"))  # nor after a restart
    assert again.state["counter"] == 5 and again.wire.said[-1][1]["refused"]["counter"] == 4


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([["../x", "a" * 64, 1]], "not a plain relative name"),
        ([["/etc/passwd", "a" * 64, 1]], "not a plain relative name"),
        ([["a/./b", "a" * 64, 1]], "not a plain relative name"),
        ([["manifest.json", "a" * 64, 1]], "not a plain relative name"),
        ([["-rf", "a" * 64, 1]], "not a plain relative name"),
        ([[".good", "a" * 64, 1]], "not a plain relative name"),
        ([["a", "a" * 64, 1], ["a", "b" * 64, 1]], "twice"),
        ([["a", "zz", 1]], "no digest or size"),
        ([["a", "a" * 64, -1]], "no digest or size"),
        ([["a", "a" * 64, 1 << 50]], "no digest or size"),
        ([[3, "a" * 64, 1]], "not a plain relative name"),
    ],
)
def test_manifests_that_no_bundle_has(members, words):
    listed = [dict(zip(("name", "sha256", "size_bytes"), m, strict=True)) for m in members]
    with pytest.raises(Refused, match=words):
        members_of(json.dumps({"kind": "bundle", "golden": [1], "members": listed}).encode())
    for text in (b"", b"[]", b"{}", b'{"kind":"bundle","golden":[1]}', b"[" * 100_000):
        with pytest.raises(Refused):
            members_of(text)


def test_a_bundle_that_nobody_trusted_signed_is_not_installed(made, bundles, tmp_path):
    new_key("maker")
    tiny_bundle(tmp_path / "theirs.edge", seed=5)
    sign(tmp_path / "theirs.edge", "maker")
    fleet = made(tmp_path / "theirs.edge", stages=(8,))
    only = {own_key("maker").id: raw_key(own_key("maker"))}  # trusts the maker of the bundle, not who sends orders
    for device in fleet.devices.values():
        device.trusted = only
    rollout = fleet.settle()
    assert rollout.status == "halted" and "not trusted on this device" in rollout.why
    for name, content in list(fleet.broker.retained.items()):
        assert "/desired/" not in name or content


def test_what_lies_there_unsigned_is_not_made_current(made, bundles):
    """As `edgesdk flash --allow-unsigned` may have left it: whole, but of nobody who is trusted."""
    made(bundles["c"]).settle()
    fleet = made(bundles["a"], rollout="r2", stages=(1, 8))
    first = fleet.spec.devices[0]
    folder = fleet.folder / first / "store" / bundle_digest(bundles["a"])
    extract(bundles["a"], folder)
    rollout = fleet.settle()
    assert rollout.status == "halted" and "not signed" in rollout.why and fleet.current(first) == bundle_digest(bundles["c"])


def test_chunks_that_were_changed_on_the_broker_are_not_installed(made, bundles):
    fleet = made(bundles["big"], stages=(1, 8))
    send = fleet.broker.send

    def spoiled(topic, payload, retain):
        send(topic, payload[:-1] + b"\0" if "/blob/" in topic and len(payload) == 65536 else payload, retain)

    fleet.broker.send = spoiled
    rollout = fleet.settle()
    assert rollout.status == "halted" and "arrived 3 times with a wrong digest" in rollout.why
    assert not [n for n in NAMES if fleet.current(n)]


@pytest.mark.parametrize(("plan", "chunks"), [(b"", 0), (b"x" * 65536, 1), (b"x" * 65537, 2)])
def test_what_another_bundle_has_is_not_fetched_again(made, bundles, tmp_path, plan, chunks):
    made(bundles["a"], stages=(8,)).settle()
    tiny_bundle(tmp_path / "more.edge", seed=0, plan=plan)
    fleet = made(tmp_path / "more.edge", rollout="r2", stages=(8,))
    fetched = []
    for wire in fleet.wires.values():
        subscribe = wire.subscribe
        wire.subscribe = lambda topics, go=subscribe: (fetched.extend(t for t in topics if "/blob/" in t), go(topics))
    assert fleet.settle().counts() == {"good": 8}
    assert len(fetched) == (2 + chunks) * 8  # its manifest, its signature and what is new


def test_a_check_that_ends_the_device_is_given_up(made, bundles):
    fleet = made(bundles["a"], stages=(1, 8))
    name = fleet.spec.devices[0]
    fleet.bad = lambda n: (_ for _ in ()).throw(Killed()) if n == name else False
    rollout = fleet.settle()
    assert rollout.status == "halted" and "the device ended 3 times while it was checked" in rollout.why and fleet.crashes == 3


def test_a_full_disk_and_a_device_in_use(made, bundles, monkeypatch):
    fleet = made(bundles["a"], stages=(1, 8))
    name = fleet.spec.devices[0]
    store = fleet.devices[name].store
    with store.alone("test"):
        with pytest.raises(AssertionError, match="did not settle"):
            fleet.settle(turns=20)
        assert "waits: in use by the fleet agent, to test" in fleet.controller.rollout.told[name].why
    assert fleet.settle().status == "finished"

    def full(*_):
        raise Full(28, "No space left on device")

    monkeypatch.setattr(Store, "append", full)
    rollout = made(bundles["b"], rollout="r2", stages=(1, 8)).settle()
    assert rollout.status == "halted" and "No space left on device" in rollout.why


def test_files_of_a_bundle_lie_where_it_is_said(bundles):
    content = bundles["big"].read_bytes()
    for name, sha, size, place in files_of(bundles["big"]):
        assert hashlib.sha256(content[place : place + size]).hexdigest() == sha, name


@pytest.mark.parametrize(
    ("link", "more", "words"),
    [
        ("http://x", {}, "not a broker"),
        ("mqtt://", {}, "not a broker"),
        ("mqtt://h:99999", {}, "not a broker"),
        ("mqtt://h/path", {}, "not a broker"),
        ("mqtt://u:p4ss@h", {}, "a password in the link"),
        ("http://u:p4ss@h", {}, "not a broker"),
        ("mqtt://h", {"ca": "x"}, "are for TLS"),
        ("mqtts://h", {"cert": "x"}, "belong together"),
        ("mqtts://h", {"ca": "/nowhere"}, "--ca /nowhere: cannot be used"),
        ("mqtt://h", {"password_file": "/nowhere"}, "cannot be read"),
    ],
)
def test_brokers_that_are_none(link, more, words):
    with pytest.raises(InputError, match=words) as caught:
        Broker(link, **more)
    assert "p4ss" not in str(caught.value)


def test_a_password_without_a_user(monkeypatch):
    monkeypatch.setenv("EDGESDK_MQTT_PASSWORD", "x")
    with pytest.raises(InputError, match="without a user"):
        Broker("mqtt://h")
    assert Broker("mqtt://u@h").password == "x" and Broker("mqtts://u@h").port == 8883


# ---- on the command line


@pytest.fixture
def edgesdk(capsys):
    """The command line in this process: (exit code, stdout, stderr)."""

    def run(*args):
        with pytest.raises(SystemExit) as ended:
            main(list(args))
        return ended.value.code, *capsys.readouterr()

    return run


def test_the_verb_rollout(edgesdk, bundles, tmp_path, monkeypatch):
    (tmp_path / "mine.toml").write_text("".join(f"[devices.d{i}]\ntags = ['t']\n" for i in range(20)))
    monkeypatch.setenv("EDGESDK_INVENTORY", str(tmp_path / "mine.toml"))
    start = ("rollout", "start", str(bundles["a"]), "--broker", "mqtt://127.0.0.1:1")
    code, out, _ = edgesdk(*start, "--canary", "d7", "--stages", "1,25%,100%", "--dry-run")
    lines = out.splitlines()
    assert code == 0 and lines[0] == "stage 1: 1 devices: d7" and [line.split()[2] for line in lines] == ["1", "4", "15"]
    assert not (tmp_path / "rollouts").exists()
    for more, words in (
        (("--canary", "d70"), "did you mean 'd7'"),
        (("--stages", "1,5"), "ends at 5 of 20"),
        (("--on", "tag:u"), "unknown device, group or tag 'tag:u'"),
        (("--on", "ssh://u@h"), "cannot be a name"),
        (("--fleet", "a/b"), "--fleet a/b"),
        (("--url", "ftp://x"), "not http"),
    ):
        code, _, err = edgesdk(*start, *more)
        assert code == 2 and words in err
    code, _, err = edgesdk("rollout", "status")
    assert code == 2 and "there is no rollout" in err
    monkeypatch.setattr("edgesdk.fleet.controller.FIRST_S", 0.2)
    code, _, err = edgesdk(*start, "--id", "r9")
    assert code == 3 and "no broker answers" in err and "rollout resume" in err
    code, out, _ = edgesdk("rollout", "list")
    assert code == 0 and "r9  running, not ended" in out


def test_an_agent_without_keys_says_so(tmp_path):
    asked = [("--broker", "mqtt://127.0.0.1:1", "--root", str(tmp_path)), ("--broker", "mqtt://127.0.0.1:1", "--name", "a/b")]
    for arguments, words in zip(asked, ("trusted: no keys", "--name a/b"), strict=True):
        with pytest.raises(InputError, match=words):
            serve(list(arguments))


def test_the_state_of_a_rollout_from_its_journal(made, bundles, edgesdk):
    made(bundles["a"]).settle()
    code, out, _ = edgesdk("rollout", "status", "--json")
    answer = json.loads(out)
    assert code == 0 and answer["kind"] == "rollout-status" and answer["counts"] == {"good": 8} and answer["ended"]
    assert {d["name"] for d in answer["devices"]} == set(NAMES) and answer["devices"][0]["order"]["state"] == "good"
    _, out, _ = edgesdk("rollout", "status", "--devices")
    assert "r1: finished" in out and "d3: install good" in out
