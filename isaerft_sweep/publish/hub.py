"""Uploads an adapter or an export to the Hub, under the name and with the tags on its card."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from isaerft_sweep.errors import CardError, FolderError, PushError
from isaerft_sweep.journal.atomic_files import read_json
from isaerft_sweep.results.card.card_data import is_name, is_repository

if TYPE_CHECKING:
    from huggingface_hub import CardData

T = TypeVar("T")


@dataclass(frozen=True)
class Upload:
    """One upload. ``files``: size in bytes by name. ``url``: None before the upload."""

    repository: str
    files: dict[str, int]
    tags: list[str]
    private: bool
    url: str | None = None

    def as_text(self) -> str:
        """Target, tags and files as lines of text."""
        where = f"uploaded to {self.url}" if self.url else f"dry run: nothing was uploaded to {self.repository}"
        lines = [f"{size / 1e6:9.2f} MB  {name}" for name, size in self.files.items()]
        visible = "private" if self.private else "public"
        return "\n".join([f"{where} ({visible})", f"tags: {', '.join(self.tags)}", *lines])


def push(folder: Path, repository: str | None = None, private: bool = False, dry_run: bool = False) -> Upload:
    """Upload ``folder``, an adapter or an exported model with its card.

    Args:
        folder: has ``README.md`` and ``adapter_config.json`` or ``config.json``.
        repository: ``ORG/NAME``; None: the card's model name, under the owner of the token.
        private: whether to create the repository as private.
        dry_run: only check and report; needs no token and no network.

    Raises CardError, FolderError or PushError; every check that can run before the upload does.
    """
    card = read_card(folder)
    check_loadable_elsewhere(folder)
    name = repository or str(card.get("model_name") or "")
    if not is_name(name):
        raise PushError(f"the repository must be ORG/NAME or NAME by the Hub's rules but is '{name}'. Give one: --repo.")
    files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    upload = Upload(name, files, list(card.get("tags") or []), private)
    return upload if dry_run else _upload(folder, upload)


def read_card(folder: Path) -> CardData:
    """The front matter of the folder's card. Raises CardError when there is none that the Hub can read."""
    from huggingface_hub import ModelCard

    path = folder / "README.md"
    if not path.is_file():
        raise CardError(
            f"the folder {folder} must have a card, README.md, but has none. Write it: isaerft-sweep card TRIAL."
        )
    try:
        front_matter: CardData = ModelCard.load(path).data
        return front_matter
    except Exception as error:  # YAML and the Hub have no common base class
        raise CardError(f"the card {path} must begin with YAML that the Hub can read: {error}") from error


def read_adapter_config(folder: Path) -> dict[str, Any] | None:
    """``adapter_config.json`` with its ``sites`` checked; None when the file is missing."""
    path = folder / "adapter_config.json"
    try:
        config = read_json(path)
    except ValueError as error:
        raise FolderError(f"{path} must be JSON but is not: {error}.") from error
    if config is None:
        return None
    if not isinstance(config, dict) or not all(isinstance(site, dict) for site in config.get("sites") or []):
        raise FolderError(f"{path} must be an object with a list of sites but holds {str(config)[:80]!r}.")
    return config


def check_loadable_elsewhere(folder: Path) -> None:
    """Raise FolderError unless other machines can load ``folder``: it must not refer to local folders."""
    adapter = read_adapter_config(folder)
    if adapter is None:
        if not (folder / "config.json").is_file():
            raise FolderError(f"'{folder}' must be an adapter's folder or an exported model but is neither.")
        return
    base = str(adapter.get("base_model_name_or_path") or "")
    if not is_repository(base):
        raise FolderError(
            f"the adapter's base model must be a name on the Hub but is '{base}': no other machine could load it. Put the "
            f"name into {folder / 'adapter_config.json'}, or publish the whole model: isaerft-sweep export."
        )
    local = [site["sae_path"] for site in adapter.get("sites") or [] if site.get("sae_path")]
    if local:
        raise FolderError(
            f"the adapter's SAE must be one that sae_lens can find by release and id but is the folder '{local[0]}' of this "
            "machine: no other machine could load it. Publish the whole model: isaerft-sweep export, then push its folder."
        )


def _upload(folder: Path, upload: Upload) -> Upload:
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    if get_token() is None:
        raise PushError("pushing needs a token of the Hub but there is none. Log in: `hf auth login`, or set HF_TOKEN.")
    disable_progress_bars()
    api = HfApi(library_name="isaerft-sweep")
    created = _call_hub(api.endpoint, lambda: api.create_repo(upload.repository, private=upload.private, exist_ok=True))
    private = bool(_call_hub(api.endpoint, lambda: api.repo_info(created.repo_id)).private)
    if upload.private and not private:
        raise PushError(f"{created.repo_id} is there already and public. Nothing was uploaded. Choose another name: --repo.")
    message = "Upload by isaerft-sweep"
    commit = _call_hub(
        api.endpoint, lambda: api.upload_folder(repo_id=created.repo_id, folder_path=folder, commit_message=message)
    )
    return replace(upload, repository=created.repo_id, private=private, url=str(getattr(commit, "repo_url", created)))


def _call_hub(endpoint: str, request: Callable[[], T]) -> T:
    """The Hub's answer. Its client raises many kinds of error; each becomes a PushError that says what to do."""
    try:
        return request()
    except Exception as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise PushError(
            f"the Hub at {endpoint} did not take it: {reason} Check the network, that the token may write there, and the "
            "name (--repo ORG/NAME). The same command resumes: files that are there are not sent again."
        ) from error
