"""Policy files: a dict of tensors and plain values (``torch.save``), loaded with ``weights_only=True``: no code in them
runs."""

from __future__ import annotations

import hashlib
import io
import pickle
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from halo.errors import PolicyError
from halo.features import FEATURE_SETS
from halo.policy import ACTIVATIONS, HEADS, Layer, Policy

FORMAT = 1


def shipped() -> list[Path]:
    """The policies in the package."""
    folder = Path(str(resources.files("halo.policies")))
    return sorted(folder.glob("*.pt"))


def find(name_or_path: str) -> Path:
    """A path as it is, or a shipped policy's name with or without ``.pt``.

    Raises:
        PolicyError: neither.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    known = {p.stem: p for p in shipped()}
    found = known.get(name_or_path.removesuffix(".pt"))
    if found is None:
        raise PolicyError(
            f"policy '{name_or_path}' is no file and not shipped; shipped are {', '.join(known) or 'none'}"
        )
    return found


def load(name_or_path: str) -> Policy:
    """Read and check a policy.

    Raises:
        PolicyError: not found, not a plain dict of tensors, code in it, an unknown version, feature set or head, or
        arrays
            of the wrong shape.
    """
    path = find(name_or_path)
    raw = path.read_bytes()
    return from_dict(_unpickle(path, raw), path, hashlib.sha256(raw).hexdigest())


def _unpickle(path: Path, raw: bytes) -> dict[str, Any]:
    import torch

    try:
        data = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise PolicyError(
            f"{path}: holds something other than tensors and plain values (it could run code); not loaded"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        why = (str(error).splitlines() or ["it is cut off or empty"])[0]
        raise PolicyError(f"{path}: not a policy file: {why}") from None
    if not isinstance(data, dict):
        raise PolicyError(f"{path}: not a policy file: it holds a {type(data).__name__}, not a dict")
    return data


def from_dict(data: dict[str, Any], path: Path, sha256: str) -> Policy:
    """A policy of a file's dict, every value checked (errors as ``load``)."""

    def wrong(what: str) -> PolicyError:
        return PolicyError(f"{path}: {what}; train it again with this HALO or use another policy")

    if data.get("format") != FORMAT:
        raise wrong(f"policy format {data.get('format')!r} is unknown (this HALO reads {FORMAT})")
    feature_set = FEATURE_SETS.get(str(data.get("feature_set")))
    if feature_set is None:
        raise wrong(f"feature set {data.get('feature_set')!r} is unknown (known: {', '.join(FEATURE_SETS)})")
    if data.get("head") not in HEADS:
        raise wrong(f"action head {data.get('head')!r} is unknown (known: {', '.join(HEADS)})")
    widths = data.get("bits", ())
    if not isinstance(widths, list | tuple) or not all(isinstance(b, int) for b in widths):
        raise wrong(f"bit-widths {widths!r} are no list of numbers")
    bits = tuple(widths)
    if data["head"] == "bits" and (
        len(bits) < 2 or list(bits) != sorted(set(bits)) or not set(bits) <= {2, 3, 4, 5, 6, 8}
    ):
        raise wrong(f"bit-widths {bits} are not two or more of 2, 3, 4, 5, 6, 8, ascending")

    def array(source: Any, key: str, shape: tuple[int | None, ...]) -> np.ndarray:
        value: Any = source.get(key) if isinstance(source, dict) else None
        if not hasattr(value, "numpy"):
            raise wrong(f"'{key}' is missing")
        found = value.double().numpy()
        if found.ndim != len(shape) or any(w is not None and w != f for w, f in zip(shape, found.shape, strict=False)):
            raise wrong(f"'{key}' has shape {found.shape}, expected {tuple('any' if n is None else n for n in shape)}")
        if not np.isfinite(found).all():
            raise wrong(f"'{key}' holds NaN or Inf")
        return found

    width = feature_set.width
    mean, std = array(data, "mean", (width,)), array(data, "std", (width,))
    if (std <= 0).any():
        raise wrong("'std' holds zero or less")
    layers = []
    entries = data.get("layers")
    if not isinstance(entries, list | tuple):
        raise wrong("'layers' is no list")
    for entry in entries:
        weight = array(entry, "weight", (None, width))
        width = weight.shape[0]
        activation = str(entry.get("activation", "none"))
        if activation not in ACTIVATIONS:
            raise wrong(f"activation {activation!r} is unknown")
        normed = "scale" in entry
        scale, shift = (array(entry, k, (width,)) if normed else None for k in ("scale", "shift"))
        layers.append(Layer(weight, array(entry, "bias", (width,)), scale, shift, activation))
    if not layers or width < 1:
        raise wrong("it has no layers")
    card = data.get("card") if isinstance(data.get("card"), dict) else {}
    return Policy(
        path.stem,
        data["head"],
        str(data.get("family", "")),
        feature_set,
        bits,
        mean,
        std,
        tuple(layers),
        sha256,
        card or {},
    )
