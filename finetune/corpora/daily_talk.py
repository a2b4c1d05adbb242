"""kyutai/DailyTalkContiguous: spoken dialogues with word times, in moshi-finetune's format."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from moshi_ttt.errors import UserError, no_space_left

REPO = "kyutai/DailyTalkContiguous"
FOLDER = Path("data/daily-talk-contiguous")


def prepare() -> None:
    """Fetch it into `data/daily-talk-contiguous` unless it is there; its size is said first.

    Raises:
        UserError: the hub cannot be reached, or the disk has too little space for it.
    """
    done = FOLDER / ".complete"
    if done.exists():
        return
    try:
        info = HfApi().dataset_info(REPO, files_metadata=True)
        size = sum(entry.size or 0 for entry in info.siblings or [])
        _check_space(size)
        sys.stdout.write(f"     fetching {REPO}: {size:,} bytes ({size / 2**30:.1f} GiB)\n")
        sys.stdout.flush()
        snapshot_download(REPO, repo_type="dataset", local_dir=FOLDER, revision=info.sha)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        if no_space_left(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"data.corpus {REPO}: the Hugging Face hub cannot be reached ({reason}); fetch it "
            f"elsewhere into {FOLDER} and make an empty file {done}, or name your own "
            "data.train_data and leave data.corpus null"
        ) from error
    done.touch()


def _check_space(size: int) -> None:
    """Only what is not there yet is fetched: a download that was broken off goes on."""
    there = sum(f.stat().st_size for f in FOLDER.rglob("*") if f.is_file())
    free = shutil.disk_usage(Path.cwd()).free
    if size - there > free:
        raise UserError(
            f"data.corpus {REPO} has {size:,} bytes, of which {size - there:,} are to be fetched "
            f"into {FOLDER}; the disk has {free:,} left"
        )
