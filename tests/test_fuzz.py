"""Files, frames and tables that others wrote: whatever they hold, there is an answer or an error in two lines, and nothing is written elsewhere.

A few hundred inputs here; `python -m tests.fuzz TARGET --minutes 10` goes on for as long as one likes (docs/fuzzing.md).
"""

from __future__ import annotations

import random
import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgesdk.agent import wire
from edgesdk.agent.frames import decode
from edgesdk.bundle import Manifest
from edgesdk.errors import InputError, LinkError
from edgesdk.transport import parse_link
from tests.fuzz import made
from tests.fuzz.guard import confined
from tests.fuzz.targets import DICTIONARY, TARGETS, run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    return folder, {name: target.seeds(folder) for name, target in TARGETS.items()}


def mutated(seeds: list[bytes], seed: int) -> bytes:
    """One of them with a few bytes changed, cut, doubled or put in."""
    rng = random.Random(seed)
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.randint(1, 6)):
        at, what = rng.randrange(len(data) + 1), rng.randrange(5)
        end = min(len(data), at + rng.choice((1, 1, 2, 4, 32)))
        if what == 0:
            data[at:end] = b""
        elif what == 1:
            data[at:end] = bytes(rng.randrange(256) for _ in range(end - at))
        elif what == 2:
            data[at:at] = rng.choice(DICTIONARY)
        elif what == 3:
            data[at:at] = data[at:end] * rng.randint(1, 4)
        else:
            data = data[: max(at, 1)]
    return bytes(data)


@pytest.mark.parametrize("name", TARGETS)
def test_spoiled_inputs(name, place):
    folder, seeds = place
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile's, of members that are there twice

        @settings(derandomize=True, deadline=None, max_examples=40, database=None, suppress_health_check=list(HealthCheck))
        @given(st.one_of(st.integers(0, 1 << 30).map(lambda n: mutated(seeds[name], n)), st.binary(max_size=200)))
        def spoiled(data: bytes) -> None:
            run(name, data, folder)

        spoiled()


DAMAGED = [
    b"",
    b"x",
    b"1 2",
    made.framed(b"[1,2]"),
    made.framed(b"[" * 5000),
    made.framed(b"{"),
    b"9" * 5000 + b" 00000000 {}",
    b"-1 00000000 {}",
]


@pytest.mark.parametrize("line", DAMAGED, ids=lambda line: repr(line[:12]))
def test_lines_that_are_no_message_are_refused_on_both_sides(line):
    with pytest.raises(LinkError, match="damaged on the way"):
        decode(line)
    with pytest.raises(wire.Refused, match="damaged on the way"):
        wire.decode(line + b"\n")


@pytest.mark.parametrize(
    "text",
    [b"[" * 100_000, b'{"kind":"bundle","schema_version":1e400}', b"9" * 5000, b"\xff\xfe{"],
    ids=["deep", "endless", "long", "other"],
)
def test_json_that_no_parser_likes_is_refused(text):
    with pytest.raises(InputError):
        Manifest.from_json(text, "manifest.json")


@pytest.mark.parametrize(
    "text", [b"a = " + b"[" * 20_000, b"a = " + b"{a=" * 20_000, b"a = " + b"9" * 5000], ids=["lists", "tables", "digits"]
)
@pytest.mark.parametrize("name", ["profile", "inventory"])
def test_toml_that_no_parser_likes_is_refused(name, text, tmp_path):
    assert not run(name, text, tmp_path)


def test_a_link_to_a_folder_of_an_endless_name_is_only_a_link():
    assert parse_link("local:/" + "x" * 5000).root.endswith("xxx") and parse_link("local:~nobody-here/x").root.endswith("/x")


@pytest.mark.parametrize(
    "link", ["ssh://pi..[[/@host", "local:/x\0y", "adb://[x", "serial:/dev/x?baud=\u00b2", "serial:/dev/x?baud=" + "9" * 5000]
)
def test_links_with_half_an_address_are_refused(link):
    with pytest.raises(InputError, match="not a"):
        parse_link(link)


def test_the_guard_sees_what_is_written_elsewhere(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    with confined(inside):
        (inside / "x").write_text("x")
        (inside / "x").rename(inside / "y")
        outside.exists()
    for act in (lambda: outside.write_text("x"), (tmp_path / "new").mkdir, lambda: (inside / "y").rename(tmp_path / "z")):
        with pytest.raises(AssertionError, match="outside its folder"), confined(inside):
            act()
