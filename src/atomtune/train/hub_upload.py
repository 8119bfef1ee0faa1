"""Hub upload: what `--push_to_hub` sends: the adapter's own files, and checkpoints if --hub_strategy asks for them.

The Trainer's own upload sends the whole output folder: run.json with paths of this machine, files that are not complete
yet, and a pickle of its arguments, which holds --hub_token.
"""

from collections.abc import Callable, Collection
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy


class HubUpload:
    """The uploads of one run, one after the other in a thread of their own; a failed one does not end the run.

    repo  OWNER/NAME, which exists
    """

    def __init__(self, repo: str, args: TrainingArguments, notice: Callable[[str], None]) -> None:
        self.repo, self._args, self._notice = repo, args, notice
        self._api = HfApi(token=args.hub_token)
        self._jobs: list[tuple[str, Future[Any]]] = []

    def send_checkpoint(self, folder: Path, adapter_files: Collection[str]) -> None:
        """Start to upload a complete checkpoint as --hub_strategy says.

        While an earlier upload is on its way, this one is left out, unless --hub_always_push is given.
        """
        strategy = self._args.hub_strategy
        is_busy = any(not job.done() for _, job in self._jobs)
        if strategy == HubStrategy.END or (is_busy and not self._args.hub_always_push):
            return
        self._send(folder, f"{folder.name}: the adapter", allow_patterns=sorted(adapter_files))
        if strategy == HubStrategy.CHECKPOINT:
            # the files of the checkpoint before, whose names may differ, are replaced
            self._send(folder, folder.name, path_in_repo="last-checkpoint", delete_patterns="*")
        elif strategy == HubStrategy.ALL_CHECKPOINTS:
            self._send(folder, folder.name, path_in_repo=folder.name)

    def finish(self, folder: Path, adapter_files: Collection[str]) -> bool:
        """Upload the finished adapter and wait for everything on its way. Returns whether the adapter arrived."""
        self._send(folder, "the adapter", allow_patterns=sorted(adapter_files))
        for what, job in self._jobs:
            if error := job.exception():
                self._notice(f"{what} could not be uploaded to {self.repo}: {error}")
        _, last = self._jobs[-1]
        return last.exception() is None

    def _send(self, folder: Path, what: str, **files: Any) -> None:
        job = self._api.upload_folder(
            repo_id=self.repo,
            folder_path=folder,
            commit_message=f"atomtune: {what}",
            revision=self._args.hub_revision,
            run_as_future=True,
            **files,
        )
        self._jobs.append((what, job))
