"""Batches wait for the names of their containers, a short while and in order.

In: batches from ``enrich``, in the order of the ring, each with whatever the caller wants back with it. Out: the same
batches in the same order, as soon as every container in the first one has a name, or has waited long enough. A
container's first bind may be read before anybody has said what the container is called; the order of events is worth
more than a few of them earlier, so what is behind waits too.

A container that nobody knew in time is not waited for again: one without a name must not make every batch late.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Generic, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

Token = TypeVar("Token")

GIVEN_UP_MAX = 10_000
"""How many containers without a name are remembered; one that is forgotten is waited for once more."""


class _Waiting(NamedTuple, Generic[Token]):
    batch: pa.RecordBatch
    token: Token
    unnamed: set[str]
    until: float


class DelayLine(Generic[Token]):
    """Holds batches until their containers are known; ``known`` says of an id whether it has a name by now.

    ``wait_secs`` is how long the first batch waits at most, from ``put`` on. Times are monotonic seconds, passed in.
    """

    def __init__(self, known: Callable[[str], bool], wait_secs: float) -> None:
        self._known, self._wait_secs = known, wait_secs
        self._line: deque[_Waiting[Token]] = deque()
        self._given_up: OrderedDict[str, None] = OrderedDict()

    def __len__(self) -> int:
        """How many batches wait."""
        return len(self._line)

    def put(self, batch: pa.RecordBatch, token: Token, monotonic: float) -> None:
        """Behind all others; ``batch`` has the column ``container_id``."""
        ids = set(pc.unique(batch.column("container_id")).to_pylist()) - {None}
        self._line.append(_Waiting(batch, token, ids, monotonic + self._wait_secs))

    def ready(self, monotonic: float, *, pressed: bool = False) -> Iterator[tuple[pa.RecordBatch, Token]]:
        """What need not wait any longer, oldest first; everything when ``pressed`` for room."""
        while self._line:
            head = self._line[0]
            unnamed = {name for name in head.unnamed if name not in self._given_up and not self._known(name)}
            late = monotonic >= head.until
            if unnamed and not late and not pressed:
                return
            if late:
                self._give_up(unnamed)
            self._line.popleft()
            yield head.batch, head.token

    def _give_up(self, unnamed: set[str]) -> None:
        self._given_up |= dict.fromkeys(unnamed)
        while len(self._given_up) > GIVEN_UP_MAX:
            self._given_up.popitem(last=False)
