"""An answer that ends before one of some texts, and has no blanks at its ends; it may come in pieces (pure)."""

from collections.abc import Callable, Sequence


class StopTexts:
    """Takes an answer piece by piece and hands on what stands before the first of the texts `stops`.

    on_text: called with what may be shown. stripped: whether blanks at both ends are left out. text: all that was
    shown. found: whether one of the texts was found.
    """

    def __init__(self, stops: Sequence[str], on_text: Callable[[str], None], *, stripped: bool = False) -> None:
        self._stops, self._on_text, self._stripped = [stop for stop in stops if stop], on_text, stripped
        self._held = ""
        self.text, self.found = "", False

    def take(self, piece: str) -> None:
        """Take the next piece of the answer."""
        if self.found:
            return
        self._held += piece
        ends = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        self.found = bool(ends)
        self._show(min(ends) if ends else len(self._held) - self._begun(), last=self.found)
        if self.found:
            self._held = ""

    def end(self) -> None:
        """Hand on what was held back: the answer has ended, and it is no stop text."""
        self._show(len(self._held), last=True)

    def _begun(self) -> int:
        """Return how many characters at the end may be the beginning of a stop text."""
        longest = max(map(len, self._stops), default=1) - 1
        tails = range(min(longest, len(self._held)), 0, -1)
        return next((n for n in tails if any(stop.startswith(self._held[-n:]) for stop in self._stops)), 0)

    def _show(self, count: int, *, last: bool) -> None:
        shown, rest = self._held[:count], self._held[count:]
        if self._stripped:
            shown = shown if self.text else shown.lstrip()
            kept = shown.rstrip()
            shown, rest = kept, rest if last else shown[len(kept) :] + rest
        self._held = rest
        if shown:
            self.text += shown
            self._on_text(shown)
