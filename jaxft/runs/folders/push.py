"""Upload of an export to a repository of the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from jaxft.core.errors import UserError
from jaxft.runs.folders.outputs import MARK


def check_push(repository: str, kind: str) -> None:
    """Raise UserError for a repository that no export can be pushed to."""
    if not repository:
        return
    if kind == "none":
        raise UserError("export.push needs an export; give another export.kind than none")
    try:
        validate_repo_id(repository)
    except HFValidationError:
        raise UserError(
            f"export.push={repository!r} is no name of a repository; give one such as me/my-model"
        ) from None
    if get_token() is None:
        raise UserError("export.push needs an account of the hub; run `hf auth login` first")


def push_folder(folder: Path, repository: str) -> None:
    """Upload a folder to a repository, which is made private if it does not exist.

    Raises UserError if the hub refuses it or is not reached.
    """
    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Add an export of jaxft",
            ignore_patterns=MARK,
        )
    except Exception as error:  # of a network, an account or the hub
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"the export is in {folder}, but export.push={repository} failed ({reason}); `jaxft"
            f" export --workdir DIR --overwrite --config.export.push={repository}` tries again"
        ) from None
    print(f"pushed {folder} to {repository}", flush=True)
