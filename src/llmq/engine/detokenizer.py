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

    def push(self, token_ids: Sequence[int], *, last: bool = False, may_stop: bool = True) -> str:
        """Take in ``token_ids`` and return the text that they settle. ``last``: settle everything. ``may_stop``: no
        stop text counts that is complete before it may."""
        if self.stopped:
            return ""
        self._ids.extend(token_ids)
        before = self._decode(self._ids[self._prefix : self._read])
        after = self._decode(self._ids[self._prefix :])
        if last or not after.endswith(INCOMPLETE):
            self._held += after[len(before) :]
            self._prefix, self._read = self._read, len(self._ids)
        settled = self._settle(last, self._stop if may_stop else ())
        self.text += settled
        return settled

    def _settle(self, last: bool, stops: Sequence[str]) -> str:
        """What of the held text can go out: all but the beginning of a possible stop text."""
        cuts = [(cut, len(stop)) for stop in stops if (cut := self._held.find(stop)) >= 0]
        if cuts:
            self.stopped = True
            start, size = min(cuts)
            keep = start + size if self._include_stop else start
        elif last:
            keep = len(self._held)
        else:
            keep = len(self._held) - max((_overlap(self._held, stop) for stop in stops), default=0)
        settled, self._held = self._held[:keep], self._held[keep:]
        return settled


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` that ``stop`` begins with."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
