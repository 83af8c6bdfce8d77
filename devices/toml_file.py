"""Device profiles in TOML: one's own, given with ``--device FILE.toml``."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from halo.devices.profile import Device, this_machine

from halo.errors import DeviceError
from halo.gguf_types import TYPE_SETS

BACKENDS = ("cpu", "cuda", "metal")
_KEYS: dict[str, type] = {"name": str, "backend": str, "memory_bytes": int, "type_set": str, "source": str}
_REQUIRED = ("backend", "memory_bytes")


def load_device(spec: str | None) -> Device:
    """The profile of a TOML file; None or ``this`` for this machine.

    Raises:
        DeviceError: no such file, not TOML, an unknown or missing key, a value of the wrong kind.
    """
    if spec in (None, "this"):
        return this_machine()
    path = Path(str(spec))
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DeviceError(
            f"device '{spec}': {error.strerror}; give a TOML file, or leave --device out for this machine"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DeviceError(f"{path}: not TOML: {error}") from None
    return _checked(path, data)


def _checked(path: Path, data: dict[str, Any]) -> Device:
    for key, value in data.items():
        if key not in _KEYS:
            raise DeviceError(f"{path}: unknown key '{key}'; known are {', '.join(_KEYS)}")
        if type(value) is not _KEYS[key]:
            raise DeviceError(f"{path}: '{key}' must be a {_KEYS[key].__name__}, not {value!r}")
    for key in _REQUIRED:
        if key not in data:
            raise DeviceError(f"{path}: key '{key}' is missing")
    backend = data["backend"]
    if backend not in BACKENDS:
        raise DeviceError(f"{path}: 'backend' must be one of {', '.join(BACKENDS)}, not '{backend}'")
    if data["memory_bytes"] <= 0:
        raise DeviceError(f"{path}: 'memory_bytes' must be positive, not {data['memory_bytes']}")
    set_name = data.get("type_set", backend)
    if set_name not in TYPE_SETS:
        raise DeviceError(f"{path}: 'type_set' must be one of {', '.join(TYPE_SETS)}, not '{set_name}'")
    return Device(data.get("name", path.stem), backend, data["memory_bytes"], set_name, data.get("source", str(path)))
