"""BlockManager: which blocks of the KV cache belong to which sequences.

    pool   | 0 | 1 | 2 | 3 | … | num_blocks − 1 |
             │   └── owned by one table or several; or free; or free, and still known to the prefix cache
             └── reserved: where padding reads and writes, and what a table names where a window has passed

A sequence has one table for each group of layers, all of one length; a block holds the keys and values of block_size
tokens in the layers of one group. The rules:

    fork        both tables name the same blocks; nothing is allocated
    write       only into a block that one table names: a partly filled block with k owners is copied k − 1 times, and
                the last one to write keeps it
    prefix      full blocks only; they are shared, never written. A prompt that is found whole computes its last block
                anew, into a block of its own: there must be a token whose logits to draw from
    free        least recently used goes first: blocks nobody knows, then those that the prefix cache still knows,
                of one sequence the deepest first
    window      a block that no later query can see is given back; the table names block 0 in its place
    swap        block by block to a pool in main memory and back; what is shared stays shared
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

from llmq.engine.prefix_cache import Entry, PrefixCache
from llmq.engine.request import Request
from llmq.engine.request import Sequence as Tokens
from llmq.memory import RESERVED_BLOCKS, blocks_for

Moves = list[tuple[int, int]]
"""(from, to) pairs of blocks."""


@dataclass(slots=True)
class PrefixStats:
    """Tokens that were looked up in the prefix cache, and found there."""

    queries: int = 0
    hits: int = 0


class BlockManager:
    """The pool, its blocks in main memory, and the tables of the sequences that it is asked about."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        windows: Sequence[int | None] = (None,),
        cpu_blocks: int = 0,
        prefix_caching: bool = True,
    ) -> None:
        """``windows``: of each group of layers, the tokens that a query sees, itself included; None: all."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.windows = tuple(windows)
        self.cpu_blocks = cpu_blocks
        self.prefix_caching = prefix_caching
        self.prefix_stats = PrefixStats()
        self._has_windows = any(window is not None for window in self.windows)
        self._refs = [0] * num_blocks
        self._free = list(range(num_blocks - 1, RESERVED_BLOCKS - 1, -1))
        self._evictable: OrderedDict[int, None] = OrderedDict()
        self._cache = PrefixCache(len(self.windows))
        self._cpu_refs = [0] * cpu_blocks
        self._cpu_free = list(range(cpu_blocks - 1, -1, -1))

    # Counts

    @property
    def total(self) -> int:
        """Blocks that sequences can own."""
        return self.num_blocks - RESERVED_BLOCKS

    @property
    def available(self) -> int:
        """Free blocks, those that the prefix cache still knows among them."""
        return len(self._free) + len(self._evictable)

    @property
    def used(self) -> int:
        return self.total - self.available

    @property
    def cached(self) -> int:
        """Blocks that the prefix cache knows, in use or free."""
        return len(self._cache)

    @property
    def cpu_used(self) -> int:
        return self.cpu_blocks - len(self._cpu_free)

    def worst_case(self, prompt_tokens: int, max_total: int, width: int) -> int:
        """Blocks that a request of ``width`` sequences can come to need at once.

        They share the full blocks of the prompt, also when they start over after a preemption; behind a window there
        may be nothing left to share then.
        """
        shared = 0 if self._has_windows or width == 1 else prompt_tokens // self.block_size
        own = blocks_for(max_total, self.block_size) - shared
        return len(self.windows) * (shared + width * own)

    def longest(self, prompt_tokens: int, width: int) -> int:
        """Tokens that each of ``width`` sequences may come to, prompt included, so that the pool can hold them all."""
        shared = 0 if self._has_windows or width == 1 else prompt_tokens // self.block_size
        blocks = self.total // len(self.windows)
        return max(0, shared + (blocks - shared) // width) * self.block_size

    # A sequence's way in

    def admission_cost(self, request: Request) -> int:
        """Free blocks that letting ``request`` in takes: all that its tokens need, less what is shared already."""
        first, *others = request.live
        groups = len(self.windows)
        need = groups * blocks_for(first.total, self.block_size)
        if others:
            shared = 0 if self._has_windows else len(request.prompt_ids) // self.block_size
            need += groups * sum(blocks_for(other.total, self.block_size) - shared for other in others)
        if need <= self.available:
            return need
        # Only under pressure is it worth knowing how much of it is there already.
        return need - sum(self._refs[block] > 0 for block in chain(*self._find(first)) if block)

    def admit(self, sequence: Tokens) -> None:
        """Give a sequence that owns nothing its blocks, as many of them as possible from the prefix cache."""
        hits = self._find(sequence)
        if self.prefix_caching and sequence.request.looks_up_prefixes:
            self.prefix_stats.queries += sequence.total
            self.prefix_stats.hits += len(hits[0]) * self.block_size
        self._start(sequence, hits)

    def missing(self, request: Request) -> int:
        """Free blocks that the next step of ``request``, which is running, takes."""
        size, refs = self.block_size, self._refs
        for sequence in request.live:
            table, total = sequence.tables[0], len(sequence.token_ids)
            if total > len(table) * size or refs[table[sequence.computed // size]] > 1:
                return self._missing(request.live)
        return 0

    def grow(self, request: Request) -> Moves:
        """Take what ``missing`` says. Returns the copies to make before anything is written.

        Of sequences that start over one is let in at a time, when those before it have caught up: it shares with them.
        """
        moves: Moves = []
        for place, sequence in enumerate(request.live):
            if not sequence.tables[0]:
                elders = request.live[:place]
                if all(elder.pending == 1 for elder in elders):
                    self._start(sequence, self._shared_with(sequence, elders))
                break
            if sequence.pending:
                self._own_tail(sequence, moves)
                self._lengthen(sequence)
        return moves

    def fork(self, parent: Tokens, child: Tokens) -> None:
        """Let ``child`` own all that ``parent`` owns."""
        child.tables = tuple(table.copy() for table in parent.tables)
        child.computed = parent.computed
        child.published, child.entry = parent.published, parent.entry
        for block in chain(*child.tables):
            if block:
                self._refs[block] += 1

    # A sequence's way out

    def release(self, sequence: Tokens) -> None:
        """Take back all that ``sequence`` owns, wherever it is; it starts over from nothing."""
        drop = self._drop_cpu if sequence.request.swapped else self._drop
        for table in sequence.tables:
            for block in reversed(table):
                if block or sequence.request.swapped:
                    drop(block)
        sequence.tables = tuple([] for _ in sequence.tables)
        sequence.computed = 0
        sequence.published, sequence.entry = 0, None

    def computed(self, sequence: Tokens) -> None:
        """Publish the blocks that are full now, and give back those that no query of ``sequence`` can see any more."""
        if self.prefix_caching and sequence.computed // self.block_size > sequence.published:
            self._publish(sequence)
        if self._has_windows:
            self._free_unseen(sequence)

    def forget_prefixes(self) -> None:
        """Let nobody find what the free blocks hold: somebody else has written there. Nothing may be in use."""
        self._free.extend(self._evictable)
        self._evictable.clear()
        self._cache = PrefixCache(len(self.windows))

    # Swapping

    def swap_out(self, request: Request) -> Moves | None:
        """Move all that ``request`` owns to main memory, and return the moves; None, and nothing done, if it is full.

        Block 0 of a table stands for what a window has passed, and takes a block there too: it keeps tables of one
        length, and costs little.
        """
        tables = [table for sequence in request.live for table in sequence.tables]
        distinct = dict.fromkeys(chain(*tables))
        if len(distinct) > len(self._cpu_free):
            return None
        homes = {block: self._cpu_free.pop() for block in distinct}
        for table in tables:
            for block in reversed(table):
                if block:
                    self._drop(block)
        for sequence in request.live:
            sequence.tables = tuple([homes[block] for block in table] for table in sequence.tables)
            for home in chain(*sequence.tables):
                self._cpu_refs[home] += 1
        return [(block, home) for block, home in homes.items() if block]

    def swap_in_cost(self, request: Request) -> int:
        """Free blocks that bringing ``request`` back takes, what it needs to go on included."""
        live = [sequence for sequence in request.live if sequence.tables[0]]
        found = self._find_swapped(live)
        distinct = {
            block
            for sequence in live
            for group, table in enumerate(sequence.tables)
            for block in table[self._first_seen(group, sequence.computed) :]
        }
        taken = sum(1 for block in distinct if not self._refs[found.get(block, 0)])
        return taken + self._missing(request.live, self._cpu_refs)

    def swap_in(self, request: Request) -> Moves:
        """Bring ``request`` back. What the prefix cache still knows is shared instead of moved."""
        live = [sequence for sequence in request.live if sequence.tables[0]]
        homes = self._find_swapped(live)
        for block in set(homes.values()):
            if self._refs[block] == 0:
                self._revive(block)
        moves: Moves = []
        for sequence in live:
            tables: tuple[list[int], ...] = tuple([] for _ in sequence.tables)
            for group, table in enumerate(sequence.tables):
                passed = self._first_seen(group, sequence.computed)
                for index, block in enumerate(table):
                    if index < passed:
                        tables[group].append(0)
                    else:
                        if block not in homes:
                            homes[block] = self._take()
                            moves.append((block, homes[block]))
                            self._refs[homes[block]] = 0
                        tables[group].append(homes[block])
                        self._refs[homes[block]] += 1
                    self._drop_cpu(block)
            sequence.tables = tables
        return moves

    # Checks

    def check_integrity(self, requests: Iterable[Request]) -> None:
        """Raise RuntimeError unless every block is free or owned, and as often as tables name it."""
        here: Counter[int] = Counter()
        there: Counter[int] = Counter()
        for request in requests:
            for sequence in request.live:
                if len({len(table) for table in sequence.tables}) > 1:
                    raise RuntimeError(f"tables of sequence {sequence.sequence_id} differ in length")
                (there if request.swapped else here).update(chain(*sequence.tables))
        here.pop(0, None)
        free = [*self._free, *self._evictable]
        if len(set(free)) != len(free) or set(free) & set(here):
            raise RuntimeError("a block is free twice, or both free and used")
        if len(free) + len(here) != self.total:
            raise RuntimeError(f"{len(here)} blocks owned and {len(free)} free, of {self.total}")
        if any(count != here[block] for block, count in enumerate(self._refs)):
            raise RuntimeError("reference counts and tables disagree")
        if any((block in self._cache) != (block in self._evictable) for block in free):
            raise RuntimeError("a free block is in the wrong list")
        if any(count != there[block] for block, count in enumerate(self._cpu_refs)):
            raise RuntimeError("reference counts and tables disagree in main memory")
        if len(there) + len(self._cpu_free) != self.cpu_blocks:
            raise RuntimeError(
                f"{len(there)} blocks owned and {len(self._cpu_free)} free, of {self.cpu_blocks} swapped"
            )

    # The pool

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._evictable.popitem(last=False)
            self._cache.forget(block)
        self._refs[block] = 1
        return block

    def _revive(self, block: int) -> None:
        """Take a free block out of the list of those that may be evicted; the caller counts its owners."""
        del self._evictable[block]

    def _share(self, block: int) -> None:
        if self._refs[block] == 0:
            self._revive(block)
        self._refs[block] += 1

    def _drop(self, block: int) -> None:
        self._refs[block] -= 1
        if self._refs[block] == 0:
            if block in self._cache:
                self._evictable[block] = None
            else:
                self._free.append(block)

    def _drop_cpu(self, block: int) -> None:
        self._cpu_refs[block] -= 1
        if self._cpu_refs[block] == 0:
            self._cpu_free.append(block)

    # Tables

    def _start(self, sequence: Tokens, hits: list[list[int]]) -> None:
        """``hits``: for each group, the blocks that hold the sequence's first tokens already."""
        for group, blocks in enumerate(hits):
            for block in blocks:
                if block:
                    self._share(block)
            sequence.tables[group].extend(blocks)
        sequence.computed = len(hits[0]) * self.block_size
        self._lengthen(sequence)

    def _lengthen(self, sequence: Tokens) -> None:
        lacking = blocks_for(sequence.total, self.block_size) - len(sequence.tables[0])
        if lacking > 0:
            for table in sequence.tables:
                table.extend(self._take() for _ in range(lacking))

    def _own_tail(self, sequence: Tokens, moves: Moves) -> None:
        """Make the block that the next token is written into the sequence's own."""
        index = sequence.computed // self.block_size
        tables = sequence.tables
        for group, table in enumerate(tables):
            if index < len(table) and self._refs[table[index]] > 1:
                copy = self._take()
                moves.append((table[index], copy))
                self._refs[table[index]] -= 1
                own = [*table[:index], copy, *table[index + 1 :]]
                sequence.tables = (*sequence.tables[:group], own, *sequence.tables[group + 1 :])

    def _missing(self, live: list[Tokens], refs: list[int] | None = None) -> int:
        """``missing`` of several sequences; ``refs``: where their blocks are counted, if not in the pool."""
        refs = self._refs if refs is None else refs
        groups = len(self.windows)
        need = 0
        writers: Counter[int] = Counter()
        for place, sequence in enumerate(live):
            blocks = blocks_for(sequence.total, self.block_size)
            if not sequence.tables[0]:
                elders = live[:place]
                if all(elder.pending == 1 for elder in elders):
                    need += groups * (blocks - len(self._shared_with(sequence, elders)[0]))
                break
            if sequence.pending:
                need += groups * max(0, blocks - len(sequence.tables[0]))
                index = sequence.computed // self.block_size
                writers.update(
                    table[index] for table in sequence.tables if index < len(table) and refs[table[index]] > 1
                )
        # The last one to write keeps the block.
        return need + sum(min(count, refs[block] - 1) for block, count in writers.items())

    def _first_seen(self, group: int, computed: int) -> int:
        """The first block that a query at position ``computed``, or later, sees."""
        window = self.windows[group]
        return 0 if window is None else max(0, computed - window + 1) // self.block_size

    def _free_unseen(self, sequence: Tokens) -> None:
        for group, table in enumerate(sequence.tables):
            for index in range(min(self._first_seen(group, sequence.computed), len(table)) - 1, -1, -1):
                if not table[index]:
                    break
                self._drop(table[index])
                table[index] = 0  # nobody looks there, so nobody needs to be told

    # Shared prefixes

    def _find(self, sequence: Tokens) -> list[list[int]]:
        """For each group, the cached blocks of the first tokens of ``sequence``: all but its last one at most."""
        if not self.prefix_caching or not sequence.request.looks_up_prefixes:
            return [[] for _ in self.windows]
        return self._blocks_of(self._entries_of(sequence, (sequence.total - 1) // self.block_size))

    def _entries_of(self, sequence: Tokens, most: int) -> list[Entry]:
        entries: list[Entry] = []
        size = self.block_size
        while len(entries) < most:
            start = len(entries) * size
            tokens = sequence.token_ids[start : start + size].tobytes()
            entry = self._cache.find(entries[-1] if entries else None, tokens)
            if entry is None:
                break
            entries.append(entry)
        return entries

    def _blocks_of(self, entries: list[Entry]) -> list[list[int]]:
        """The longest beginning of ``entries`` of which every group has all the blocks that it still sees."""
        for length in range(len(entries), 0, -1):
            passed = [self._first_seen(group, length * self.block_size) for group in range(len(self.windows))]
            if all(all(entry.blocks[group] for entry in entries[first:length]) for group, first in enumerate(passed)):
                return [
                    [0] * min(first, length) + [entry.blocks[group] for entry in entries[first:length]]
                    for group, first in enumerate(passed)
                ]
        return [[] for _ in self.windows]

    def _shared_with(self, sequence: Tokens, elders: list[Tokens]) -> list[list[int]]:
        """What a sequence of a request that starts over shares with those of the request that have started before."""
        best: list[list[int]] = [[] for _ in self.windows]
        if self._has_windows:
            return best
        size = self.block_size
        for elder in elders:
            most = min(elder.computed, sequence.total - 1) // size
            length = 0
            while length < most and (
                sequence.token_ids[length * size : (length + 1) * size]
                == elder.token_ids[length * size : (length + 1) * size]
            ):
                length += 1
            if length > len(best[0]):
                best = [table[:length] for table in elder.tables]
        return best

    def _find_swapped(self, live: list[Tokens]) -> dict[int, int]:
        """Of the blocks in main memory, those whose content the prefix cache still has: block there → block here."""
        found: dict[int, int] = {}
        if not self.prefix_caching:
            return found
        for sequence in live:
            entries = self._entries_of(sequence, sequence.computed // self.block_size)
            for group, table in enumerate(sequence.tables):
                first = self._first_seen(group, sequence.computed)
                for entry, block in list(zip(entries, table, strict=False))[first:]:
                    if entry.blocks[group]:
                        found.setdefault(block, entry.blocks[group])
        return found

    def _publish(self, sequence: Tokens) -> None:
        size = self.block_size
        if sequence.entry is not None and not sequence.entry.alive:
            # What it shared an entry with is gone: nothing behind a dead entry is ever found again.
            sequence.published, sequence.entry = 0, None
        while sequence.published < sequence.computed // size:
            index = sequence.published
            entry = self._cache.enter(sequence.entry, sequence.token_ids[index * size : (index + 1) * size].tobytes())
            for group, table in enumerate(sequence.tables):
                block, known = table[index], entry.blocks[group]
                if not block or block == known or self._refs[known]:
                    continue
                self._cache.put(entry, group, block)
                if known:
                    # Of two copies the one in use is worth more: the other could be evicted at any time.
                    del self._evictable[known]
                    self._free.append(known)
            if not entry.alive:
                break  # a window has passed the block before it could be published
            sequence.entry = entry
            sequence.published += 1
