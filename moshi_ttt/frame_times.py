"""How long frames take, against how long they sound."""

from __future__ import annotations

import numpy as np

FRAME_MS = 80.0


class FrameTimes:
    """Milliseconds of each frame; the last 65536 (87 minutes) are kept for the percentiles."""

    def __init__(self) -> None:
        self._ms = np.zeros(1 << 16)
        self.count, self.total_ms, self.late = 0, 0.0, 0

    def add(self, ms: float) -> None:
        """Count one frame; it is late if it took longer than it sounds."""
        self._ms[self.count % len(self._ms)] = ms
        self.count += 1
        self.total_ms += ms
        self.late += ms > FRAME_MS

    def percentiles(self) -> tuple[float, float, float]:
        """p50, p95 and p99 in ms; NaN before the first frame."""
        kept = self._ms[: self.count] if self.count else np.array([np.nan])
        p50, p95, p99 = np.percentile(kept, (50, 95, 99))
        return float(p50), float(p95), float(p99)

    def recent(self, frames: int = 25) -> float:
        """Mean ms of the last frames (25 are 2 s); NaN before the first."""
        if not self.count:
            return float("nan")
        last = np.arange(max(0, self.count - frames), self.count) % len(self._ms)
        return float(self._ms[last].mean())

    @property
    def real_time_factor(self) -> float:
        """Time taken per time of sound; below 1 keeps up. NaN before the first frame."""
        return self.total_ms / (self.count * FRAME_MS) if self.count else float("nan")
