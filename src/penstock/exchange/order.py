"""In which order buckets of gradients are sent, where the next forward need not wait for all."""

from __future__ import annotations

from collections.abc import Sequence


def sending_order(ready_s: Sequence[float], takes_s: Sequence[float | None]) -> list[int]:
    """Whenever the line is free, the bucket goes that is ready and needed first: of the first
    layers. (List scheduling by priority; so did P3, Jayarajan et al. 2019, and ByteScheduler, Peng
    et al. 2019, at run time; here all ranks must send alike, and the order is fixed beforehand.)

    Arguments:
        ready_s: when backward has filled each bucket, on the last rank; the buckets are counted in
            the order in which it fills them, and needed in the opposite one.
        takes_s: how long each is under way; None for longer than backward.
    """
    waiting, order, now_s = list(range(len(ready_s))), [], 0.0
    while waiting:
        now_s = max(now_s, min(ready_s[bucket] for bucket in waiting))
        bucket = max(bucket for bucket in waiting if ready_s[bucket] <= now_s)
        takes = takes_s[bucket]
        now_s += max(ready_s) if takes is None else takes
        waiting.remove(bucket)
        order.append(bucket)
    return order
