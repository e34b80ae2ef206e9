"""Layouts as a planning decision: lengths, what programs do, and the search."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgesdk.errors import InputError
from edgesdk.plan.lengths import Lengths, parse_lengths, quantile
from edgesdk.sequence.config import SequenceConfig, Stack
from edgesdk.sequence.costs import decode, encode, prefill, programs


def small(layout: str = "encoder-decoder", **changes: object) -> SequenceConfig:
    stack = Stack(layers=3, dim=64, heads=4, kv_heads=2, head=16, ffn=128)
    parts = {
        "encoder-decoder": {"encoder": stack, "decoder": stack.model_copy(update={"layers": 2})},
        "decoder-only": {"decoder": stack},
        "encoder-ctc": {"encoder": stack},
        "decoder-decoder": {"decoder": stack.model_copy(update={"layers": 4}), "shared_from": 2},
    }[layout]
    return SequenceConfig.model_validate({"layout": layout, "vocab": 50, **parts, **changes})


class TestLengths:
    def test_forms(self, tmp_path: Path) -> None:
        assert parse_lengths("256") == Lengths(values=(256,), shares=(1.0,))
        even = parse_lengths("64-512")
        assert (even.values[0], even.largest, len(even.values)) == (64, 512, 64)
        assert even.mean == pytest.approx(288, rel=0.01)
        file = tmp_path / "lengths.txt"
        file.write_text("# tokens, texts\n10 3\n20, 1\n\n10\n")
        assert parse_lengths(str(file)) == Lengths.of([(10, 4), (20, 1)])

    @pytest.mark.parametrize("text", ["0", "9-3", "no-such-file", "-4", ""])
    def test_refused(self, text: str) -> None:
        with pytest.raises(InputError, match="--input-length"):
            parse_lengths(text)

    def test_a_bad_line_is_named(self, tmp_path: Path) -> None:
        file = tmp_path / "lengths.txt"
        file.write_text("10\nmany\n")
        with pytest.raises(InputError, match="line 2 = 'many'"):
            parse_lengths(str(file))

    def test_quantiles(self) -> None:
        pairs = [(3.0, 0.1), (1.0, 0.5), (2.0, 0.4)]
        assert [quantile(pairs, q) for q in (0.5, 0.9, 1.0)] == [1.0, 2.0, 3.0]


class TestPrograms:
    def test_weights_are_the_configuration_s(self) -> None:
        for layout in ("encoder-decoder", "decoder-only", "encoder-ctc", "decoder-decoder"):
            config = small(layout)
            held = {
                u.weight: u.rows * u.cols for p in programs(config, 1, 16, 8, 4) for u in p.graph.units if u.op in ("linear", "embedding")
            }
            assert sum(held.values()) == config.parameters + 50 * 64, layout  # the head is a matrix of its own

    def test_equal_layers_written_once_are_the_same_work(self) -> None:
        for layout in ("encoder-decoder", "decoder-only", "encoder-ctc", "decoder-decoder"):
            whole, alike = (programs(small(layout), 2, 16, 8, 4, alike=a) for a in (False, True))
            for one, two in zip(whole, alike, strict=True):
                assert one.macs == two.macs == one.graph.macs
                assert len(one.graph.units) == sum(two.times) > len(two.graph.units)
                assert one.graph.peak_activation_bytes == two.graph.peak_activation_bytes

    def test_macs_follow_the_lengths(self) -> None:
        config = small("decoder-only")
        one, two = (prefill(config, 1, n) for n in (8, 16))
        linear = [sum(u.macs for u in m.graph.units if u.op == "linear" and u.name != "head") for m in (one, two)]
        assert linear[1] == 2 * linear[0]
        scores = [sum(u.macs for u in m.graph.units if u.name.startswith("matmul")) for m in (one, two)]
        assert scores[1] == 4 * scores[0]

    def test_decode_pays_for_every_slot(self) -> None:
        config = small("decoder-only")
        assert decode(config, 1, 64).macs - decode(config, 1, 32).macs == 32 * 2 * 3 * 4 * 16

    def test_windows_bound_caches(self) -> None:
        config = small("decoder-only")
        assert config.decoder is not None
        windowed = config.model_copy(update={"decoder": config.decoder.model_copy(update={"windows": (0, 8, 8)})})
        method = decode(windowed, 1, 64).graph
        assert sorted({t.shape[2] for t in method.inputs if t.name in method.cache_inputs}) == [8, 64]

    def test_batch_multiplies_the_work(self) -> None:
        config = small()
        assert encode(config, 4, 16).macs == 4 * encode(config, 1, 16).macs
