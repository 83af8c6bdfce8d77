"""Every error HALO shows to a user: one class a cause, one line a message.

A message says what is wrong, where (file, tensor) and what to do. The command line prints it after ``halo: `` and exits
with 2; nothing else may end a command on bad input.
"""

from __future__ import annotations


class HaloError(Exception):
    """Base of all errors that are the user's to mend. ``str(error)`` is one line."""


class SourceError(HaloError):
    """A checkpoint, GGUF file, tokenizer, imatrix or text that cannot be used."""


class UnsupportedError(SourceError):
    """A model that HALO cannot convert exactly."""


class PolicyError(HaloError):
    """A policy file that is unsafe, unknown or of the wrong shape."""


class BudgetError(HaloError):
    """A budget or pin that cannot be met."""


class OutputError(HaloError):
    """The output exists, cannot be written, or the disk is full."""


class RecipeError(HaloError):
    """A manifest that does not fit the source it is applied to."""


class DeviceError(HaloError):
    """A device profile that is unknown or malformed."""


class RuntimeFailure(HaloError):
    """llama.cpp refused a file or a call."""


class NativeCrash(RuntimeFailure):
    """llama.cpp's process died.

    Attributes:
        signal_name: the signal, such as ``SIGILL``, or ``exit code N``.
        model: the file that was being run.
    """

    def __init__(self, message: str, signal_name: str, model: str):
        super().__init__(message)
        self.signal_name = signal_name
        self.model = model
