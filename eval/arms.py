"""The arms of a comparison: which model, and how its memory is run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moshi.models.lm import LMModel

from eval.keep import Keep
from eval.modes import writing_off
from eval.perplexity import FRAMES_PER_CALL, Progress
from eval.scores import Item, Scores, evaluate
from moshi_ttt.base import CONFIG_FILE, Base, file_hash, fingerprint, load_base, read_json
from moshi_ttt.checkpoint import TTT_CONFIG_FILE, Described, describe, load
from moshi_ttt.config import TTTConfig
from moshi_ttt.errors import UserError

WIDER = 4
"""How many times wider the attention window of the oracle is: that of the scalar."""
MODES = ("kept", "reset", "shuffled", "off")
"""What may happen to a memory while its model listens."""


@dataclass(frozen=True)
class Arm:
    """A model and how it is run.

    Attributes:
        name: unique in a comparison.
        label: for tables and legends.
        letter: of the protocol, a to h; empty for a further checkpoint.
        checkpoint: None is the stock base.
        mode: of `MODES`.
        wider: factor on the base's attention window.
    """

    name: str
    label: str
    letter: str = ""
    checkpoint: Path | None = None
    mode: str = "kept"
    wider: int = 1

    def __post_init__(self) -> None:
        """Refuse an unknown mode."""
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, got {self.mode!r}")


BASE = Arm("base", "stock base", "a")
WIDE = Arm("wide", f"stock base, window x{WIDER} (oracle)", "g", wider=WIDER)
KEPT = Arm("kept", "memory kept", "c")
RESET = Arm("reset", "memory reset every window", "e", mode="reset")
SHUFFLED = Arm("shuffled", "memory of another recording", "f", mode="shuffled")
OFF = Arm("off", "writing switched off (proves nothing)", "h", mode="off")
TRAINED = Arm("trained", "trained model (no memory)")
UNWRITTEN = Arm("trained", "trained with writing off", "d")


def arms_of(checkpoint: Path | None, ttt: TTTConfig | None) -> list[Arm]:
    """The arms that one trained model gives: all modes of a memory that is written, else itself."""
    arms = [KEPT, RESET, SHUFFLED, OFF]
    if ttt is None or not ttt.writing:
        arms = [TRAINED if ttt is None else UNWRITTEN]
    return [replace(arm, checkpoint=checkpoint) for arm in arms]


def checkpoint_name(checkpoint: Path) -> str:
    """What a person calls a checkpoint: `run-250`, or its folder's name."""
    folder = checkpoint.expanduser().resolve()
    folder = folder.parent if folder.name == "consolidated" else folder
    if folder.parent.name == "checkpoints":
        step = folder.name.removeprefix("checkpoint_").lstrip("0") or "0"
        return f"{folder.parent.parent.name}-{step}"
    return folder.name


def baselines(given: Sequence[str], main: Described) -> list[Arm]:
    """Further checkpoints as arms: (b) one without memory, (d) one trained with writing off.

    Args:
        given: folders, several in one separated by commas.
        main: the checkpoint they are compared with.

    Raises:
        UserError: not a checkpoint, of another base, or two of one name.
    """
    paths = [Path(part.strip()) for text in given for part in text.split(",") if part.strip()]
    arms = [_baseline(path, main) for path in paths]
    taken = {arm.name for arm in (BASE, WIDE, KEPT, RESET, SHUFFLED, OFF, TRAINED)}
    names = [arm.name for arm in arms]
    if len({*names} - taken) < len(names):
        raise UserError(f"--baseline: {', '.join(map(str, paths))}: names must differ")
    return arms


def _baseline(path: Path, main: Described) -> Arm:
    about = read_json(_about_file(path))
    theirs = about.get("base", {})
    stock = theirs.get("stock" if about.get("full") else "fingerprint")
    if stock is None:
        raise UserError(f"--baseline {path} does not say of which base it is: write it again")
    if stock != fingerprint(main.base.info.moshi_weights):
        raise UserError(
            f"--baseline {path} belongs to another base ({theirs.get('name')}) than the "
            f"checkpoint ({main.base.name}): their numbers cannot be compared"
        )
    found, name = describe(path, base=main.base), checkpoint_name(path)
    if found.ttt is None:
        return Arm(name, f"{name}: no memory", "b", path)
    if not found.ttt.writing:
        return Arm(name, f"{name}: trained with writing off", "d", path)
    return Arm(name, name, "", path)


