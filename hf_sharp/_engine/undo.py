"""What is out of its place during a step, and how to put it back: one list, worked off by whoever catches first.

`with` alone is not enough. Ctrl-C can arrive between any two lines of Python, also inside the code that leaves a
`with` block, and what stands in that block's `finally` is then skipped. So every region that moves something enters
here how to undo it, and the outermost handler of a step undoes what is still entered.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager


class Undo:
    """The open regions of a step, the innermost last. An action is idempotent: it may be cut off and run again."""

    def __init__(self) -> None:
        self._actions: list[tuple[Callable[[], object]]] = []  # each in a tuple of its own, by which it is known again

    @contextmanager
    def region(self, action: Callable[[], object]) -> Generator[None]:
        """While open, something is out of its place.

        Args:
            action: puts it back; run at the end, or by `everything`, whichever comes first, and by one of them alone.

        Yields:
            Nothing.
        """
        entry = (action,)
        self._actions.append(entry)
        try:
            yield
        finally:
            # An abandoned generator is closed by the garbage collector, perhaps steps later: by then it has no say.
            if any([entry is other for other in self._actions]):
                self._put_back_down_to(entry)

    def _put_back_down_to(self, entry: tuple[Callable[[], object]]) -> None:
        """Put back what was moved inside a region, if an interrupt has kept it from being so, and then the region."""
        while self._actions:
            last = self._actions[-1]
            last[0]()
            self._actions.pop()
            if last is entry:
                return

    def everything(self) -> None:
        """Put back all that is out of its place, the innermost first."""
        while self._actions:
            self._actions[-1][0]()
            self._actions.pop()
