"""A bundle put into an image's own file systems without root: what is there then, what the first boot makes of it, and what is refused."""

from __future__ import annotations

import json
import lzma
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from edgesdk.bundles import bundle_digest
from edgesdk.cli import app
from edgesdk.errors import CheckFailed, DeviceError, InputError
from edgesdk.flash import status
from edgesdk.image.disk import extents
from edgesdk.image.files import ExtFiles, FatFiles, File, Folder, Owner, Symlink
from edgesdk.image.partitions import partitions, pick
from edgesdk.image.write import read_content, write_image
from edgesdk.transport.base import Blob
from tests.image_small import MIB, block_map, machine, needs_tools, os_image, program
from tests.tiny import tiny_bundle

pytestmark = needs_tools


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """By what starts services in them."""
    folder = tmp_path_factory.mktemp("images")
    return {init: os_image(folder / init, init) for init in ("systemd", "rcS", "sysv", "none")}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    path = tmp_path_factory.mktemp("bundle") / "tiny.edge"
    tiny_bundle(path)
    return path


def system(image):
    return ExtFiles(image, pick(partitions(image), "ext4", None, image))


def test_a_bundle_gets_into_a_systemd_image(images, bundle, tmp_path):
    before = images["systemd"].read_bytes()
    (tmp_path / "user.txt").write_text("pi:$6$hash\n")
    packed = tmp_path / "os.img.xz"
    packed.write_bytes(lzma.compress(before, preset=0))
    content = read_content(bundle, owner="1000:1001", boot_files=[f"{tmp_path}/user.txt=userconf.txt"])
    report = write_image(packed, tmp_path / "card.img", content)
    assert packed.read_bytes() == lzma.compress(before, preset=0) and (tmp_path / "card.img").stat().st_mode & 0o777 == 0o644
    there = system(tmp_path / "card.img")
    there.check()
    digest = bundle_digest(bundle)
    stored = there.stat(f"/var/lib/edgesdk/store/{digest}/model.tflite")
    assert re.search(r"Mode:\s+0644", stored) and re.search(r"User:\s+1000\s+Group:\s+1001", stored)
    assert re.search(r"User:\s+0\s+Group:\s+0", there.stat("/var/lib"))
    unit = there.read("/etc/systemd/system/edgesdk-first-boot.service").decode()
    assert (
        "ConditionPathExists=/var/lib/edgesdk/first-boot.pending" in unit
        and "ExecStart=/usr/bin/python3 -B /var/lib/edgesdk/first_boot.py" in unit
    )
    assert '"../edgesdk-first-boot.service"' in there.stat("/etc/systemd/system/multi-user.target.wants/edgesdk-first-boot.service")
    assert there.stat("/var/lib/edgesdk/current") is None, "only the first boot makes it current"
    boot = FatFiles(tmp_path / "card.img", partitions(tmp_path / "card.img")[0])
    with pytest.raises(DeviceError, match="5 MB needed for big, "):
        boot.put("big", bytes(5_000_000))
    assert b"pi:$6$hash" in (tmp_path / "card.img").read_bytes()[MIB : 5 * MIB]
    assert report.bundle == digest and report.signer and [s.split()[0] for s in report.steps][:3] == ["copy", "boot", "check"]
    dry = write_image(packed, tmp_path / "none.img", content, dry_run=True)
    assert dry.steps[1:] == report.steps[1:] and not (tmp_path / "none.img").exists()


