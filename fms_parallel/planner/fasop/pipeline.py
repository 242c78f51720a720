"""Non-interleaved 1F1B with FASOP's blocking sends. It knows stages and seconds; it knows no model.

Of a stage's work a third is forward. A send occupies its sender in the warm-up only; in the steady state a stage and
its neighbour exchange, so that a forward also waits for its own backward's send, and a backward for its transfer.
"""

from __future__ import annotations

from collections.abc import Sequence


def stage_ends(work: Sequence[float], send_on: Sequence[float], send_back: Sequence[float], micros: int) -> list[float]:
    """Seconds at which each stage ends its last backward.

    `work`: seconds of one micro-batch per stage; `send_on`, `send_back`: of handing it on and back.
    """
    stages = len(work)
    forward, backward = [w / 3 for w in work], [w * 2 / 3 for w in work]
    warm = [min(stages - i - 1, micros) for i in range(stages)]
    end_f = [[-1.0] * micros for _ in range(stages)]
    end_b = [[-1.0] * micros for _ in range(stages)]
    free, own = [0.0] * stages, [0.0] * stages
    orders = [_order(warm[i], micros) for i in range(stages)]
    position = [0] * stages
    for _ in range(2 * micros * stages):
        for i in range(stages):
            while position[i] < len(orders[i]):
                is_forward, m = orders[i][position[i]]
                start = (
                    _forward_start(i, m, warm[i], free[i], own[i], end_f, send_on, send_back[i])
                    if is_forward
                    else _backward_start(i, m, stages, free[i], own[i], end_b, send_back)
                )
                if start is None:
                    break
                free[i] = start + (forward[i] if is_forward else backward[i])
                (end_f if is_forward else end_b)[i][m] = free[i]
                own[i] = (send_on[i] if m < warm[i] else 0.0) if is_forward else send_back[i]
                position[i] += 1
        if all(position[i] == len(orders[i]) for i in range(stages)):
            break
    return free


def _order(warm: int, micros: int) -> list[tuple[bool, int]]:
    order = [(True, m) for m in range(warm)]
    for m in range(micros - warm):
        order += [(True, warm + m), (False, m)]
    return order + [(False, m) for m in range(micros - warm, micros)]


def _forward_start(
    i: int, m: int, warm: int, free: float, own: float, ends: list[list[float]], send_on: Sequence[float], back: float
) -> float | None:
    if i == 0:
        return free + own
    before = ends[i - 1][m]
    if before < 0:
        return None
    start = max(free + own, before + send_on[i - 1])
    return max(start, max(free, before) + back) if m > warm else start


def _backward_start(
    i: int, m: int, stages: int, free: float, own: float, ends: list[list[float]], send_back: Sequence[float]
) -> float | None:
    if i == stages - 1:
        return free + own
    after = ends[i + 1][m]
    return None if after < 0 else max(free + own, max(free, after) + send_back[i + 1])
