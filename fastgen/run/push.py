"""`fastgen push`: an export as a repository of the hub."""

import re
from pathlib import Path

from fastgen.sampling.original import export_folder


def push(path: Path, repo_id: str, private: bool, message: str | None = None) -> str:
    """Uploads the export of a run, or the export that `path` is, into a repository, which is made if it is not there.
    Returns its address.

    Raises ValueError for anything else than an export, for a name that is no repository's, and, before anything is
    uploaded, without a login or without the right to write there."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    folder = export_folder(path)
    if folder is None:
        raise ValueError(f"{path} is neither a run with an export nor an export; `fastgen export` makes one")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise ValueError(f"{repo_id!r} is no repository; write NAME/REPOSITORY")
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
    except (LocalTokenNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"the hub did not let us write {repo_id}: {said[0]}; log in with `hf auth login`, with a token that may "
            "write there"
        ) from None
    info = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message or "Student of fastgen")
    return str(info.commit_url)
