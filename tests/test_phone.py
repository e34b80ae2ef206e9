"""A real adb server and adbd: the whole loop over adb, and what goes wrong on the way. The stand-in is this machine: its times are real, it is no phone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgesdk.bundles import bundle_digest
from edgesdk.errors import CheckFailed, LinkError
from edgesdk.flash import flash, roll_back, status
from edgesdk.profile import profile
from edgesdk.transport import parse_link
from tests.tiny import tiny_bundle

pytestmark = pytest.mark.board


def test_commands_have_exit_codes_and_odd_names_pass(phone):
    with parse_link(phone.url) as device:
        result = device.run(("sh", "-c", 'echo "$1"; echo gone >&2; exit 3', "x", "it's $HOME `a` \\ *"))
        assert (result.code, result.text, result.complaint) == (3, "it's $HOME `a` \\ *", "gone")
        assert device.run(("cat",), stdin=bytes(range(256)) * 1000).out == bytes(range(256)) * 1000
        assert device.run(("sh", "-c", "exit 255")).code == 255


def test_install_profile_and_roll_back(phone, tmp_path):
    first, second = tmp_path / "first.edge", tmp_path / "second.edge"
    tiny_bundle(first, seed=1)
    tiny_bundle(second, seed=2)
    assert flash(first, phone.url).good
    assert flash(second, phone.url).current == bundle_digest(second)
    assert flash(second, phone.url).sent_bytes == 0
    report = profile(second, phone.url, runs=20)
    assert len(report.methods[0].samples_s) == 20 and min(report.methods[0].samples_s) > 0
    assert roll_back(phone.url).current == bundle_digest(first)
    bad = tmp_path / "bad.edge"
    tiny_bundle(bad, seed=3, wrong=True)
    with pytest.raises(CheckFailed):
        flash(bad, phone.url)
    assert status(phone.url).current == bundle_digest(first)


@pytest.mark.parametrize("fault", ["disconnect", "kill"])
def test_a_cut_transfer_resumes(phone, fault):
    data, done = os.urandom(30_000_000), []

    def progress(sent: int, whole: int) -> None:
        if sent > whole // 2 and not done:
            done.append(sent)
            getattr(phone, fault)()

    target = f"{phone.root}/{fault}"
    with parse_link(phone.url) as device, pytest.raises(LinkError) as caught:
        device.put(data, target, progress=progress)
    assert "resumes" in caught.value.hint and not Path(target).exists()
    if fault == "kill":
        phone.start()
    with parse_link(phone.url) as device:
        assert 0 < device.put(data, target) < len(data)
        assert device.get(target) == data


def test_a_cut_command_is_no_success(phone):
    """adb itself ends with code 0 then."""
    with parse_link(phone.url) as device:
        stream = device.open(("sh", "-c", "sleep 30"))
        phone.disconnect()
        with pytest.raises(LinkError):
            stream.readline(20)
        stream.close()
        with pytest.raises(LinkError, match="no such device"):
            device.run(("true",))
    with parse_link(phone.url) as device:  # connected to again
        assert device.run(("true",)).code == 0
