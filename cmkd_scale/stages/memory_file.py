"""The file of a memory in its run: written if all ranks agree, found again if it is finished."""

from __future__ import annotations

import os
from pathlib import Path

from cmkd_scale import distributed
from cmkd_scale.errors import CmkdError, IntegrityError, UsageError
from cmkd_scale.files import sync
from cmkd_scale.memory.bank import PrototypeMemory, load_memory, save_memory


def find_finished(file: Path, made_of: str) -> PrototypeMemory | None:
    """The memory that an earlier try has saved, if every rank finds it; a collective call.

    Args:
        file: where it would be.
        made_of: what it is to be made of, see ``memory_identity``.
    """
    try:
        found = load_memory(file)
    except CmkdError:  # none, or a damaged one, which is built again
        found = None
    same = found is not None and found.provenance.get("made_of") == made_of
    return found if all(distributed.gather_integers(int(same))) else None


def save_if_agreed(memory: PrototypeMemory, file: Path) -> str:
    """Write a memory on rank 0 if all ranks have built the same one; returns its digest.

    Raises:
        IntegrityError: they have not, and nothing is saved.
        UsageError: it cannot be written.
    """
    # Hashing takes as long as writing, so rank 0 writes while the others hash: under another
    # name until they have compared.
    unchecked = file.with_name(f".{file.name}.unchecked")
    digest = ""

    def take_digest() -> None:
        nonlocal digest
        digest = save_memory(memory, unchecked) if distributed.is_main() else memory.digest()

    distributed.run_together(take_digest)
    if not distributed.same_digest(digest):
        distributed.run_on_main(lambda: unchecked.unlink(missing_ok=True))
        raise IntegrityError(
            "The ranks have built different memories, so nothing is saved; run all processes on "
            "machines of one kind with equal versions."
        )
    distributed.run_on_main(lambda: _rename(unchecked, file))
    return digest


def _rename(before: Path, after: Path) -> None:
    try:
        os.replace(before, after)
        sync(after.parent)
    except OSError as error:
        raise UsageError(
            f"The memory {after} cannot be written: {error}. Make it writable and run the same "
            "command again."
        ) from None
