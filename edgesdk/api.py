"""The verbs as Python functions: `from edgesdk.api import plan, build, flash, profile`.

Each has the name and the meaning of its command and is imported only when it is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgesdk.calibrate import calibrate
    from edgesdk.calibrate_on import calibrate_on
    from edgesdk.compare import compare
    from edgesdk.devices import list_devices, load_device
    from edgesdk.doctor import doctor
    from edgesdk.flash import flash, roll_back
    from edgesdk.intake import load_model
    from edgesdk.layouts import layouts
    from edgesdk.lower import build
    from edgesdk.plan import plan
    from edgesdk.probe import probe
    from edgesdk.profile import profile

_WHERE = {
    "build": "edgesdk.lower",
    "calibrate": "edgesdk.calibrate",
    "calibrate_on": "edgesdk.calibrate_on",
    "compare": "edgesdk.compare",
    "doctor": "edgesdk.doctor",
    "flash": "edgesdk.flash",
    "layouts": "edgesdk.layouts",
    "list_devices": "edgesdk.devices",
    "load_device": "edgesdk.devices",
    "load_model": "edgesdk.intake",
    "plan": "edgesdk.plan",
    "probe": "edgesdk.probe",
    "profile": "edgesdk.profile",
    "roll_back": "edgesdk.flash",
}

__all__ = [
    "build", "calibrate", "calibrate_on", "compare", "doctor", "flash", "layouts", "list_devices", "load_device", "load_model", "plan", "probe",
    "profile", "roll_back",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'edgesdk.api' has no attribute '{name}'")
    return getattr(importlib.import_module(_WHERE[name]), name)