def test_a_block_map_and_a_bundle_on_a_used_card(images, bundle, tmp_path):
    """What neither the map nor the bundle names stays as it was on the card, and the file system is whole all the same."""
    image = tmp_path / "os.img"
    image.write_bytes(images["systemd"].read_bytes())
    data = image.read_bytes()
    root = [(a // 4096 + 1280, -(-b // 4096) + 1279) for a, b in extents(images["systemd"].with_name("root"), everything=False)]
    (tmp_path / "os.bmap").write_text(block_map(image, [(0, 0), (256, 1279), *root]))
    mapped = 4096 * sum(b - a + 1 for a, b in [(0, 0), (256, 1279), *root])
    assert mapped < 7 * MIB
    made = machine(tmp_path / "machine")
    (made.dev / "sdb").write_bytes(b"\xff" * (32 * MIB))
    report = write_image(image, made.dev / "sdb", read_content(bundle), yes=True, machine=made)
    assert mapped < report.written_bytes < mapped + 2 * MIB and image.read_bytes() == data
    there = system(made.dev / "sdb")
    there.check()
    assert there.read(f"/var/lib/edgesdk/store/{bundle_digest(bundle)}/manifest.json")


def test_a_bundle_again_over_itself_replaces_it(images, bundle, tmp_path):
    write_image(images["rcS"], tmp_path / "once.img", read_content(bundle))
    other = tmp_path / "other.edge"
    tiny_bundle(other, seed=3)
    write_image(tmp_path / "once.img", tmp_path / "twice.img", read_content(other))
    there = system(tmp_path / "twice.img")
    assert there.read("/var/lib/edgesdk/first-boot.pending").split()[0].decode() == bundle_digest(other)
    assert there.exists(f"/var/lib/edgesdk/store/{bundle_digest(bundle)}")
    there.check()


@pytest.mark.parametrize(
    ("init", "script", "links"),
    [("rcS", "/etc/init.d/S99edgesdk", []), ("sysv", "/etc/init.d/edgesdk", ["/etc/rc2.d/S99edgesdk", "/etc/rc5.d/S99edgesdk"])],
)
def test_other_inits_get_a_script(images, bundle, tmp_path, init, script, links):
    write_image(images[init], tmp_path / "card.img", read_content(bundle, root="/opt/edge"))
    there = system(tmp_path / "card.img")
    assert re.search(r"Mode:\s+0755", there.stat(script)) and b"/usr/bin/python3 -B /opt/edge/first_boot.py /opt/edge" in there.read(script)
    assert all('"../init.d/edgesdk"' in there.stat(link) for link in links) and there.stat("/etc/rc4.d/S99edgesdk") is None
    (tmp_path / "S99").write_bytes(there.read(script))
    assert subprocess.run(["sh", "-n", tmp_path / "S99"], check=False).returncode == 0


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        (False, "ok, 1 golden cases, the worst off by"),
        pytest.param(True, "wrong outputs: forward[0]; the device's runtime", marks=pytest.mark.wide),
    ],
)
def test_the_first_boot_checks_the_bundle(images, tmp_path, wrong, found):
    pytest.importorskip("ai_edge_litert")
    tiny_bundle(tmp_path / "tiny.edge", wrong=wrong)
    write_image(images["rcS"], tmp_path / "card.img", read_content(tmp_path / "tiny.edge"))
    with (tmp_path / "card.img").open("rb") as file:
        file.seek(5 * MIB)
        (tmp_path / "root.ext4").write_bytes(file.read())
    subprocess.run(
        [program("debugfs"), "-R", f"rdump /var/lib/edgesdk {tmp_path}", tmp_path / "root.ext4"], check=True, capture_output=True
    )
    root, link = tmp_path / "edgesdk", f"local:{tmp_path}/edgesdk"
    digest = bundle_digest(tmp_path / "tiny.edge")
    assert status(link).current is None and not status(link).installed[0].good
    agent = next((root / "agent").glob("*/agent.zip"))
    done = subprocess.run([sys.executable, "-B", root / "first_boot.py", root, agent], capture_output=True, text=True, check=False)
    assert done.returncode == wrong, done.stdout + done.stderr
    after = status(link)
    assert (after.current, after.good) == ((None, False) if wrong else (digest, True))
    assert after.installed[0].good is not wrong and not (root / "first-boot.pending").exists()
    entry = after.history[-1]
    assert (entry.action, entry.digest) == ("first-boot", digest) and entry.result.startswith(found) and len(entry.signer) > 4


