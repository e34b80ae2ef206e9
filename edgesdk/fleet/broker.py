"""How both sides reach a broker: MQTT 3.1.1 through paho, with TLS and a login. Goes to the device as it is: standard library and paho, Python 3.9.

A link is `mqtt://[user@]host[:1883]` or `mqtts://[user@]host[:8883]`. A password comes from a file or `EDGESDK_MQTT_PASSWORD`, never from the link.
"""

from __future__ import annotations

import os
import random
import ssl
from typing import Any
from urllib.parse import urlsplit

from edgesdk.errors import DeviceError, InputError, MissingTool

PASSWORD = "EDGESDK_MQTT_PASSWORD"
KEEPALIVE_S = 60


class Broker:
    """Where a broker is and how one logs in there. Raises `InputError`."""

    def __init__(
        self, link: str, password_file: str | None = None, ca: str | None = None, cert: str | None = None, key: str | None = None
    ) -> None:
        try:
            url = urlsplit(link)
            port = url.port
        except ValueError:
            url, port = urlsplit(""), None
        if url.scheme not in ("mqtt", "mqtts") or not url.hostname or url.path not in ("", "/") or url.query:
            raise InputError(
                f"--broker {_without_password(link)}: not a broker", "write it like mqtt://host:1883 or mqtts://user@host:8883"
            )
        if url.password is not None:
            hint = f"others see what stands there: give --password-file FILE, or {PASSWORD}"
            raise InputError("--broker: a password in the link", hint)
        self.secure = url.scheme == "mqtts"
        if (ca or cert or key) and not self.secure:
            raise InputError("--ca, --cert and --key are for TLS", "give --broker mqtts://host:8883")
        if bool(cert) != bool(key):
            raise InputError("--cert and --key belong together", "give both, or neither")
        self.host, self.port, self.user = url.hostname, port or (8883 if self.secure else 1883), url.username
        self.password = _password(password_file)
        if self.password is not None and self.user is None:
            raise InputError("--broker: a password without a user", "write it like mqtt://user@host")
        self.context = _context(ca, cert, key) if self.secure else None

    @property
    def name(self) -> str:
        return f"{'mqtts' if self.secure else 'mqtt'}://{self.host}:{self.port}"

    def client(self, client_id: str) -> Any:
        """A paho client that is not connected yet; it reconnects by itself. Raises `MissingTool`."""
        try:
            from paho.mqtt.client import Client
            from paho.mqtt.enums import CallbackAPIVersion
        except ImportError:
            raise MissingTool("MQTT wants paho-mqtt 2 or later, which is not installed", "pip install 'paho-mqtt>=2'") from None
        client = Client(CallbackAPIVersion.VERSION2, client_id=client_id, clean_session=True)
        if self.user is not None:
            client.username_pw_set(self.user, self.password)
        if self.context is not None:
            client.tls_set_context(self.context)
        client.reconnect_delay_set(random.randint(1, 3), 60)  # a broker that comes back is not met by all at once
        return client


def refusal(broker: Broker, reason: Any) -> DeviceError:
    """What a broker's refusal of a connection means."""
    text = str(reason)
    hint = "check the user and --password-file" if "uthor" in text or "assword" in text else "look at the broker's log"
    return DeviceError(f"{broker.name}: the broker refuses: {text}", hint)


def _without_password(link: str) -> str:
    head, sign, rest = link.rpartition("@")
    return head.split("//")[0] + "//…@" + rest if sign and ":" in head.partition("//")[2] else link


def _password(file: str | None) -> str | None:
    if file is None:
        return os.environ.get(PASSWORD)
    try:
        with open(file, encoding="utf-8") as held:
            return held.read().rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"--password-file {file}: cannot be read ({error})", "give a text file with the password in its first line"
        ) from None


def _context(ca: str | None, cert: str | None, key: str | None) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=ca)
    except (OSError, ssl.SSLError) as error:
        raise InputError(f"--ca {ca}: cannot be used ({error})", "give the certificates of your own authority as PEM") from None
    if cert:
        try:
            context.load_cert_chain(cert, key)
        except (OSError, ssl.SSLError) as error:
            raise InputError(f"--cert {cert}, --key {key}: cannot be used ({error})", "give a certificate and its key as PEM") from None
    return context
