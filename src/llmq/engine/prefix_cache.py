"""PrefixCache: full blocks by their content, so that requests that begin alike share what was computed once.

The keys and values of a block depend on its own tokens and on every token before it: an entry is found by the entry
before it and its tokens.

    ""  ── tokens 0 … 15 ──▶  entry 1  ── tokens 16 … 31 ──▶  entry 2
                              blocks (7,)                      blocks (4,)

A dictionary does both halves of what a hashed cache has to do: it finds the entry by a hash that chains over the whole
prefix, and it compares the tokens themselves, so that two prompts with one hash never share. An entry's number is never
used again: what follows an entry that is gone can no longer be found, however much it looks like it.
"""

from __future__ import annotations

from dataclasses import dataclass

Key = tuple[int, bytes]
"""The number of the entry before, and the block's tokens as an array's bytes."""
ROOT = 0


@dataclass(slots=True, eq=False)
class Entry:
    """The blocks that hold one content, one for each layer group; 0 where a group has none."""

    number: int
    key: Key
    blocks: list[int]

    @property
    def alive(self) -> bool:
        return any(self.blocks)


class PrefixCache:
    """Which blocks hold what, and where to look for them. Who owns them is the BlockManager's business."""

    def __init__(self, num_groups: int) -> None:
        self._num_groups = num_groups
        self._entries: dict[Key, Entry] = {}
        self._homes: dict[int, tuple[Entry, int]] = {}
        self._next_number = ROOT + 1

    def __contains__(self, block: int) -> bool:
        return block in self._homes

    def __len__(self) -> int:
        """Blocks, not entries."""
        return len(self._homes)

    def find(self, parent: Entry | None, tokens: bytes) -> Entry | None:
        return self._entries.get((ROOT if parent is None else parent.number, tokens))

    def enter(self, parent: Entry | None, tokens: bytes) -> Entry:
        """The entry of ``tokens`` behind ``parent``; a new one can be found once it is given a block."""
        entry = self.find(parent, tokens)
        if entry is None:
            entry = Entry(
                self._next_number, (ROOT if parent is None else parent.number, tokens), [0] * self._num_groups
            )
            self._next_number += 1
        return entry

    def put(self, entry: Entry, group: int, block: int) -> None:
        """Let ``block`` be the one that holds ``entry`` for ``group``."""
        self.forget(block)
        self.forget(entry.blocks[group])
        entry.blocks[group] = block
        self._homes[block] = (entry, group)
        self._entries[entry.key] = entry

    def forget(self, block: int) -> None:
        """``block`` is about to hold something else. An entry without blocks is gone for good."""
        home = self._homes.pop(block, None)
        if home is None:
            return
        entry, group = home
        entry.blocks[group] = 0
        if not entry.alive:
            del self._entries[entry.key]