def test_what_cannot_hold_a_bundle_is_refused(images, bundle, tmp_path):
    def refused(image, error, said, **given):
        with pytest.raises(error, match=said):
            write_image(image, tmp_path / "card.img", read_content(bundle, **given))
        assert not (tmp_path / "card.img").exists()

    refused(images["none"], InputError, "neither systemd nor /etc/init.d/rcS nor /etc/rc2.d: nothing would start the check")
    refused(images["rcS"], InputError, "has no python3.13", python="python3.13")
    refused(images["rcS"], InputError, "no partition 7 of kind ext4", partition=7)
    big = tmp_path / "big.edge"
    tiny_bundle(big, rows=50, cols=40000)
    with pytest.raises(DeviceError, match=r"partition 2 .*: 8\.5\d MB needed, .* free: .* too little"):
        write_image(images["rcS"], tmp_path / "card.img", read_content(big))
    damaged = tmp_path / "damaged.img"
    data = bytearray(images["rcS"].read_bytes())
    data[5 * MIB + 2048 : 5 * MIB + 6144] = bytes(4096)  # the group descriptors
    damaged.write_bytes(data)
    refused(damaged, CheckFailed, r"partition 2 .* is damaged: ")
    data = bytearray(images["rcS"].read_bytes())
    data[5 * MIB + 1024 + 96] |= 4  # there is a journal to replay
    damaged.write_bytes(data)
    refused(damaged, CheckFailed, r"partition 2 .* was not unmounted cleanly")
    fat_only = tmp_path / "fat.img"
    fat_only.write_bytes(images["rcS"].read_bytes()[MIB : 5 * MIB])
    refused(fat_only, InputError, r"no ext4 partition found, there is: the file system \(fat")
    for root in ("relative", "/", "/a/../b"):
        with pytest.raises(InputError, match="not a whole path"):
            read_content(bundle, root=root)
    with pytest.raises(InputError, match="--owner pi: not numbers"):
        read_content(None, owner="pi")


def test_files_of_all_kinds(images, tmp_path):
    image = tmp_path / "os with space.img"
    image.write_bytes(images["none"].read_bytes())
    there = system(image)
    blob = Blob.of(b"x" * 100_000)
    there.put([Folder("/srv", Owner(5, 6), 0o700), File("/srv/a name.bin", blob, Owner(7, 8), 0o600), Symlink("/srv/link", "a name.bin")])
    assert there.read("/srv/a name.bin") == b"x" * 100_000 and '"a name.bin"' in there.stat("/srv/link")
    assert re.search(r"Mode:\s+0700", there.stat("/srv")) and re.search(r"User:\s+7\s+Group:\s+8", there.stat("/srv/a name.bin"))
    assert there.resolve("/lib/systemd") == "/usr/lib/systemd" and there.resolve("/usr/bin/python3") == "/usr/bin/python3.11"
    with pytest.raises(CheckFailed, match=r"/nowhere/file did not get into partition 2 .*File not found"):
        there.put([File("/nowhere/file", blob)])
    with pytest.raises(InputError, match="a quote or a line's end"):
        there.exists('/a"b')
    many = [File(f"/srv/{i:03}.txt", Blob.of(b"%d" % i)) for i in range(60)]
    there.put(many)
    there.check()


def test_on_the_command_line(images, bundle, tmp_path):
    run = CliRunner().invoke
    given = ["flash", "--image", str(images["rcS"]), "--bundle", str(bundle), "--to", str(tmp_path / "card.img")]
    shown = run(app, [*given, "--dry-run"])
    assert shown.exit_code == 0 and "nothing was written" in shown.stderr and not (tmp_path / "card.img").exists()
    assert re.search(r"put +/var/lib/edgesdk/store/[0-9a-f]{64}/model.tflite", shown.stdout)
    shown = run(app, [*given, "--json"])
    report = json.loads(shown.stdout)
    assert shown.exit_code == 0 and report["kind"] == "image" and report["action"] == "written" and report["root"] == "/var/lib/edgesdk"
    with pytest.raises(InputError, match="is there already\nlook at it with --dry-run, then give --yes"):
        run(app, given, catch_exceptions=False)
    assert "checked on the first boot" in run(app, [*given, "--yes"]).stdout
    for words, said in (
        (["--bundle", str(bundle)], "are of a disk image"),
        (["--image", "x.img", "--bundle", str(bundle)], "--image wants a target"),
        (["--image", "x.img", "--status"], "--image goes with"),
        (["--slots", "--bundle", str(bundle)], "--slots alone with --rollback"),
    ):
        with pytest.raises(InputError, match=said):
            run(app, ["flash", *words], catch_exceptions=False)
    shown = run(app, ["flash", str(bundle), "--to", f"local:{tmp_path}/store", "--dry-run"])
    assert shown.exit_code == 0 and "store/" in shown.stdout, "--to LINK is --on LINK"
