"""What boards say of themselves, as `edgesdk.agent.look` reads it: written from public facts (datasheets, the kernel's formats), of no board in particular."""

from __future__ import annotations

_CPU = "/sys/devices/system/cpu/"
ARMV8 = "fp asimd evtstrm crc32 cpuid"
ARMV82 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
ARMV9 = ARMV82 + " sha3 sm3 sm4 asimdfhm uscat ilrcpc flagm sb paca pacg dcpodp flagm2 frint i8mm bf16 bti"


def core(implementer: int, part: int, features: str) -> dict[str, str]:
    return {
        "BogoMIPS": "108.00", "Features": features, "CPU implementer": f"0x{implementer:02x}", "CPU architecture": "8", "CPU variant": "0x4",
        "CPU part": f"0x{part:03x}", "CPU revision": "1",
    }  # fmt: skip


def cpuinfo(cores: list[dict[str, str]], tail: str = "") -> str:
    blocks = ["\n".join([f"processor\t: {i}", *(f"{k}\t: {v}" for k, v in keys.items())]) for i, keys in enumerate(cores)]
    return "\n\n".join([*blocks, tail] if tail else blocks)


def cluster(numbers: range, least_khz: int, most_khz: int, governor: str, caches: list[tuple[int, str, int, str]]) -> dict[str, str]:
    """`caches`: level, type, kilobytes, the cores that share it (`%d`: the core itself)."""
    found = {}
    for n in numbers:
        freq = f"{_CPU}cpu{n}/cpufreq/"
        found |= {freq + "cpuinfo_min_freq": str(least_khz), freq + "cpuinfo_max_freq": str(most_khz), freq + "scaling_governor": governor}
        found |= {freq + "scaling_min_freq": str(least_khz), freq + "scaling_max_freq": str(most_khz)}
        found[f"{_CPU}cpu{n}/topology/thread_siblings_list"] = str(n)
        for i, (level, kind, kilobytes, shared) in enumerate(caches):
            at = f"{_CPU}cpu{n}/cache/index{i}/"
            found |= {at + "level": str(level), at + "type": kind, at + "size": f"{kilobytes}K"}
            found[at + "shared_cpu_list"] = shared % n if "%" in shared else shared
    return found


def meminfo(total_kb: int, available_kb: int) -> str:
    return f"MemTotal:       {total_kb} kB\nMemFree:        1000 kB\nMemAvailable:   {available_kb} kB"


def zones(**celsius: float | None) -> dict[str, str]:
    found = {}
    for i, (name, value) in enumerate(celsius.items()):
        found[f"/sys/class/thermal/thermal_zone{i}/type"] = name.replace("_", "-")
        if value is not None:
            found[f"/sys/class/thermal/thermal_zone{i}/temp"] = str(int(value * 1000))
    return found


def df(device: str, total_kb: int, free_kb: int, at: str = "/") -> dict[str, str]:
    head = "Filesystem     1024-blocks     Used Available Capacity Mounted on"
    return {"!df": f"{head}\n{device} {total_kb} {total_kb - free_kb} {free_kb} 50% {at}", "!writable": "yes"}


def pi4() -> dict[str, str]:
    tail = "Hardware\t: BCM2835\nRevision\t: c03114\nSerial\t\t: 10000000a1b2c3d4\nModel\t\t: Raspberry Pi 4 Model B Rev 1.4"
    caches = [(1, "Data", 32, "%d"), (1, "Instruction", 48, "%d"), (2, "Unified", 1024, "0-3")]
    return {
        "/proc/cpuinfo": cpuinfo([core(0x41, 0xD08, ARMV8)] * 4, tail), "/proc/meminfo": meminfo(3884360, 3500000),
        "/proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.4", "/proc/device-tree/compatible": "raspberrypi,4-model-b brcm,bcm2711",
        "/proc/device-tree/serial-number": "10000000a1b2c3d4", "/etc/machine-id": "0123456789abcdef0123456789abcdef",
        "/etc/os-release": 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nID=debian', "!uname": "Linux 6.6.51+rpt-rpi-v8 aarch64",
        "!python": "3.11.2", "!package litert": "2.1.0", "!package numpy": "1.26.4",
        **cluster(range(4), 600000, 1800000, "ondemand", caches), **zones(cpu_thermal=48.2), **df("/dev/mmcblk0p2", 30000000, 20000000),
    }  # fmt: skip


