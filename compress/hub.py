"""Publishing an artifact on the Hugging Face Hub, for those who ask for it, and for nobody else."""

from __future__ import annotations

from pathlib import Path

from compress.errors import BadInput, CompressError, explain

_NOT_PUBLISHED = ["samples/*"]  # the questions of data sets are others' to publish


class Destination:
    """A repository of models, checked before any compute. endpoint: of a hub other than ``HF_ENDPOINT``'s.

    Raises :class:`BadInput` for a name that no repository may have, without a token, or where the hub does not know it.
    """

    def __init__(self, repository: str, endpoint: str | None = None):
        from huggingface_hub import HfApi, constants, get_token
        from huggingface_hub.utils import HFValidationError, validate_repo_id

        self.repository = repository
        try:
            validate_repo_id(repository)
        except HFValidationError as error:
            raise BadInput(f"--push-to {repository}: no name of a repository: {explain(error)}") from None
        if Path(repository).exists():
            raise BadInput(
                f"--push-to {repository}: is a directory here; name a repository of the hub, such as you/{Path(repository).name}"
            )
        if constants.HF_HUB_OFFLINE:
            raise BadInput("--push-to: HF_HUB_OFFLINE is set; unset it to upload")
        if not get_token():
            raise BadInput("--push-to: no token of the Hugging Face Hub; log in with `hf auth login`, or set HF_TOKEN")
        self.api = HfApi(endpoint=endpoint)
        try:
            self.api.whoami()
        except Exception as error:  # of the network, of the hub, of the token: nothing of it is ours
            raise BadInput(f"--push-to: the hub does not let this token in: {explain(error)}") from None

    def push(self, artifact: Path) -> str:
        """Upload a directory and return its address. A new repository is private. Raises :class:`CompressError`."""
        try:
            created = self.api.create_repo(self.repository, private=True, exist_ok=True)
            self.api.upload_folder(
                repo_id=created.repo_id, folder_path=artifact, ignore_patterns=_NOT_PUBLISHED,
                commit_message="Compressed model, made by compress",
            )  # fmt: skip
        except Exception as error:
            raise CompressError(
                f"{artifact} is complete, but was not uploaded: {explain(error)}; "
                f"`hf upload {self.repository} {artifact}` tries again"
            ) from None
        return str(created)
