"""The inventory: names, tags and groups for `--on`, its mistakes by file and field; the same verb on several devices side by side."""

from __future__ import annotations

import _thread
import json
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from tiny import tiny_bundle

from edgesdk.bundles import bundle_digest
from edgesdk.errors import DeviceError, InputError, UnknownName
from edgesdk.flash import status
from edgesdk.inventory import Entry, chosen, link_of, load_inventory
from edgesdk.many import side_by_side, worst

GOOD = """
[devices.pi-1]
link = "local:{0}/pi-1"
device = "raspberry-pi-5"
tags = ["lab", "cooled"]
[devices.pi-2]
link = "local:{0}/pi-2"
tags = ["lab"]
[devices.away]
link = "ssh://u@127.0.0.1:1"
[devices.field-7]
tags = ["field"]
[groups]
pis = ["pi-1", "pi-2"]
all-but-field = ["group:pis", "tag:cooled", "away"]
"""


@pytest.fixture
def inventory(tmp_path, monkeypatch):
    path = tmp_path / "mine.toml"
    path.write_text(GOOD.format(tmp_path))
    monkeypatch.setenv("EDGESDK_INVENTORY", str(path))
    return path


def names(on: str) -> list[str]:
    return [e.name for e in chosen(on)]


def test_what_on_takes(inventory, tmp_path):
    assert names("pi-1") == ["pi-1"] and names("group:pis") == ["pi-1", "pi-2"]
    assert names("tag:lab, away") == ["pi-1", "pi-2", "away"]
    assert names("group:all-but-field") == ["pi-1", "pi-2", "away"]  # each once
    assert names("group:all") == ["pi-1", "pi-2", "away", "field-7"]
    assert names("local,ssh://a@b,pi-2") == ["local", "ssh://a@b", "pi-2"]
    assert link_of("pi-2") == f"local:{tmp_path}/pi-2"
    assert status("pi-2").link == f"local:{tmp_path}/pi-2"  # names are links everywhere
    with pytest.raises(UnknownName, match="did you mean 'pi-1'"):
        chosen("pi1")
    with pytest.raises(InputError, match="did you mean 'group:pis'"):
        chosen("pis")
    with pytest.raises(UnknownName, match="did you mean 'tag:cooled'"):
        chosen("tag:cold")
    with pytest.raises(InputError, match="2 devices"):
        status("group:pis")
    with pytest.raises(InputError, match="field-7 has no link"):
        status("field-7")
    with pytest.raises(InputError, match="an empty name"):
        chosen("pi-1,,pi-2")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[devices.a]\nlink = 'sssh://x'", "devices.a.link = 'sssh://x': not a link"),
        ("[devices.a]\nlink = 'ssh://x?passwd=1'", "devices.a.link = 'ssh://x?passwd=1'"),
        ("[devices.a]\nlnk = 'local'", "devices.a.lnk"),
        ("[devices.a]\ntags = ['a b']", "devices.a.tags.0 = 'a b'"),
        ("[devices.'a b']\n", "devices.a b: cannot be a name"),
        ("[devices.local]\n", "devices.local: cannot be a name"),
        ("[devices.a]\n[devices.a]\n", "not TOML"),
        ("[devices.a]\n[devices.A]\n", "in case alone"),
        ("[devices.a]\nlink='ssh://x'\n[devices.b]\nlink='ssh://x'", "devices.b.link = 'ssh://x': that of devices.a, too"),
        ("[devices.a]\ndevice = 'raspbery-pi-5'", "devices.a.device: unknown device 'raspbery-pi-5'"),
        ("[groups]\ng = ['nobody']", "groups.g: unknown device, group or tag 'nobody'"),
        ("[groups]\ng = ['group:h']\nh = ['group:g']", "a ring of groups: g → h → g"),
        ("devices = 3", "devices"),
    ],
)
def test_mistakes_are_told_by_file_and_field(tmp_path, text, words):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_inventory(path)
    assert words in caught.value.what and str(path) in caught.value.what and caught.value.hint


