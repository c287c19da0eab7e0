"""Stop strings: where an answer ends by its text."""

from __future__ import annotations


class StopMatcher:
    """Lets text through up to the first stop string, and holds back what may be the beginning of one.

    The first stop string to be complete ends the text; of two complete at the same character, the longer. What comes
    out does not depend on how the text was cut into pieces.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.hit = False

    def push(self, text: str) -> tuple[str, bool]:
        """(text that is certainly no part of a stop string, whether a stop string was found). Nothing after a hit."""
        if self.hit:
            return "", True
        text = self._held + text
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            _, start = min(found)
            self._held, self.hit = "", True
            return text[:start], True
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """At the end of the text: what was held back, since no stop string came of it."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The longest end of `text` that is a proper beginning of `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
