"""Handing a folder to the Hugging Face hub."""

from pathlib import Path

from ...cache.errors import InputError


def require_repo(repo: str) -> None:
    """Raises InputError for what is no name of a repository, before anything is computed for it."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"--push {repo}: not the name of a repository of the hub ({_gist(error)})") from error


def push(folder: Path, repo: str) -> str:
    """Upload a folder as one commit, into a repository that is made where it is missing.

    The hub's address, and the token, are huggingface_hub's own: `HF_ENDPOINT`, `HF_TOKEN` or `hf auth login`.

    Returns:
        URL of the commit.

    Raises:
        InputError: if the hub refuses or cannot be reached. The folder stays as it is.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="dimefm")
    try:
        name = api.create_repo(repo, exist_ok=True).repo_id
        done = api.upload_folder(repo_id=name, folder_path=folder, commit_message="dimefm export")
    except Exception as error:  # the hub's, the network's and the disk's errors have no type in common
        raise InputError(
            f"--push {repo}: the hub did not take {folder} ({_gist(error)}); the folder is whole: "
            f"`hf upload {repo} {folder}` sends it once the cause is mended (`hf auth login`, or set HF_TOKEN)"
        ) from error
    return str(done.commit_url)


def _gist(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"[:300]
