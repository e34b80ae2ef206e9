"""Rollouts over a real broker: the agent as a device runs it, TLS and logins, sixty simulated devices, everything killed on the way."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from edgesdk.bundles import bundle_digest
from edgesdk.flash import flash, status
from edgesdk.signing import own_key
from edgesdk.transport.local import LocalTransport
from tests.lab.agents import Crowds
from tests.lab.broker import Mosquitto, missing
from tests.tiny import tiny_bundle

pytestmark = pytest.mark.board


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    for seed, name in enumerate("ab"):
        tiny_bundle(folder / f"{name}.edge", seed=seed)
    tiny_bundle(folder / "big.edge", seed=7, cols=40000)
    tiny_bundle(folder / "wrong.edge", seed=8, wrong=True)
    return {p.stem: p for p in folder.glob("*.edge")}


@pytest.fixture
def place():
    """A folder that the broker gets at: it gives up root."""
    folder = Path(tempfile.mkdtemp(prefix="edgesdk-broker-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def broker(tmp_path, place, monkeypatch):
    if problem := missing():
        pytest.fail(problem, pytrace=False)
    monkeypatch.setenv("EDGESDK_ROLLOUTS", str(tmp_path / "rollouts"))
    with Mosquitto(place / "kept") as started:
        yield started


def edgesdk(*args: str, **more) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-m", "edgesdk", *args], capture_output=True, text=True, timeout=120, **more)
    assert "Traceback" not in done.stderr, done.stderr
    return done


@contextlib.contextmanager
def agent(folder: Path, name: str, link: str, *more: str, trusted: str | None = None):
    """The real agent as a device without edgesdk runs it: `python agent.zip fleet …`."""
    root = folder / name
    root.mkdir(exist_ok=True)
    (root / "trusted").write_text((trusted or own_key().line) + "\n")
    assert edgesdk("fleet", "pack", "-o", str(folder / "agent.zip")).returncode == 0
    argv = [sys.executable, "-u", "-B", str(folder / "agent.zip"), "fleet", "--broker", link, "--name", name, "--root", str(root), *more]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(argv, cwd=folder, stderr=log, env=env)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def inventory(folder: Path, *names: str) -> str:
    path = folder / "inventory.toml"
    path.write_text("".join(f"[devices.{n}]\n" for n in names))
    return str(path)


def test_a_real_install_over_a_broker_then_a_wrong_bundle(broker, bundles, tmp_path):
    devices = inventory(tmp_path, "box")
    with agent(tmp_path, "box", broker.link):
        done = edgesdk("rollout", "start", str(bundles["big"]), "--broker", broker.link, "--inventory", devices, "--id", "one", "--json")
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        assert answer["status"] == "finished" and answer["counts"] == {"good": 1} and answer["ended"]
        device = LocalTransport(tmp_path / "box")
        here = status(device)
        assert here.current == bundle_digest(bundles["big"]) and here.good
        assert flash(bundles["big"], device).action == "already-installed"  # the same store as from afar
        done = edgesdk("rollout", "start", str(bundles["wrong"]), "--broker", broker.link, "--inventory", devices, "--id", "two", "--json")
        assert done.returncode == 1 and json.loads(done.stdout)["status"] == "halted"
        assert "wrong outputs" in json.loads(done.stdout)["why"]
        assert status(device).current == here.current
        done = edgesdk("rollout", "start", str(bundles["a"]), "--broker", broker.link, "--inventory", devices, "--id", "three")
        assert done.returncode == 0 and status(device).current == bundle_digest(bundles["a"])
        done = edgesdk("rollout", "rollback", "three", "--json")
        assert done.returncode == 1 and json.loads(done.stdout)["counts"] == {"rolled-back": 1}
        assert status(device).current == here.current
        assert "r" in edgesdk("rollout", "list").stdout


def test_from_a_url_resumed_and_a_device_that_trusts_somebody_else(broker, bundles, tmp_path):
    class Handler(http.server.SimpleHTTPRequestHandler):
        """Parts of files, as any real server sends them; every third request fails."""

        asked = 0

        def do_GET(self):
            Handler.asked += 1
            if Handler.asked % 3 == 1:
                self.send_error(503)
                return
            content = (bundles["big"].parent / self.path.strip("/")).read_bytes()
            begin, end = (int(n) for n in self.headers["Range"].removeprefix("bytes=").split("-"))
            self.send_response(206)
            self.end_headers()
            self.wfile.write(content[begin : end + 1])

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    devices = inventory(tmp_path, "box", "other")
    url = f"http://127.0.0.1:{server.server_address[1]}/big.edge"
    with agent(tmp_path, "box", broker.link), agent(tmp_path, "other", broker.link, trusted="edgesdk-ed25519 " + "A" * 43 + "= x"):
        start = ("rollout", "start", str(bundles["big"]), "--broker", broker.link, "--inventory", devices, "--url", url, "--json")
        done = edgesdk(*start, "--on", "box", "--id", "one")
        assert done.returncode == 0, done.stderr
        assert status(LocalTransport(tmp_path / "box")).current == bundle_digest(bundles["big"])
        done = edgesdk(*start, "--on", "other", "--id", "two")
        answer = json.loads(done.stdout)
        assert done.returncode == 1 and "not trusted on this device" in answer["why"]
    server.shutdown()
    server.server_close()
    assert Handler.asked > 3


def certificates(folder: Path) -> None:
    """An authority, the broker's certificate for 127.0.0.1 and its key."""
    import datetime
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    def named(name: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])

    now = datetime.datetime.now(datetime.UTC)
    authority, own = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    for name, issuer, key, signer, extra in (
        ("ca", "ca", authority, authority, x509.BasicConstraints(True, None)),
        ("broker", "ca", own, authority, x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])),
    ):
        made = x509.CertificateBuilder().subject_name(named(name)).issuer_name(named(issuer)).public_key(key.public_key())
        made = made.serial_number(x509.random_serial_number()).not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
        (folder / f"{name}.pem").write_bytes(
            made.add_extension(extra, name == "ca").sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        )
    (folder / "broker.key").write_bytes(
        own.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


def test_tls_and_a_login(bundles, place, tmp_path, monkeypatch):
    if problem := missing():
        pytest.fail(problem, pytrace=False)
    monkeypatch.setenv("EDGESDK_ROLLOUTS", str(tmp_path / "rollouts"))
    certificates(place)
    (tmp_path / "password").write_text("secret\n")
    subprocess.run(["mosquitto_passwd", "-b", "-c", str(place / "users"), "fleet", "secret"], check=True)
    for path in place.iterdir():
        path.chmod(0o644)
    lines = f"certfile {place}/broker.pem\nkeyfile {place}/broker.key\npassword_file {place}/users\n"
    with Mosquitto(place, lines=lines, open_=False) as broker:
        link = f"mqtts://fleet@127.0.0.1:{broker.port}"
        login = ("--password-file", str(tmp_path / "password"), "--ca", str(place / "ca.pem"))
        devices = inventory(tmp_path, "box")
        with agent(tmp_path, "box", link, *login):
            start = ("rollout", "start", str(bundles["a"]), "--inventory", devices, "--broker")
            done = edgesdk(*start, link, *login, "--id", "one")
            assert done.returncode == 0, done.stderr
            assert status(LocalTransport(tmp_path / "box")).current == bundle_digest(bundles["a"])
            (tmp_path / "password").write_text("wrong\n")
            done = edgesdk(*start, link, *login, "--id", "two")
            assert done.returncode == 3 and "refuses" in done.stderr and "--password-file" in done.stderr
            done = edgesdk(*start, f"mqtts://fleet:secret@127.0.0.1:{broker.port}", "--id", "three")
            assert done.returncode == 2 and "secret" not in done.stderr and "a password in the link" in done.stderr


def test_sixty_devices_with_everything_killed_on_the_way(broker, bundles, tmp_path):
    """Slow, late, flaky and doubling devices; the controller dies twice, the broker once with what it kept and once without."""
    names = [f"n{i:02d}" for i in range(60)]
    devices = inventory(tmp_path, *names)
    good, bad = bundle_digest(bundles["big"]), bundle_digest(bundles["b"])
    start = ("rollout", "start", "--broker", broker.link, "--inventory", devices, "--stages", "2,25%,100%")
    with Crowds(broker.port, tmp_path / "crowd", names) as crowd:
        crowd.find_bad({bad: ["n07"]})
        driver = subprocess.Popen([sys.executable, "-m", "edgesdk", *start, str(bundles["big"]), "--id", "good"], stderr=subprocess.DEVNULL)
        for forgets in (False, True):
            until = len(crowd.installs()) + 8
            while len(crowd.installs()) < until and crowd.is_well():
                time.sleep(0.05)
            driver.send_signal(signal.SIGKILL)
            driver.communicate()
            broker.stop(signal.SIGKILL if forgets else signal.SIGTERM)
            if forgets:
                (broker.folder / "mosquitto.db").unlink(missing_ok=True)
            broker.start()
            argv = [sys.executable, "-m", "edgesdk", "rollout", "resume", "good", "--json"]
            driver = subprocess.Popen(argv, stderr=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
            lock = tmp_path / "rollouts/good/lock"
            while f"process {driver.pid}" not in lock.read_text():
                time.sleep(0.05)
            second = edgesdk("rollout", "resume", "good")
            assert second.returncode == 0 and "is driven by" in second.stderr  # two are not at it at once
        out, _ = driver.communicate(timeout=90)
        answer = json.loads(out)
        assert driver.returncode == 0 and answer["status"] == "finished" and answer["counts"] == {"good": 60}
        assert set(crowd.currents().values()) == {good}
        counted = [line.split()[0] for line in crowd.installs()]
        assert sorted(counted) == names, "each installed it, and once"
        done = edgesdk(*start, str(bundles["b"]), "--id", "bad", "--canary", "n07", "--json")
        answer = json.loads(done.stdout)
        assert done.returncode == 1 and answer["status"] == "halted" and "n07" in answer["why"] and answer["stage"] == 1
        assert set(crowd.currents().values()) == {good} and crowd.is_well()
