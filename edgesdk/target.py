"""Target: what edgesdk prefers on a family of boards. A value in `targets/<family>.py`; holds no numbers of any device."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgesdk.errors import UnknownName

if TYPE_CHECKING:
    from edgesdk.device import DeviceProfile


@dataclass(frozen=True)
class Target:
    """`runtimes`, `links` and `kernels` are in order of preference; `build_only` runtimes lower here but are never planned by themselves."""

    name: str
    runtimes: tuple[str, ...]
    links: tuple[str, ...]
    kernels: tuple[str, ...] = ()
    build_only: tuple[str, ...] = ()
    default_threads: int = 1


def target_for(device: DeviceProfile) -> Target:
    """The target of `device.family`. Raises `UnknownName` when `targets/` has no such file."""
    import edgesdk.targets as folder

    name = device.family.replace("-", "_")
    known = [m.name for m in pkgutil.iter_modules(folder.__path__)]
    if name not in known:
        raise UnknownName("device family", device.family, [k.replace("_", "-") for k in known])
    target: Target = importlib.import_module(f"edgesdk.targets.{name}").TARGET
    return target
