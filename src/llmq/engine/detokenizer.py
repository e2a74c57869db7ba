"""Token ids → text as it streams: never half a character, never a part of a stop text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

INCOMPLETE = "\ufffd"
"""What tokenizers write for bytes that are not a whole character yet."""
CONTEXT_TOKENS = 6
"""How many tokens before the first one are decoded along: some tokenizers drop a leading space without them."""


class Detokenizer:
    """The text of one completion. ``text`` is what is settled so far; ``stopped`` says a stop text was met.

    tokens   … [ context | settled | not settled ]
               prefix     read
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        prompt_ids: Sequence[int],
        stop: Sequence[str],
        *,
        include_stop: bool = False,
    ) -> None:
        """``include_stop``: the stop text is part of the text, which ends behind it."""
        self.text = ""
        self.stopped = False
        self._decode = decode
        self._stop = stop
        self._include_stop = include_stop
        self._ids = list(prompt_ids[-CONTEXT_TOKENS:])
        self._prefix = 0
        self._read = len(self._ids)
        self._held = ""
        self._too_soon = 0
        """Of the held text, what came before a stop text counted: where it may begin, but not end."""

    def push(self, token_ids: Sequence[int], *, last: bool = False, may_stop: bool = True) -> str:
        """Take in ``token_ids`` and return the text that they settle. ``last``: settle everything. ``may_stop``: no
        stop text counts that is complete before it may."""
        if self.stopped:
            return ""
        self._ids.extend(token_ids)
        before = self._decode(self._ids[self._prefix : self._read])
        after = self._decode(self._ids[self._prefix :])
        complete = last or not after.endswith(INCOMPLETE)
        if complete and before and after == before:
            del self._ids[self._read :]  # a special token: with no word before it, the next one would lose its space
        elif complete:
            self._held += after[len(before) :]
            self._prefix, self._read = self._read, len(self._ids)
        if not may_stop:
            self._too_soon = len(self._held)
        settled = self._settle(last, may_stop)
        self.text += settled
        return settled

    def _settle(self, last: bool, may_stop: bool) -> str:
        """What of the held text can go out: all but the beginning of a possible stop text."""
        held, stops = self._held, self._stop
        found = [(held.find(stop, max(0, self._too_soon - len(stop) + 1)), len(stop)) for stop in stops if may_stop]
        cuts = [(cut, size) for cut, size in found if cut >= 0]
        if cuts:
            self.stopped = True
            start, size = min(cuts)
            keep = start + size if self._include_stop else start
        elif last:
            keep = len(held)
        else:
            keep = len(held) - max((_overlap(held, stop) for stop in stops), default=0)
        settled, self._held = held[:keep], held[keep:]
        self._too_soon = max(0, self._too_soon - keep)
        return settled


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` that ``stop`` begins with."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