def pi5() -> dict[str, str]:
    caches = [(1, "Data", 64, "%d"), (1, "Instruction", 64, "%d"), (2, "Unified", 512, "%d"), (3, "Unified", 2048, "0-3")]
    pmic = "\n".join(
        f"{rail}_A current({i})=0.12345678A\n{rail}_V volt({i + 8})=1.10000000V" for i, rail in enumerate(("3V7_WL_SW", "VDD_CORE"))
    )
    tail = "Revision\t: d04170\nSerial\t\t: abcdef0123456789\nModel\t\t: Raspberry Pi 5 Model B Rev 1.0"
    return {
        "/proc/cpuinfo": cpuinfo([core(0x41, 0xD0B, ARMV82)] * 4, tail), "/proc/meminfo": meminfo(8245248, 7700000),
        "/proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0", "/proc/device-tree/compatible": "raspberrypi,5-model-b brcm,bcm2712",
        "/proc/device-tree/serial-number": "abcdef0123456789", "/etc/os-release": 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"',
        "!uname": "Linux 6.6.51+rpt-rpi-2712 aarch64", "!python": "3.11.2", "!package litert": "2.1.0", "!package executorch": "1.0.0",
        "!pmic": pmic + "\nEXT5V_V volt(24)=5.12000000V", "/sys/class/hwmon/hwmon0/name": "cpu_thermal",
        **cluster(range(4), 1500000, 2400000, "ondemand", caches), **zones(cpu_thermal=51.0), **df("/dev/nvme0n1p2", 240000000, 200000000),
    }  # fmt: skip


def orin_nano() -> dict[str, str]:
    caches = [(1, "Data", 64, "%d"), (1, "Instruction", 64, "%d"), (2, "Unified", 256, "%d"), (3, "Unified", 2048, "0-3")]
    hwmon = {"/sys/class/hwmon/hwmon1/name": "ina3221"}
    for i, rail in enumerate(("VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"), 1):
        at = "/sys/class/hwmon/hwmon1/"
        hwmon |= {f"{at}in{i}_label": rail, f"{at}in{i}_input": "5016", f"{at}curr{i}_input": "520"}
    del hwmon["/sys/class/hwmon/hwmon1/curr3_input"]
    return {
        "/proc/cpuinfo": cpuinfo([core(0x41, 0xD42, ARMV82)] * 6), "/proc/meminfo": meminfo(7802072, 6500000),
        "/proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
        "/proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005-super nvidia,p3767-0005 nvidia,tegra234",
        "/proc/device-tree/serial-number": "1420123456789", "/etc/os-release": 'PRETTY_NAME="Ubuntu 22.04.5 LTS"',
        "/etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 01:49:37 UTC 2025",
        "/usr/local/cuda/version.json": '{"cuda": {"name": "CUDA SDK", "version": "12.6.11"}}', "!nvpmodel": "NV Power Mode: 15W\n0",
        "!uname": "Linux 5.15.148-tegra aarch64", "!python": "3.10.12", "!program trtexec": "/usr/src/tensorrt/bin/trtexec",
        **cluster(range(6), 115200, 1728000, "schedutil", caches), **zones(cpu_thermal=49.5, gpu_thermal=None, tj_thermal=50.1), **hwmon,
        **df("/dev/nvme0n1p1", 480000000, 400000000),
    }  # fmt: skip


def snapdragon() -> dict[str, str]:
    """A Galaxy S23's chip: a Cortex-X3, two A715, two A710, three A510. Android's shell tells no caches; there is no Python."""
    order = [(0x41, 0xD46)] * 3 + [(0x41, 0xD4D)] * 2 + [(0x41, 0xD47)] * 2 + [(0x41, 0xD4E)]
    props = {
        "ro.product.manufacturer": "samsung", "ro.product.model": "SM-S911B", "ro.product.device": "dm1q", "ro.soc.model": "SM8550",
        "ro.board.platform": "kalama", "ro.serialno": "R3CW10ABCDE", "ro.build.version.release": "14", "ro.build.version.sdk": "34",
    }  # fmt: skip
    battery = "/sys/class/power_supply/battery/"
    return {
        "/proc/cpuinfo": cpuinfo([core(i, p, ARMV9) for i, p in order], "Hardware\t: Qualcomm Technologies, Inc SM8550"),
        "/proc/meminfo": meminfo(7443000, 3300000), "!getprop": "\n".join(f"[{k}]: [{v}]" for k, v in props.items()),
        "!uname": "Linux 5.15.123-android13 aarch64", "!program benchmark_model": "/data/local/tmp/benchmark_model",
        battery + "type": "Battery", battery + "current_now": "-350000", battery + "voltage_now": "4120000",
        "/sys/class/power_supply/usb/type": "USB", **zones(cpu_1_0_0=38.0, gpuss_0=36.5), **df("/dev/block/dm-45", 110000000, 60000000, "/data"),
        **cluster(range(3), 307200, 2016000, "walt", []), **cluster(range(3, 7), 499200, 2803200, "walt", []),
        **cluster(range(7, 8), 595200, 3360000, "walt", []),
    }  # fmt: skip