def _about_file(path: Path) -> Path:
    folder = path.expanduser()
    for file in (folder / "consolidated" / TTT_CONFIG_FILE, folder / TTT_CONFIG_FILE):
        if file.is_file():
            return file
    raise UserError(f"--baseline {path} is not a checkpoint: it has no {TTT_CONFIG_FILE}")


def weights_hash(checkpoint: Path | None, base: Base) -> str:
    """SHA-256 over what a checkpoint's files hold, or the base's fingerprint."""
    if checkpoint is None:
        return fingerprint(base.info.moshi_weights)
    found = describe(checkpoint, base=base)
    hashes = [f"{f.name} {file_hash(f)}" for f in sorted(found.folder.glob("*.safetensors"))]
    facts = [hashes, found.about["ttt"], read_json(found.folder / CONFIG_FILE).get("lora_scaling")]
    return hashlib.sha256(f"{facts} {fingerprint(found.weights)}".encode()).hexdigest()


def open_arms(arms: Sequence[Arm], base: Base, **where: Any) -> Iterator[tuple[Arm, LMModel]]:
    """Each arm with its model; arms of one model follow each other, and one is held at a time.

    A model is emptied when the next is asked for, whoever still holds it: the caller's loop
    variable does, and a spliced model is part of a reference cycle.

    Args:
        arms: in any order.
        base: of all of them.
        where: `device` and `dtype`.

    Raises:
        UserError: a checkpoint that cannot be loaded.
    """
    groups: dict[tuple[Path | None, int], list[Arm]] = {}
    for arm in arms:
        groups.setdefault((arm.checkpoint, arm.wider), []).append(arm)
    for (checkpoint, wider), group in groups.items():
        if checkpoint is None:
            lm = load_base(base, wider=wider, **where)
        else:
            lm = load(checkpoint, base=base, **where).lm
        for arm in group:
            yield arm, lm
        lm.to("meta")


def score_arm(
    lm: LMModel,
    arm: Arm,
    items: Sequence[Item],
    window: int,
    *,
    rows: int = 1,
    frames_per_call: int = FRAMES_PER_CALL,
    keep: Keep | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Score a panel as an arm says; nothing of `lm` changes.

    `reset`: memories go back to W0 at every multiple of `window`. `shuffled`: there they become
    what they are, at the same place, in a recording of another speaker; so what is older than the
    window comes from elsewhere, and attention sees the recording itself. It is scored as far as
    that other recording lends a history.
    """
    how: dict[str, Any] = {"rows": rows, "frames_per_call": frames_per_call, "keep": keep}
    if arm.mode in ("kept", "off"):
        with writing_off(lm) if arm.mode == "off" else nullcontext():
            return evaluate(lm, items, progress=progress, **how)
    if arm.mode == "reset":
        return evaluate(lm, items, reset_every=window, progress=progress, **how)
    others = lenders(items)
    cut = [_as_far(item, other, window) for item, other in zip(items, others, strict=True)]
    scores = evaluate(lm, cut, reset_every=window, history=others, progress=progress, **how)
    if [item.frames for item in cut] != [item.frames for item in items]:
        scores.missing = "no other recording is long enough to lend a history"
    return scores


def lenders(items: Sequence[Item]) -> list[Item]:
    """For each item one of another speaker: the next longer one, else the longest there is.

    Which one does not depend on the order of the items. An item with no other speaker beside it
    gets itself.
    """
    by_length = sorted(items, key=lambda item: (item.frames, hashed(item.name)))
    out: list[Item] = []
    for item in items:
        place = next(i for i, other in enumerate(by_length) if other is item)
        ring = [*by_length[place + 1 :], *by_length[:place][::-1]]
        same_length = [o for o in by_length[:place] if o.frames == item.frames]
        ring = [*by_length[place + 1 :], *same_length, *ring]
        out.append(next((o for o in ring if o.speaker != item.speaker), item))
    return out


def hashed(name: str) -> str:
    """A name's SHA-256: an order that nobody chose."""
    return hashlib.sha256(name.encode()).hexdigest()


def _as_far(item: Item, lender: Item, window: int) -> Item:
    """The part of an item for which a lender has a history; the first window needs none."""
    frames = window if lender is item else (lender.frames // window + 1) * window
    if frames >= item.frames:
        return item
    return replace(item, codes=item.codes[:, :frames])
