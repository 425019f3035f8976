"""Where the files of a pretrained backbone lie: a directory in the hub's layout, or a hub's id.

Weights are read from safetensors alone: other formats can run code when they are opened.
"""

from __future__ import annotations

import hashlib
import json
import textwrap
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from cmkd_scale.errors import UsageError
from cmkd_scale.files import file_digest

_WANTED = ["*.json", "*.safetensors", "*.txt", "*.model"]
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True, slots=True)
class HubFiles:
    """The files of a backbone on this machine."""

    directory: Path
    revision: str | None
    """Commit of the hub's repository; None for a directory."""

    def weights_digest(self) -> str:
        """SHA-256 over the SHA-256 of each file of weights; of several GB this takes seconds.

        Raises:
            UsageError: there are no safetensors.
        """
        found = sorted(self.directory.glob("*.safetensors"))
        if not found or not any((self.directory / name).is_file() for name in _WEIGHTS):
            others = sorted(file.name for file in self.directory.glob("*.bin"))
            held = f" (it has {', '.join(others)})" if others else ""
            raise UsageError(
                f"{self.directory} holds no model.safetensors{held}. Only safetensors are read, "
                "since other formats can run code: name the branch of the hub's own conversion "
                "(model.revision=refs/pr/N), convert it with transformers' save_pretrained, or "
                "train from random weights with model.backbone_config alone."
            )
        digests = {file.name: _digest(file, file.stat().st_mtime_ns) for file in found}
        return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def find_files(backbone: str, revision: str | None) -> HubFiles:
    """The files of a directory or, downloaded on first use, of a hub's id.

    Args:
        backbone: directory, or id as in ``facebook/dinov2-large``.
        revision: branch, tag or commit of an id.

    Raises:
        UsageError: there is no such thing, or it is not to be had.
    """
    directory = Path(backbone)
    if directory.is_dir():
        if revision is not None:
            raise UsageError(f"model.revision is of a hub's id, and {backbone} is a directory.")
        if not (directory / "config.json").is_file():
            raise UsageError(f"{backbone} holds no config.json, so it is no model in hub layout.")
        return HubFiles(directory, None)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = Path(snapshot_download(backbone, revision=revision, allow_patterns=_WANTED))
    except HFValidationError:
        raise UsageError(
            f"model.backbone={backbone} is neither a directory here nor a hub's id (OWNER/NAME)."
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UsageError(
            f"model.backbone={backbone} is no directory here, and the hub does not give it "
            f"({_reason(error)}). Download it where there is a network (`hf download "
            f"{backbone}`) and set HF_HOME to its cache, or give its directory."
        ) from None
    return HubFiles(found, found.name)


@lru_cache(maxsize=64)
def _digest(file: Path, modified: int) -> str:
    """Once for each version of a file in a process."""
    return file_digest(file)


def _reason(error: Exception) -> str:
    from huggingface_hub.errors import LocalEntryNotFoundError

    if isinstance(error, LocalEntryNotFoundError):
        return "it is not in the cache, and the hub is not reached"
    return textwrap.shorten(str(error), 200, placeholder="...")
