"""What can be wrong with a data set, how bad it is, and what to do about it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

ERROR, NOTE = "error", "note"


class Kind(NamedTuple):
    """A kind of finding.

    Attributes:
        severity: `error` stops or harms training; `note` is to be known.
        advice: what to do about it.
    """

    severity: str
    advice: str


class Finding(NamedTuple):
    """Something found.

    Attributes:
        kind: a key of `KINDS`.
        manifest: where its recording stands.
        line: of the manifest; 0 is the manifest itself.
        file: the audio as the manifest has it; empty where there is none.
        detail: what exactly.
    """

    kind: str
    manifest: Path
    line: int
    file: str
    detail: str


KINDS: dict[str, Kind] = {
    "broken line": Kind(ERROR, 'one JSON object a line: {"path": "a.wav", "duration": 12.3}'),
    "no recordings": Kind(ERROR, "the manifest is empty: write its lines, or leave it out"),
    "file missing": Kind(ERROR, "mend the path (it starts at the manifest's folder), or the line"),
    "file broken": Kind(ERROR, "export or fetch the file again, or delete the line"),
    "too many channels": Kind(ERROR, "mix to mono or stereo (left Moshi, right user)"),
    "channels differ": Kind(ERROR, "the files of one recording must be all mono or all stereo"),
    "duration": Kind(ERROR, "write the duration that is named here into the manifest"),
    "not finite": Kind(ERROR, "the program that wrote the file divided by zero: export it again"),
    "scale": Kind(ERROR, "integers were saved as floats: divide the samples by 32768"),
    "silent": Kind(ERROR, "Moshi would learn to say nothing: check the export, or delete the line"),
    "identical channels": Kind(ERROR, "one signal saved as stereo: save it as mono"),
    "swapped channels": Kind(ERROR, "Moshi is left: exchange the channels (sox a.wav b.wav swap)"),
    "badly clipped": Kind(ERROR, "recorded or mixed too loud: export it with a lower gain"),
    "transcript broken": Kind(ERROR, "mend or delete the json beside the audio, or annotate again"),
    "word times": Kind(ERROR, "0 <= start <= end is wanted: mend them, or annotate again"),
    "words out of order": Kind(ERROR, "sort the words of each speaker by start"),
    "words past the end": Kind(ERROR, "the transcript of another recording? annotate again"),
    "transcript empty": Kind(ERROR, "it would teach Moshi to be without text: delete or annotate"),
    "no SPEAKER_MAIN": Kind(ERROR, "label the words of the left channel (or of mono) SPEAKER_MAIN"),
    "some transcripts": Kind(ERROR, "give all files of the recording a transcript, or none"),
    "words do not fit": Kind(ERROR, "another recording's transcript, or shifted: annotate again"),
    "in two manifests": Kind(ERROR, "what is evaluated must not be trained on: keep it in one"),
    "codes missing": Kind(ERROR, "encode again, or mend the path of the shard"),
    "twice": Kind(NOTE, "it counts twice in training: delete one line unless you want that"),
    "only listens": Kind(NOTE, "in a short recording Moshi may be silent; else check the export"),
    "user silent": Kind(NOTE, "right for a reading; for a dialogue check the export"),
    "clipped": Kind(NOTE, "a lower gain when it is recorded or mixed would be better"),
    "quiet": Kind(NOTE, "raise its gain: Mimi knows speech at usual levels"),
    "DC offset": Kind(NOTE, "remove it with a high-pass filter (sox a.wav b.wav highpass 20)"),
    "low sample rate": Kind(NOTE, "it is resampled; above half its rate there is nothing to learn"),
    "short": Kind(NOTE, "it becomes one short segment, the rest of which is not used"),
    "no transcript": Kind(NOTE, "its text is no target; python -m finetune.annotate makes one"),
    "words without duration": Kind(NOTE, "they are left out of the text"),
    "unknown to the tokenizer": Kind(NOTE, "they become the unknown token: write them otherwise"),
    "encoded already": Kind(NOTE, "stored codes: only the manifest and its shards are checked"),
}
