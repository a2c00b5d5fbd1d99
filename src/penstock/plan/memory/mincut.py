"""The cheapest way to cut a directed graph in two: Dinic's algorithm on whole numbers.

Source: Dinitz, "Algorithm for solution of a problem of maximum flow in networks with power
estimation", 1970. Capacities are Python's integers, so that equal costs are equal.
"""

from __future__ import annotations

from collections import deque


class Cut:
    """A network of pipes between a source (0) and a sink (1).

    Arguments:
        num_vertices: with source and sink.
    """

    def __init__(self, num_vertices: int) -> None:
        self._to: list[int] = []
        self._left: list[int] = []
        self._out: list[list[int]] = [[] for _ in range(num_vertices)]

    def pipe(self, begin: int, end: int, capacity: int) -> None:
        """Cutting it, with `begin` on the source's side and `end` on the sink's, costs that."""
        for at, to, amount in ((begin, end, capacity), (end, begin, 0)):
            self._out[at].append(len(self._to))
            self._to.append(to)
            self._left.append(amount)

    def source_side(self) -> set[int]:
        """The vertices on the source's side of a cheapest cut; of several, the fewest."""
        while True:
            level = self._levels()
            if 1 not in level:
                return set(level)
            next_pipe = [0] * len(self._out)
            while self._push(level, next_pipe):
                pass

    def _levels(self) -> dict[int, int]:
        """Steps from the source, of what can be reached."""
        level = {0: 0}
        waiting = deque([0])
        while waiting:
            at = waiting.popleft()
            for pipe in self._out[at]:
                if self._left[pipe] and self._to[pipe] not in level:
                    level[self._to[pipe]] = level[at] + 1
                    waiting.append(self._to[pipe])
        return level

    def _push(self, level: dict[int, int], next_pipe: list[int]) -> bool:
        """Sends as much as goes along one more of the shortest paths; False if there is none."""
        path: list[int] = []
        at = 0
        while at != 1:
            pipes = self._out[at]
            while next_pipe[at] < len(pipes):
                pipe = pipes[next_pipe[at]]
                if self._left[pipe] and level.get(self._to[pipe]) == level[at] + 1:
                    path.append(pipe)
                    at = self._to[pipe]
                    break
                next_pipe[at] += 1
            else:
                if not path:
                    return False
                at = self._to[path.pop() ^ 1]
                next_pipe[at] += 1
        amount = min(self._left[pipe] for pipe in path)
        for pipe in path:
            self._left[pipe] -= amount
            self._left[pipe ^ 1] += amount
        return True
