"""A real death on demand, for tests: few machines have the CPU that makes llama.cpp crash.

``HALO_TEST_CRASH=SIGNAL:WHEN[:N]`` kills the worker with SIGNAL at its Nth batch (default 1) of two or more tokens.
WHEN is ``extra_bufts`` (only while the extra CPU buffers are on) or ``always``.
"""

from __future__ import annotations

import os
import signal


class CrashHook:
    """Counts batches and, if the environment asks for it, ends this process at the one named there."""

    def __init__(self) -> None:
        wish = os.environ.get("HALO_TEST_CRASH", "")
        name, when, nth = [*wish.split(":"), "", ""][:3]
        self._signal = signal.Signals[name] if wish else None
        self._always = when == "always"
        self._left = int(nth or 1)

    def before_batch(self, n_tokens: int, extra_bufts: bool) -> None:
        """Call ahead of every ``llama_decode``."""
        if self._signal is None or n_tokens < 2 or not (self._always or extra_bufts):
            return
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), self._signal)