def test_no_file_is_an_empty_inventory_and_a_missing_one_a_mistake(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EDGESDK_INVENTORY", raising=False)
    assert load_inventory().devices == {}
    (tmp_path / "edgesdk-inventory.toml").write_text("[devices.here]\nlink = 'local'")
    assert list(load_inventory().devices) == ["here"]
    with pytest.raises(InputError, match=r"nowhere\.toml: cannot be read"):
        load_inventory("nowhere.toml")


# ---- side by side


def test_jobs_bound_how_many_run_and_errors_stay_apart():
    running, most, lock = 0, 0, threading.Lock()

    def work(entry, tell):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        tell("at it", 0.5)
        time.sleep(0.02)
        with lock:
            running -= 1
        if entry.name == "3":
            raise DeviceError("3 is broken", "mend it")
        if entry.name == "5":
            raise ValueError("a defect")
        return entry.name

    seen = []
    rows = side_by_side([Entry(str(i), "fake") for i in range(9)], work, jobs=4, changed=lambda r: seen.append((r.entry.name, r.state)))
    assert most == 4 and [r.answer for r in rows] == ["0", "1", "2", None, "4", None, "6", "7", "8"]
    assert rows[3].error.what == "3 is broken" and "unexpected: ValueError" in rows[5].error.what
    assert worst(rows) == 3 and ("3", "failed") in seen and ("8", "done") in seen
    assert worst(rows[:3]) == 0


def edgesdk(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "edgesdk", *args], capture_output=True, text=True, timeout=120)


def test_flash_run_profile_and_roll_back_several(inventory, tmp_path):
    bundle = tmp_path / "a.edge"
    tiny_bundle(bundle)
    done = edgesdk("flash", str(bundle), "--on", "group:all-but-field", "--json", "--inventory", str(inventory))
    answer = json.loads(done.stdout)
    assert done.returncode == answer["code"] == 3 and answer["kind"] == "devices-side-by-side" and answer["schema_version"] == 1
    by_name = {row["name"]: row for row in answer["devices"]}
    assert by_name["pi-1"]["answer"]["current"] == bundle_digest(bundle) == by_name["pi-2"]["answer"]["current"]
    assert by_name["away"]["code"] == 3 and "nothing listens" in by_name["away"]["error"]["what"] and by_name["away"]["answer"] is None
    done = edgesdk("flash", "--status", "--on", "group:pis")
    assert done.returncode == 0 and done.stdout.count(bundle_digest(bundle)[:12]) == 2 and "flash --status pi-1: begun" in done.stderr
    np.save(tmp_path / "x.npy", np.ones((1, 256), np.float32))
    done = edgesdk("run", "--input", str(tmp_path / "x.npy"), "--on", "tag:lab", "--json", "--out", str(tmp_path / "y"))
    rows = json.loads(done.stdout)["devices"]
    assert done.returncode == 0 and [r["answer"]["outputs"][0]["shape"] for r in rows] == [[1, 4]] * 2
    assert np.load(tmp_path / "pi-1-y0.npy").shape == (1, 4)
    done = edgesdk("profile", "--on", "tag:cooled", "--runs", "20", "-o", str(tmp_path / "reports"))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "reports/pi-1.json").read_text())
    assert report["kind"] == "report" and report["conditions"]["device"] == "raspberry-pi-5"  # the inventory's profile
    assert "forward p50" in done.stdout
    done = edgesdk("flash", "--rollback", "--on", "group:pis", "--jobs", "1")
    assert done.returncode == 3 and done.stderr.count("nothing to roll back to") == 2


def test_ctrl_c_ends_and_says_what_was_not_begun(monkeypatch):
    monkeypatch.setattr("edgesdk.many.GOODBYE_S", 5.0)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background may have it ignored

    def work(entry, tell):
        if entry.name == "0":
            _thread.interrupt_main()
        for _ in range(200):
            tell("working", 0.1)
            time.sleep(0.02)
        return 1

    try:
        rows = side_by_side([Entry(str(i), "fake") for i in range(5)], work, jobs=2)
    finally:
        signal.signal(signal.SIGINT, before)
    assert [r.state for r in rows] == ["stopped"] * 5 and rows[4].text == "not begun" and worst(rows) == 130


def test_the_verb_inventory(inventory):
    done = edgesdk("inventory", "list", "--json")
    answer = json.loads(done.stdout)
    assert done.returncode == 0 and [d["name"] for d in answer["devices"]] == ["pi-1", "pi-2", "away", "field-7"]
    assert answer["groups"]["all-but-field"] == ["pi-1", "pi-2", "away"]
    assert edgesdk("inventory", "check").returncode == 0
    inventory.write_text("[devices.a]\nlink = 'x'")
    done = edgesdk("inventory", "check")
    assert done.returncode == 2 and "devices.a.link = 'x'" in done.stderr
