"""An exported directory to the Hub: the one thing that an export does over a network."""

from __future__ import annotations

import re
from pathlib import Path

from cmkd_scale.errors import UsageError

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def check_push(repo_id: str) -> None:
    """Refuse before anything is written what could not be uploaded.

    Raises:
        UsageError: the name is none of a repository, or this machine is told to stay offline.
    """
    from huggingface_hub import constants

    if not _REPOSITORY.fullmatch(repo_id):
        raise UsageError(f"--push {repo_id} is no name of a repository; write it as owner/name.")
    if constants.HF_HUB_OFFLINE:
        raise UsageError(
            f"--push {repo_id} needs the network, and HF_HUB_OFFLINE is set. Unset it, or export "
            "without --push and upload the directory from elsewhere."
        )


def push(directory: Path, repo_id: str) -> str:
    """Upload a directory as one commit; a repository that is not there is made, private.

    Returns:
        The address of the commit.

    Raises:
        UsageError: the Hub refuses, or is not reached. The directory is untouched.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repo_id, private=True, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=directory, commit_message="Exported by cmkd_scale"
        )
    # What the HTTP library raises has no base that another version of it would keep.
    except Exception as error:
        raise UsageError(
            f"{directory} is written, but cannot be uploaded to {repo_id} "
            f"({' '.join(str(error).split())[:300]}). Log in with `hf auth login`, then upload it: "
            f"`hf upload {repo_id} {directory}`."
        ) from None
    return str(commit.commit_url)
