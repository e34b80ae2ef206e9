"""DeviceProfile: what a device is, in numbers with a source each. One TOML file in `profiles/` is one device.

Sizes are bytes, rates are SI, the unit is in the key's name. A profile holds facts and no preferences.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from edgesdk.noun import Noun, Part

Dtype = Literal["fp32", "fp16", "bf16", "int8", "int4"]
Share = Annotated[float, Field(gt=0, le=1)]
Isa = Literal["neon", "fp16", "dotprod", "i8mm", "sve2", "sme2", "avx2", "avx512", "avx512_vnni", "avx_vnni", "helium", "sm_87", "sm_110"]
RuntimeName = Literal[
    "executorch", "litert", "tflite-runtime", "executorch-vulkan", "executorch-coreml", "executorch-qnn",
    "executorch-cuda", "executorch-ethos-u", "litert-gpu", "litert-qnn", "tensorrt", "onnxruntime", "qnn", "ncnn", "ncnn-vulkan",
    "llama.cpp", "tflite-micro", "native", "native-cuda",
]  # fmt: skip


class Cache(Part):
    level: Annotated[int, Field(ge=1, le=4)]
    size_bytes: PositiveInt  # what one thread can use
    shared_by: PositiveInt = 1  # cores
    bandwidth_bytes_per_s: PositiveFloat | None = None  # read, one core, if known


class ComputeUnit(Part):
    """A CPU cluster, a GPU, an NPU. Peaks are of the whole unit at `clock_hz`, dense, 2 operations a MAC."""

    name: str
    kind: Literal["cpu", "gpu", "npu"]
    core: str  # "cortex-a76", "ampere", "hexagon-v75"
    cores: PositiveInt
    clock_hz: PositiveFloat
    sustained_clock_hz: PositiveFloat | None = None
    isa: tuple[Isa, ...] = ()
    peak_ops_per_s: dict[Dtype, PositiveFloat]
    caches: tuple[Cache, ...] = ()


class Memory(Part):
    size_bytes: PositiveInt
    usable_share: Share  # what is left for a model beside the system
    bandwidth_bytes_per_s: PositiveFloat  # the interface's peak
    one_thread_bytes_per_s: PositiveFloat | None = None  # what one core reads, if measured


class Storage(Part):
    size_bytes: PositiveInt | None = None
    read_bytes_per_s: PositiveFloat | None = None


class RuntimeSupport(Part):
    """A runtime that exists on this device: on which unit, with which precisions."""

    name: RuntimeName
    unit: str  # a ComputeUnit's name
    precisions: tuple[str, ...]  # edgesdk.plan.types.Precision values
    overhead_bytes: PositiveInt | None = None  # resident memory of the runtime itself, measured; None: unknown


class PowerMode(Part):
    name: str
    power_w: PositiveFloat | None = None
    clock_hz: dict[str, PositiveFloat] = {}  # per unit
    memory_bandwidth_bytes_per_s: PositiveFloat | None = None


class Variant(Part):
    """The same board with other numbers: `raspberry-pi-5-4gb` is `raspberry-pi-5` with these fields replaced."""

    suffix: str  # "4gb"
    set: dict[str, Any]  # dotted field → value, e.g. {"memory.size_bytes" = 4294967296}


class Board(Part):
    """The very board that a profile was read from (`edgesdk devices probe`)."""

    id: str  # a digest of what tells it from every other board
    identified_by: str
    model: str  # as it calls itself
    probed: str  # the day
    based_on: str | None = None  # the shipped profile that it is one of
    emulated: bool = False
    system: str = ""
    kernel: str = ""
    governor: str | None = None
    runtimes: dict[str, str] = {}  # that are there, with their versions
    programs: dict[str, str] = {}  # name → path there
    nvidia: dict[str, str] = {}  # "l4t", "cuda", "power_mode"
    thermal_zones: tuple[str, ...] = ()
    power_rails: tuple[str, ...] = ()  # "VDD_IN (ina3221)"; those that do not answer say so


class DeviceProfile(Noun):
    KIND: ClassVar[str] = "device-profile"

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")]
    title: str
    family: str  # the name of a file in targets/: "raspberry-pi", "jetson", "phone", "mcu", "host"
    arch: Literal["aarch64", "armv7", "armv6m", "armv7m", "armv8m", "xtensa", "x86_64", "arm64-apple"]
    os: Literal["linux", "android", "ios", "none"]
    aliases: tuple[str, ...] = ()
    published_names: tuple[str, ...] = ()  # how benchmark tables call this device
    models: tuple[str, ...] = ()  # how such a board or its chip calls itself: the beginning of its device tree's model, a phone's chip
    board: Board | None = None  # of a user's own profile: it holds for this board alone
    units: tuple[ComputeUnit, ...]
    memory: Memory
    storage: Storage = Storage()
    runtimes: tuple[RuntimeSupport, ...]
    power_modes: tuple[PowerMode, ...] = ()
    default_power_mode: str | None = None
    variants: tuple[Variant, ...] = ()
    sources: dict[str, str]  # dotted field prefix → URL, datasheet or "derived: formula"
    notes: str = ""

    @model_validator(mode="after")
    def _names_agree(self) -> DeviceProfile:
        names = {u.name for u in self.units}
        for r in self.runtimes:
            if r.unit not in names:
                raise ValueError(f"runtime '{r.name}' runs on unit '{r.unit}', which is not one of {sorted(names)}")
        return self

    def unit(self, name: str) -> ComputeUnit:
        return next(u for u in self.units if u.name == name)

    @property
    def usable_bytes(self) -> int:
        """Memory a model may take, in bytes."""
        return int(self.memory.size_bytes * self.memory.usable_share)
