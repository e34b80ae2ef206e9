"""Layouts as a planning decision: lengths, what programs do, and the search."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from edgesdk.cli import main
from edgesdk.devices import load_device
from edgesdk.errors import DoesNotFit, InputError, UnknownName
from edgesdk.graph.types import MethodGraph, ModelGraph, TensorInfo
from edgesdk.plan.answering import answering, answers_of
from edgesdk.plan.lengths import Lengths, parse_lengths, quantile
from edgesdk.plan.types import Estimate, Workload
from edgesdk.sequence.config import SequenceConfig, Stack
from edgesdk.sequence.costs import decode, encode, prefill, programs
from edgesdk.sequence.estimate import buckets_of, cost, places
from edgesdk.sequence.plot import draw
from edgesdk.sequence.search import LayoutSearch, search
from edgesdk.sequence.shapes import LAYOUTS, base_config, sized


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


@pytest.mark.parametrize(
    ("layout", "bits"),
    [(n, 32) for n in ("encoder-decoder", "decoder-only", "encoder-ctc", "decoder-decoder", "windowed")]
    + [("encoder-decoder", 8), ("windowed", 8)],
)
def test_costs_equal_the_traced_programs(layout: str, bits: int) -> None:
    from edgesdk.graph import trace
    from edgesdk.sequence.export import sequence_spec
    from edgesdk.sequence.model import SequenceModel

    config = small("decoder-only" if layout == "windowed" else layout, gated=layout != "encoder-decoder")
    if layout == "windowed" and config.decoder:
        config = config.model_copy(update={"decoder": config.decoder.model_copy(update={"windows": (0, 8, 8)})})
    slots = 10 if config.encoder else 30
    spec = sequence_spec(
        SequenceModel(config), name="twin", source_lengths=(20,), cache_lengths=(slots,), batch=2, start=(0,), cache_bits=bits
    )
    mine = {p.graph.name: p.graph for p in programs(config, 2, 20, 10, 5, cache_bits=bits)}
    graph = trace(spec)
    assert set(mine) == {m.name for m in graph.methods}
    for real in graph.methods:
        own = mine[real.name]
        assert own.macs == real.macs
        matrices = [
            Counter((u.rows, u.cols, u.macs, u.bias_elements) for u in g.units if u.op in ("linear", "embedding")) for g in (own, real)
        ]
        assert matrices[0] == matrices[1]
        assert sum(u.in_elements for u in own.units if u.op == "softmax") == sum(u.in_elements for u in real.units if u.op == "softmax")
        moved = [sum(u.in_elements + u.out_elements for u in g.units) for g in (own, real)]
        assert moved[0] == pytest.approx(moved[1], rel=0.15)
        assert own.peak_activation_bytes == pytest.approx(real.peak_activation_bytes, rel=0.35)
        assert [(t.name, t.shape, t.dtype) for t in own.inputs if "_k" in t.name or "_v" in t.name] == [
            (t.name, t.shape, t.dtype) for t in real.inputs if "_k" in t.name or "_v" in t.name
        ]
        assert [u.in_elements for u in own.units if u.op == "quantize"] == [u.in_elements for u in real.units if u.op == "quantize"]
        assert Counter(t.shape for t in own.inputs) == Counter(t.shape for t in real.inputs)
        assert Counter(t.shape for t in own.outputs) == Counter(t.shape for t in real.outputs)


class TestCosts:
    def test_expected_values_are_of_the_distribution(self) -> None:
        config, where = base_config(20_000_000, vocab=4000), places(load_device("pi5"), "int8", "litert", 1)[0]
        points = [cost(config, where, Lengths.of([(n, 1)]), Lengths.of([(8, 1)])) for n in (64, 256)]
        both = cost(config, where, Lengths(values=(64, 256), shares=(0.75, 0.25), buckets=(64, 256)), Lengths.of([(8, 1)]))
        firsts = [p.first_token.mean.value for p in points]
        assert both.first_token.mean.value == pytest.approx(0.75 * firsts[0] + 0.25 * firsts[1])
        assert (both.first_token.p50, both.first_token.p90) == pytest.approx(firsts)
        assert both.memory.peak_bytes > points[1].memory.peak_bytes  # both buckets' programs are loaded
        assert points[0].answer.mean.low < points[0].answer.mean.value < points[0].answer.mean.high

    def test_buckets(self) -> None:
        assert buckets_of(Lengths.of([(300, 1)])) == {300: 1.0}
        assert buckets_of(Lengths.of([(20, 1), (40, 1), (100, 2)])) == {32: 0.25, 64: 0.25, 100: 0.5}
        assert parse_lengths("64,128").sizes == (64, 128) and parse_lengths("128,64").shares == (0.5, 0.5)
        assert parse_lengths("20-100").sizes == (16, 32, 64, 100) and parse_lengths("20-100", buckets="50,100").sizes == (50, 100)
        with pytest.raises(InputError, match="none holds 300"):
            parse_lengths("300", buckets="128")

    def test_memory_holds_every_weight_once(self) -> None:
        from edgesdk.graph.memory import weight_bytes
        from edgesdk.sequence.estimate import memory_of

        where = places(load_device("pi5"), "int8", "litert", 1)[0]
        for layout in ("encoder-decoder", "decoder-only", "decoder-decoder"):
            units = {u.weight: u for p in programs(small(layout), 1, 16, 8, 4) for u in p.graph.units if u.weight}
            total = sum(weight_bytes(u, where.precision(u), "litert") for u in units.values())
            assert memory_of(small(layout), where, 1, [16, 32], 8).weights_bytes == total

    def test_xnnpack_packs_the_weights_of_each_program_again(self) -> None:
        from edgesdk.graph.memory import weight_bytes
        from edgesdk.sequence.estimate import memory_of

        for runtime in ("executorch", "litert"):
            where = places(load_device("jetson"), "int8", runtime, 1)[0]
            for layout in ("encoder-decoder", "decoder-only", "decoder-decoder"):
                made = [p for s in (16, 32) for p in programs(small(layout), 1, s, 8, 4)]
                users = [{u.weight: weight_bytes(u, where.precision(u), runtime) for u in p.graph.units if u.op == "linear"} for p in made]
                once: dict[str | None, int] = {}
                for used in users:
                    once |= used
                packed = sum(sum(used.values()) for used in users) - sum(once.values())
                answer = memory_of(small(layout), where, 1, [16, 32], 8)
                assert answer.packed_bytes == packed > 0
                parts = answer.model_dump(include={"activations_bytes", "cache_bytes", "cross_cache_bytes", "io_bytes", "packed_bytes"})
                assert answer.peak_bytes == answer.weights_bytes + sum(parts.values()) + (answer.runtime_bytes or 0) + (
                    answer.delegate_bytes or 0
                )

    def test_energy_is_power_times_time(self) -> None:
        config, where = base_config(20_000_000, vocab=4000), places(load_device("jetson"), "int8", None, None)[0]
        found = cost(config, where, Lengths.of([(64, 1)]), Lengths.of([(8, 1)]))
        assert found.energy_j and found.power_w
        assert found.energy_j.value == pytest.approx(25 * found.answer.mean.value)

    def test_weights_a_device_cannot_hold_are_refused(self) -> None:
        with pytest.raises(UnknownName, match="runtime on"):
            places(load_device("pi5"), "int8", "no-runtime", None)
        with pytest.raises(InputError, match="int4"):
            places(load_device("pi-zero-2w"), "int4", "litert", None)


class TestSizes:
    def test_every_layout_has_the_parameters_asked_for(self) -> None:
        base = base_config(330_000_000)
        for name in LAYOUTS:
            assert sized(name, base, 330_000_000).parameters == pytest.approx(330e6, rel=0.01), name

    def test_the_published_shape(self) -> None:
        base = base_config(331_743_232, dim=1024)
        assert base.encoder and base.decoder
        assert (base.encoder.layers, base.decoder.layers, base.encoder.heads, base.encoder.kv_heads) == (20, 10, 6, 3)
        assert base.parameters == pytest.approx(331_743_232, rel=0.005)

    def test_unequal_layers_become_equal(self) -> None:
        stack = Stack(layers=3, dim=64, heads=4, kv_heads=2, head=16, ffn=128, windows=(0, 8, 8), ffns=(128, 64, 64))
        config = SequenceConfig(layout="decoder-only", vocab=50, decoder=stack)
        plain = sized("decoder-only", config, config.parameters)
        assert plain.decoder and not plain.decoder.windows and not plain.decoder.ffns

    def test_too_few_parameters(self) -> None:
        with pytest.raises(InputError, match="--parameters 1000"):
            sized("decoder-only", base_config(20_000_000), 1000)


@pytest.fixture(scope="module")
def found() -> LayoutSearch:
    return search(
        "pi5", parameters=8_000_000, vocab=2000, input_length=Lengths.of([(256, 1)]), output_length=Lengths.of([(16, 1)]), runtime="litert"
    )


class TestSearch:
    def test_rows_are_in_order_and_of_one_size(self, found: LayoutSearch) -> None:
        assert {r.layout for r in found.rows} == set(LAYOUTS)
        times = [r.cost.answer.mean.value for r in found.rows if r.cost]
        assert times == sorted(times) and found.best.fits
        assert all(r.parameters == pytest.approx(8e6, rel=0.03) for r in found.rows)

    def test_crossovers_are_where_the_order_changes(self, found: LayoutSearch) -> None:
        lead = [c for c in found.crossovers if c.leads and c.over == "input" and c.metric == "answer"]
        assert lead
        configs = {r.layout: r.config for r in found.rows}
        where = places(load_device("pi5"), "int8", "litert", None)[0]
        for c in lead[:2]:
            before, after = (
                (
                    [cost(configs[n], where, Lengths.of([(at, 1)]), Lengths.of([(c.fixed, 1)])).answer.mean.value for n in (c.by, c.of)]
                    for at in (c.at - 1, c.at)
                    if at >= c.fixed
                )
                if c.at > c.fixed
                else ([1.0, 0.0], [0.0, 1.0])
            )
            assert before[0] >= before[1] and after[0] <= after[1]

    def test_one_cache_and_windows_hold_less(self, found: LayoutSearch) -> None:
        held = {r.layout: r.cost.self_cache_bytes for r in found.rows if r.cost}
        assert held["decoder-decoder"] < held["decoder-only, windowed"] < held["decoder-only"]

    def test_quality_is_never_computed(self, found: LayoutSearch) -> None:
        assert {r.layout for r in found.rows if r.evidence} == {"encoder-decoder 2/3", "encoder-decoder, one-layer decoder", "encoder-ctc"}

    def test_a_longer_output_than_input_leaves_ctc_out(self) -> None:
        config = small("encoder-ctc")
        where = places(load_device("pi5"), "int8", "litert", None)[0]
        with pytest.raises(InputError, match="as many tokens as it reads"):
            cost(config, where, Lengths.of([(8, 1)]), Lengths.of([(9, 1)]))

    def test_memory_alone_sizes_each_layout(self) -> None:
        found = search(
            "pi5", memory=60_000_000, vocab=2000, input_length=Lengths.of([(64, 1)]), output_length=Lengths.of([(8, 1)]), runtime="litert"
        )
        peaks = [r.cost.memory.peak_bytes for r in found.rows if r.cost]
        assert peaks and all(0.9 * 60e6 < p <= 60e6 for p in peaks)
        with pytest.raises(DoesNotFit):
            search("pi5", memory=1_000_000, input_length=Lengths.of([(64, 1)]), output_length=Lengths.of([(8, 1)]), runtime="litert")

    def test_the_figure(self, found: LayoutSearch, tmp_path: Path) -> None:
        assert draw(found, tmp_path / "layouts.png").stat().st_size > 10_000
        with pytest.raises(InputError, match="no figure ends so"):
            draw(found, tmp_path / "layouts.mp4")
        with pytest.raises(InputError, match="cannot be written"):
            draw(found, tmp_path / "absent" / "layouts.png")


class TestAnswering:
    """How often programs of several lengths are called."""

    def graph(self, sources: tuple[int, ...], caches: tuple[int, ...]) -> ModelGraph:
        def info(name: str, *shape: int) -> TensorInfo:
            return TensorInfo(name=name, shape=shape, dtype="float32")

        methods = []
        for s in sources:
            methods.append(MethodGraph(name=f"encode_{s}", units=(), inputs=(info("source", 1, s),), outputs=(), peak_activation_bytes=0))
            for t in caches:
                inputs = (info("tokens", 1, 1), info("cross_k_0", 1, 1, s, 8), info("self_k_0", 1, 1, t, 8))
                methods.append(
                    MethodGraph(
                        name=f"decode_{s}_{t}", units=(), inputs=inputs, outputs=(), peak_activation_bytes=0, cache_inputs=("self_k_0",),
                        cross_cache_inputs=("cross_k_0",),
                    )
                )  # fmt: skip
        return ModelGraph(name="m", source="torch", model_digest="", layout="encoder-decoder", methods=tuple(methods))

    def test_each_text_takes_the_smallest_program_that_holds_it(self) -> None:
        graph = answering(
            self.graph((16, 64), (8, 32)),
            Workload(input_length=Lengths.of([(10, 3), (40, 1)]), output_length=Lengths.of([(4, 1), (20, 1)])),
        )
        calls = {m.name: m.unroll for m in graph.methods}
        assert calls["encode_16"] == 0.75 and calls["encode_64"] == 0.25
        assert sum(v for k, v in calls.items() if k.startswith("decode")) == pytest.approx(12)
        assert calls["decode_16_8"] == pytest.approx(0.75 * (4 + 9) / 2)
        assert calls["decode_64_32"] == pytest.approx(0.25 * (0 + 11) / 2)

    def test_of_unknown_lengths_the_usual_programs_are_called(self) -> None:
        graph = self.graph((16, 64), (8, 32))
        usual = tuple(m.model_copy(update={"unroll": m.name == "encode_64"}) for m in graph.methods)
        calls = {m.name: m.unroll for m in answering(graph.model_copy(update={"methods": usual}), Workload(output_length=10)).methods}
        assert calls == {"encode_16": 0, "encode_64": 1, "decode_16_8": 0, "decode_16_32": 0, "decode_64_8": 9, "decode_64_32": 1}

    def test_sound_is_counted_in_places_of_the_encoder(self) -> None:
        def info(name: str, *shape: int) -> TensorInfo:
            return TensorInfo(name=name, shape=shape, dtype="float32")

        encode, decode = self.graph((16,), (8,)).methods
        heard = encode.model_copy(update={"inputs": (info("source", 1, 80, 32), info("source_mask", 1, 16))})
        graph = self.graph((16,), (8,)).model_copy(update={"methods": (heard, decode)})
        assert [m.unroll for m in answering(graph, Workload(input_length=16, output_length=3)).methods] == [1, 3]
        with pytest.raises(InputError, match="take 16 tokens"):
            answering(graph, Workload(input_length=17))

    def test_answers_over_lengths(self) -> None:
        graph = self.graph((16, 64), (32,))
        seconds = {
            name: Estimate(value=t, low=t / 2, high=2 * t)
            for name, t in zip(("encode_16", "decode_16_32", "encode_64", "decode_64_32"), (4.0, 1.0, 10.0, 2.0), strict=True)
        }
        workload = Workload(input_length=Lengths.of([(10, 3), (40, 1)]), output_length=Lengths.of([(4, 1), (20, 1)]))
        found = answers_of(answering(graph, workload), workload, seconds)
        assert found is not None and (found.inputs, found.caches) == ((16, 64), (32,))
        assert (found.first_token.mean.value, found.first_token.p50, found.first_token.p90) == (0.75 * 5 + 0.25 * 12, 5, 12)
        assert found.whole.mean.value == pytest.approx(0.75 * (4 + 12) + 0.25 * (10 + 24)) and found.whole.p90 == 10 + 40
        assert found.per_token.value == pytest.approx(0.75 * 1 + 0.25 * 2) and found.whole.mean.high == 2 * found.whole.mean.value
        graph = graph.model_copy(update={"methods": graph.methods[:1]})
        assert answers_of(graph, Workload(), seconds) is None

    def test_lengths_that_do_not_fit(self) -> None:
        with pytest.raises(InputError, match="take 64 tokens"):
            answering(self.graph((16, 64), (8,)), Workload(input_length=65))
        with pytest.raises(InputError, match="hold 8 tokens"):
            answering(self.graph((16,), (8,)), Workload(output_length=9))


class TestVerb:
    def run(self, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main(["layouts", *words])
        shown = capsys.readouterr()
        return int(stop.value.code or 0), shown.out, shown.err

    SMALL = ("--parameters", "3M", "--vocab", "500", "--device", "pi5", "--runtime", "litert", "--output-length", "4")

    def test_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, _ = self.run(capsys, *self.SMALL, "--input-length", "16-64", "--json")
        answer = json.loads(out)
        assert (code, answer["kind"], answer["schema_version"]) == (0, "layout-search", 1)
        assert answer["rows"][0]["cost"]["first_token"]["p90"] > 0

    def test_table_names_crossovers_and_says_what_does_not_fit(self, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, _ = self.run(capsys, *self.SMALL, "--input-length", "64", "--memory", "5MB")
        assert code == 1 and "overtakes" in out and "does not fit" in out and "All figures are predicted" in out

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (("--parameters", "many"), "not a number of parameters"),
            (("--weights", "int9"), "unknown weights"),
            (("--buckets", "a,b"), "not lengths"),
            (("--model", "example:normalizer", "--parameters", "3M"), "with --model"),
            (("--config", "no-such.json"), "cannot be read"),
        ],
    )
    def test_bad_input(self, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str) -> None:
        code, _, err = self.run(capsys, *words)
        assert code == 2 and message in err
