"""Where a checkpoint lies: a directory, or a repository of the Hugging Face hub that is fetched once and cached."""

import re
from pathlib import Path

from cats.errors import CatsError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SETTINGS = (
    *("config.json", "original_config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.*", "merges.txt", "chat_template*", "calibration.json", "acceptance.json"),
)
SAFETENSORS = ("model*.safetensors", "model.safetensors.index.json", "nested-*.safetensors", "nested.safetensors.index.json")
PICKLES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")


def locate(place: str | Path) -> Path:
    """The directory of a checkpoint or an adapter: `place` itself, or the local copy of the hub repository of that name.

    Fetches configuration, tokenizer and weights (safetensors where there are some, else pickles). HF_HUB_OFFLINE is honoured.

    Raises:
        CatsError: there is neither a directory nor a repository of that name, or it cannot be fetched.
    """
    path = Path(place).expanduser()
    if path.is_dir():
        return path
    if not isinstance(place, str) or not HUB_ID.fullmatch(place):
        raise CatsError(f"there is no directory {place}; give the path of a checkpoint directory, or a hub id like lmsys/vicuna-7b-v1.3.")
    return fetch(place)


def fetch(hub_id: str) -> Path:
    """The local copy of a hub repository, made if need be."""
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    http_fault: type[Exception] = HfHubHTTPError.__bases__[0]  # of the HTTP library, whichever the hub's client stands on
    try:
        if constants.HF_HUB_OFFLINE:
            return Path(snapshot_download(hub_id, local_files_only=True))
        files = HfApi().list_repo_files(hub_id)
        weights = SAFETENSORS if any(re.fullmatch(r"(model|nested-).*\.safetensors", name) for name in files) else PICKLES
        return Path(snapshot_download(hub_id, allow_patterns=[*SETTINGS, *weights]))
    except GatedRepoError as error:
        raise CatsError(f"{hub_id} asks for consent: accept its terms on the hub, then run `hf auth login`.") from error
    except RepositoryNotFoundError as error:
        raise CatsError(
            f"there is no directory {hub_id}, and the hub shows no repository of that name: it is misspelt, or private (`hf auth login`)."
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise CatsError(
            f"there is no directory {hub_id}, and it is not in the local cache of the hub, which is out of reach "
            "(or HF_HUB_OFFLINE is set); fetch it once."
        ) from error
    except (OSError, http_fault) as error:
        return _cached(hub_id, error)
    except ValueError as error:
        raise CatsError(f"{hub_id!r} is neither a directory nor a name that the hub knows: {str(error).splitlines()[0]}") from error


def publish(directory: Path, hub_id: str, private: bool, token: str | None) -> str:
    """Put the files of a directory into a hub repository, which is made if need be; the commit's address.

    Raises:
        CatsError: the hub cannot be reached, or does not let this user.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    http_fault: type[Exception] = HfHubHTTPError.__bases__[0]
    api = HfApi(token=token)
    try:
        api.create_repo(hub_id, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=hub_id, folder_path=directory).commit_url)
    except (OSError, ValueError, OfflineModeIsEnabled, http_fault) as error:
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CatsError(f"cannot push to {hub_id}: {cause}; log in by `hf auth login`, or give token=...") from error


def _cached(hub_id: str, fault: Exception) -> Path:
    """The copy that an earlier run fetched, where the hub cannot be reached now."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, local_files_only=True))
    except LocalEntryNotFoundError as error:
        cause = (str(fault).strip() or type(fault).__name__).splitlines()[0]
        raise CatsError(f"there is no directory {hub_id}, and it cannot be fetched from the hub: {cause}") from error
