"""Where profiles are kept: safetensors files in a folder named by the hash of the model's weights.

    $WINNOW_CACHE, or winnow/ in $XDG_CACHE_HOME, or ~/.cache/winnow        what `winnow calibrate` writes
    configs/calibration                                                     what comes with Winnow
        calibration/<hash>/<method>.safetensors

The first wins. A file that cannot be used counts as missing, and the log says why.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from winnow.engine.calibration.registry import CALIBRATED

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

PACKAGED = Path(__file__).parents[2] / "configs" / "calibration"
"""The profiles that come with Winnow"""

VERSION = "1"
"""Of what the files hold; files of another version are not read"""

_BLOCK, _BLOCKS = 1 << 16, 256

Profile = dict[str, "Tensor"]
"""A method's tensors by name; its calibrator says which"""

NO_PROFILES: Mapping[str, Profile] = MappingProxyType({})


def cache_folder() -> Path:
    """The user's own folder of profiles."""
    stated = os.environ.get("WINNOW_CACHE")
    if stated:
        return Path(stated).expanduser() / "calibration"
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(caches).expanduser() / "winnow" / "calibration"


def weights_hash(path: Path) -> str:
    """16 hex digits for the weights of a .gguf file or of a directory of safetensors.

    Of each file its size and 256 blocks of 64 KiB, evenly spread, are read: models of any size are told apart at once.
    """
    digest = blake2b(digest_size=8)
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        size = file.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with file.open("rb") as data:
            for start in sorted({(size - _BLOCK) * i // (_BLOCKS - 1) for i in range(_BLOCKS)}):
                data.seek(max(0, start))
                digest.update(data.read(_BLOCK))
    return digest.hexdigest()


def load_profiles(path: Path, folders: Sequence[Path] | None = None) -> dict[str, Profile]:
    """The profiles of the model at `path` (see `resolve_model`), by method; of two folders the later wins."""
    profiles: dict[str, Profile] = {}
    key = weights_hash(path)
    for folder in (PACKAGED, cache_folder()) if folders is None else folders:
        for method in CALIBRATED:
            file = folder / key / f"{method}.safetensors"
            if file.is_file() and (profile := _read(file)) is not None:
                profiles[method] = profile
    return profiles


def _read(file: Path) -> Profile | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as data:
            version = (data.metadata() or {}).get("version")
            if version != VERSION:
                log.warning("%s is not used: it is of version %s, not %s; calibrate again", file, version, VERSION)
                return None
            return {name: data.get_tensor(name) for name in data.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        log.warning("%s is not used: %s", file, error)
        return None


def save_profile(folder: Path, path: Path, method: str, profile: Profile, facts: dict[str, Any]) -> Path:
    """Writes a profile of the model at `path`; `facts` say how it was made. Returns the file."""
    from safetensors.torch import save_file

    file = folder / weights_hash(path) / f"{method}.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"version": VERSION, "method": method} | {
        name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()
    }
    part = file.with_suffix(f".{os.getpid()}.part")
    save_file({name: tensor.contiguous() for name, tensor in profile.items()}, part, metadata)
    part.chmod(0o644)  # the library's files are its user's alone
    part.replace(file)  # whoever reads meanwhile sees the old profile or the new one
    return file
