"""A new rollout: what was asked for is checked here, before anything is sent."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from edgesdk.errors import InputError, UnknownName
from edgesdk.fleet.broker import Broker
from edgesdk.fleet.rollout import Spec, order_of, parse_halt, parse_stages
from edgesdk.fleet.wire import NAME


def spec_of(
    bundle: str | Path,
    devices: Sequence[str],
    broker: str,
    *,
    fleet: str = "default",
    stages: str = "1,10%,50%,100%",
    canaries: Sequence[str] = (),
    halt_on: str = "1",
    wait_s: float = 0.0,
    timeout_s: float = 1800.0,
    away_s: float = 60.0,
    gate_s: float | None = None,
    url: str | None = None,
    sign: str = "default",
    login: dict[str, str] | None = None,
    id: str | None = None,
) -> Spec:
    """A checked rollout of `bundle` to `devices` by name. Raises `InputError`, and `CheckFailed` for a bundle that no trusted key signed."""
    from edgesdk.install import read_source
    from edgesdk.signing import own_key, signer_of

    source = read_source(bundle)
    signer_of(bundle)
    if not source.manifest.golden:
        raise InputError(f"{bundle}: holds no golden outputs", "devices could not check it; build for --runtime litert or executorch")
    own_key(sign)
    rollout = id or datetime.now(UTC).strftime("r%Y%m%d-%H%M%S")
    for what, name in (("--id", rollout), ("--fleet", fleet), *(("--on", d) for d in devices)):
        if not NAME.fullmatch(name):
            raise InputError(
                f"{what} {name}: cannot be a name", "use letters, digits, and . _ - inside; --on takes names of the inventory here"
            )
    for name in canaries:
        if name not in devices:
            raise UnknownName("canary among these devices", name, devices)
    if url is not None and not url.startswith(("http://", "https://")):
        raise InputError(f"--url {url}: not http:// or https://", "give where devices find this very bundle file")
    login = {k: str(Path(v).absolute()) for k, v in (login or {}).items()}
    Broker(broker, **login)
    halt, share = parse_halt(halt_on)
    return Spec(
        id=rollout, fleet=fleet, bundle=source.digest, model_name=source.manifest.model_name, devices=order_of(devices, canaries, rollout),
        stages=parse_stages(stages, len(devices), len(canaries)), halt_on=halt, halt_share=share, wait_s=wait_s, timeout_s=timeout_s,
        away_s=away_s, gate_s=gate_s, url=url, broker=broker, key=sign, login=login,
    )  # fmt: skip
