"""A login and an install over the serial console of the emulated board: a real kernel's terminal, getty and login on a 16550 UART."""

from __future__ import annotations

import re

import pytest

from edgesdk.bundles import bundle_digest
from edgesdk.flash import flash, roll_back, status
from tests.tiny import tiny_bundle

pytestmark = pytest.mark.board

PASSWORD = "let me in"
HASH = "$6$edgesdk$WK3kLHAkBhZcSj6xrsk7/aGclGfgTIWpiPd3jGmqOnA2OEWh92sHTCGnNXlhXf.TSogbFQbcS4T8c.GJoS94S."
LOGIN = (
    f"sed 's|^root:[^:]*:|root:{HASH}:|' /etc/passwd > /tmp/passwd && mount --bind /tmp/passwd /etc/passwd && "
    "printf '#!/bin/sh\\nexec /bin/busybox login \"$@\"\\n' > /tmp/login && chmod +x /tmp/login && "
    "(while true; do busybox getty -L -l /tmp/login 115200 ttyS0 vt100; done) < /dev/null > /dev/null 2>&1 &"
)


@pytest.fixture(scope="module")
def wired():
    """(a board with a getty on a UART, the other end of its wire here)"""
    from tests.lab import board as lab

    if problem := lab.missing():
        pytest.fail(problem, pytrace=False)

    class Wired(lab.Board):
        def _command(self) -> list[str]:
            return [*super()._command(), "-chardev", "pty,id=uart", "-device", "pci-serial,chardev=uart"]

    with Wired() as board:
        port = re.search(rb"redirected to (\S+) \(label uart\)", board.console)
        done = board.ssh(LOGIN)
        assert port and done.returncode == 0, done.stderr
        yield board, port[1].decode()


def test_login_install_and_go_back_over_the_console(wired, tmp_path):
    board, port = wired
    (tmp_path / "password").write_text(PASSWORD + "\n")
    link = f"serial:{port}?user=root&password_file={tmp_path}/password&root=/data/edgesdk"
    for seed in (1, 2):
        tiny_bundle(tmp_path / f"{seed}.edge", seed=seed)
    flash(tmp_path / "1.edge", board.url)
    deployment = flash(tmp_path / "2.edge", link)
    assert deployment.good and deployment.previous == bundle_digest(tmp_path / "1.edge")
    assert status(board.url).current == bundle_digest(tmp_path / "2.edge"), "what came over the console is there over ssh"
    assert roll_back(link).current == bundle_digest(tmp_path / "1.edge")
