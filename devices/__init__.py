"""What a device is: memory, backend and the types it runs well."""

from halo.devices.memory import expected_memory, kv_cache_bytes
from halo.devices.profile import Device, this_machine
from halo.devices.toml_file import load_device

__all__ = ["Device", "expected_memory", "kv_cache_bytes", "load_device", "this_machine"]
