"""What a server counts, and the page that Prometheus reads (text format 0.0.4), written without its client library.

It knows numbers and names; who counts what, and when, is the application's and the driver's.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator

from fms_parallel.inference.handle import Completion
from fms_parallel.inference.server.driver import Snapshot

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FIRST_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
WHOLE = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Histogram:
    """Values counted by size.

    Args:
        bounds: upper ones of the buckets, rising; one without a bound follows.
    """

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        """Count one."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self, name: str) -> Iterator[str]:
        """Its part of the page."""
        total = 0
        for bound, count in zip((*self.bounds, "+Inf"), self.counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self.sum}"
        yield f"{name}_count {total}"


class Metrics:
    """Of one server. Written by asyncio's thread only."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.first_token, self.per_token = Histogram(FIRST_TOKEN), Histogram(PER_TOKEN)
        self.whole = Histogram(WHOLE)
        self.prompt_tokens, self.cached_tokens, self.new_tokens = 0, 0, 0

    def answered(self, path: str, status: int) -> None:
        """A request to a path has got this status (499: its client left before)."""
        self.requests[path, status] += 1

    def ended(self, row: Completion) -> None:
        """A row has ended, however it did."""
        self.new_tokens += len(row.tokens)
        self.prompt_tokens += len(row.prompt)
        self.cached_tokens += row.shared
        self.whole.add(row.total_s)
        if row.first_token_s is not None:
            self.first_token.add(row.first_token_s)
            if len(row.tokens) > 1:
                self.per_token.add((row.total_s - row.first_token_s) / (len(row.tokens) - 1))

    def page(self, now: Snapshot, in_flight: int, alive: bool) -> str:
        """All of it, as Prometheus reads it."""
        counts, memory = now.counts, now.memory
        single: tuple[tuple[str, str, str, float], ...] = (
            ("engine_up", "gauge", "1 while the engine lives.", int(alive)),
            ("rows_in_flight", "gauge", "Rows that the engine has been given and that have not ended.", in_flight),
            ("rows_running", "gauge", "Rows that take part in steps.", counts.running),
            ("rows_waiting", "gauge", "Rows that wait for a place or for cache.", counts.waiting),
            ("cache_tokens", "gauge", "Tokens that fit the cache.", memory.tokens),
            ("cache_used_tokens", "gauge", "Tokens of the cache that rows hold.", memory.used),
            ("cache_kept_tokens", "gauge", "Tokens of ended rows, kept for rows that begin alike.", memory.kept),
            ("cache_usage_ratio", "gauge", "Part of the cache that rows hold.", memory.used / max(1, memory.tokens)),
            ("cache_bytes", "gauge", "Allocated on this rank.", memory.cache),
            ("prompt_tokens_total", "counter", "Of rows that ended.", self.prompt_tokens),
            ("prompt_tokens_cached_total", "counter", "Of those, found in the cache.", self.cached_tokens),
            ("generated_tokens_total", "counter", "Of rows that ended.", self.new_tokens),
            ("engine_steps_total", "counter", "Forwards of the model.", counts.steps),
            ("preemptions_total", "counter", "Rows that gave their cache to earlier ones.", counts.preemptions),
            ("drafted_tokens_total", "counter", "Tokens proposed by speculative decoding.", counts.drafted),
            ("accepted_tokens_total", "counter", "Of those, the ones that were right.", counts.accepted),
        )
        lines: list[str] = []
        for name, kind, about, value in single:
            lines += [*_head(name, kind, about), f"fms_{name} {value}"]
        lines += _head("requests_total", "counter", "Answered requests; status 499: the client left before.")
        for (path, status), count in sorted(self.requests.items()):
            lines.append(f'fms_requests_total{{path="{path}",status="{status}"}} {count}')
        lines += _head("rows_ended_total", "counter", "Rows, by how they ended.")
        lines += [f'fms_rows_ended_total{{finish="{name}"}} {count}' for name, count in counts.finished.items()]
        for name, about, histogram in (
            ("time_to_first_token_seconds", "From a row's request to its first token.", self.first_token),
            ("time_per_output_token_seconds", "Mean time between a row's later tokens.", self.per_token),
            ("row_seconds", "From a row's request to its end.", self.whole),
        ):
            lines += [*_head(name, "histogram", about), *histogram.lines(f"fms_{name}")]
        return "\n".join([*lines, ""])


def _head(name: str, kind: str, about: str) -> list[str]:
    return [f"# HELP fms_{name} {about}", f"# TYPE fms_{name} {kind}"]
