"""kyutai/DailyTalkContiguous: spoken dialogues with word times, in moshi-finetune's format."""

from __future__ import annotations

import sys
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from moshi_ttt.errors import UserError

REPO = "kyutai/DailyTalkContiguous"
FOLDER = Path("data/daily-talk-contiguous")


def prepare() -> None:
    """Fetch it into `data/daily-talk-contiguous` unless it is there; its size is said first.

    Raises:
        UserError: the hub cannot be reached.
    """
    done = FOLDER / ".complete"
    if done.exists():
        return
    try:
        info = HfApi().dataset_info(REPO, files_metadata=True)
        size = sum(entry.size or 0 for entry in info.siblings or [])
        sys.stdout.write(f"     fetching {REPO}: {size:,} bytes ({size / 2**30:.1f} GiB)\n")
        sys.stdout.flush()
        snapshot_download(REPO, repo_type="dataset", local_dir=FOLDER, revision=info.sha)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"data.corpus {REPO}: the Hugging Face hub cannot be reached ({reason}); fetch it "
            f"elsewhere into {FOLDER}, or name your own data.train_data"
        ) from error
    done.touch()
