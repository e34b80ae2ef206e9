"""Encoder here, decoder there: sums that must hold, and the answers that must change with the link."""

from __future__ import annotations

import pytest

from edgesdk.devices import load_device
from edgesdk.errors import InputError
from edgesdk.sequence.config import SequenceConfig, Stack
from edgesdk.sequence.placement import Link, crossing, placements

SHAPE = {"dim": 256, "heads": 4, "kv_heads": 2, "head": 32, "ffn": 1024}
CONFIG = SequenceConfig(
    layout="encoder-decoder", vocab=8000, gated=False, encoder=Stack(layers=8, **SHAPE), decoder=Stack(layers=4, **SHAPE)
)
PI, PHONE, JETSON = load_device("raspberry-pi-5"), load_device("galaxy-s24"), load_device("jetson-agx-orin")


def test_crossing_is_the_caches_bytes():
    assert crossing(CONFIG, 100) == 4 * 2 * 4 * 2 * 32 * 100  # float32, keys and values, layers, heads, size, positions
    assert crossing(CONFIG, 100, batch=3, bits=8) == 3 * (2 * 4 * 2 * 32) * (100 + 4)
    only = SequenceConfig(layout="decoder-only", vocab=8000, decoder=Stack(layers=4, **SHAPE))
    assert crossing(only, 100) == 0


def test_every_pair_of_units_of_a_phone_is_costed():
    table = placements(CONFIG, PHONE, 256, 16)
    units = {(r.encoder.split(" on ")[1], r.decoder.split(" on ")[1]) for r in table.rows}
    assert {("npu", "cpu"), ("npu", "npu"), ("cpu", "cpu"), ("gpu", "npu")} <= units
    assert [r.answer.value for r in table.rows] == sorted(r.answer.value for r in table.rows)
    assert [r.wins for r in table.rows] == [True] + [False] * (len(table.rows) - 1)
    for r in table.rows:
        apart = r.encoder.split(" on ")[1] != r.decoder.split(" on ")[1]
        assert r.over_bytes == (crossing(CONFIG, 256) if apart else 0) and (r.over_s > 0) == apart
        assert r.answer.value == pytest.approx(r.first_token.value + 15 * r.per_token.value)
        assert r.first_token.low <= r.first_token.value <= r.first_token.high


def test_a_helper_pays_on_a_fast_link_and_not_on_a_slow_one():
    fast, slow = (Link(bytes_per_s=rate, latency_s=wait) for rate, wait in ((1.25e8, 1e-3), (2e4, 0.2)))
    best = {link: placements(CONFIG, PI, 512, 8, helper=JETSON, link=link).rows[0] for link in (fast, slow)}
    assert "of jetson-agx-orin" in best[fast].encoder and "of jetson-agx-orin" not in best[slow].encoder
    alone = placements(CONFIG, PI, 512, 8).rows[0]
    assert best[fast].weight_bytes < alone.weight_bytes, "the encoder's weights are not on the board"
    assert best[slow].answer == alone.answer


def test_fewer_bits_take_less_of_the_link():
    took = [
        next(
            r for r in placements(CONFIG, PI, 512, 8, helper=JETSON, link=Link(bytes_per_s=1e6, latency_s=0.0, bits=bits)).rows if r.over_s
        )
        for bits in (4, 8, 32)
    ]
    assert took[0].over_bytes < took[1].over_bytes < took[2].over_bytes and took[0].over_s < took[1].over_s < took[2].over_s


def test_what_cannot_be_placed():
    only = SequenceConfig(layout="decoder-only", vocab=8000, decoder=Stack(layers=4, **SHAPE))
    with pytest.raises(InputError, match="one part"):
        placements(only, PI, 16, 4)
    with pytest.raises(InputError, match="helper goes with a link"):
        placements(CONFIG, PI, 16, 4, helper=JETSON)


def test_the_verb_places_layouts_on_a_device_and_beside_a_helper():
    import json

    from typer.testing import CliRunner

    from edgesdk.cli import app

    asked = ["layouts", "--parameters", "4M", "--vocab", "2000", "--input-length", "64", "--output-length", "8", "--json"]
    alone = CliRunner().invoke(app, [*asked, "--device", "galaxy-s24", "--place"])
    assert alone.exit_code == 0, alone.output
    tables = json.loads(alone.stdout)["placements"]
    assert len(tables) > 3 and all(t["rows"][0]["wins"] and t["helper"] is None for t in tables)
    assert [t["rows"][0]["answer"]["value"] for t in tables] == sorted(t["rows"][0]["answer"]["value"] for t in tables)
    beside = CliRunner().invoke(app, [*asked, "--device", "pi5", "--helper", "jetson-agx-orin", "--link-rate", "1Gbit", "--link-bits", "4"])
    table = json.loads(beside.stdout)["placements"][0]
    assert table["link"] == {"bytes_per_s": 1.25e8, "latency_s": 0.002, "bits": 4} and table["helper"] == "jetson-agx-orin"
    bad = CliRunner().invoke(app, [*asked, "--device", "pi5", "--helper", "jetson-agx-orin", "--link-rate", "fast"])
    assert bad.exit_code == 2 or "rate" in str(bad.exception)
