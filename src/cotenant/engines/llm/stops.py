"""Stop strings, wherever tokens end: text is held back while it may be the beginning of one."""

from __future__ import annotations

from collections.abc import Sequence


class Stops:
    """The text of one answer. A stop string ends it and is not part of it, nor what follows."""

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._longest = max(map(len, self._stops), default=1)
        self._held = ""
        self.stopped = False
        """Whether a stop string was found."""

    def feed(self, text: str) -> str:
        """More text; what of it and of what was held back is certain to be part of the answer."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [(text.find(stop) + len(stop), text.find(stop)) for stop in self._stops]
        ends = [(end, start) for end, start in found if start >= 0]
        if ends:  # the first that is complete: so it makes no difference how the text is cut
            self.stopped, self._held = True, ""
            return text[: min(ends)[1]]
        keep = self._may_begin(text)
        self._held = text[keep:]
        return text[:keep]

    def finish(self) -> str:
        """There is no more: what was held back is part of the answer."""
        rest, self._held = self._held, ""
        return rest

    def _may_begin(self, text: str) -> int:
        """Where a stop string may have begun; the end of the text if nowhere."""
        for at in range(max(0, len(text) - self._longest + 1), len(text)):
            if any(stop.startswith(text[at:]) for stop in self._stops):
                return at
        return len(text)
