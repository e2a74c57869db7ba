"""What a run asks for: prompts, how long their answers are, and when they are due. No torch.

The same workload gives the same requests, to the byte. Prompts are token ids where the model's vocabulary is known;
to a server whose vocabulary is not, they are words, about a token each, and the server counts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from llmq.checkpoint.config import read_config
from llmq.checkpoint.tokenizer import encode_chat, has_tokenizer, load_tokenizer
from llmq.errors import USAGE, LlmqError

Dataset = Literal["random", "prefix", "sharegpt", "jsonl", "trace"]
DATASETS: tuple[Dataset, ...] = ("random", "prefix", "sharegpt", "jsonl", "trace")
FROM_FILE = ("sharegpt", "jsonl", "trace")
Message = dict[str, str]
Prompt = str | list[int] | list[Message]
"""A text, token ids, or the messages of a conversation."""
WORDS = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or had an they which "
    "one you were her all she there would their we him been has when who will more no if out so said what up its about "
    "into than them can only other new some could time these two may then do first any my now such like our over man me"
)


@dataclass(frozen=True, slots=True)
class Item:
    """One request. ``output_len`` tokens are generated for it; ``due`` is seconds after the start, None: the load's
    business."""

    prompt: Prompt
    output_len: int
    due: float | None = None


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens of a model: ids below ``size``, of which prompts hold none of ``special``. ``encode`` gives the tokens
    of a text or conversation; None: the model has no tokenizer."""

    size: int
    special: frozenset[int] = frozenset()
    encode: Callable[[str | list[Message]], list[int]] | None = field(default=None, compare=False)

    def count(self, prompt: Prompt) -> int:
        """Tokens of ``prompt``. LlmqError when it is a text and there is no tokenizer."""
        return len(self.token_ids(prompt))

    def token_ids(self, prompt: Prompt) -> list[int]:
        """The tokens of ``prompt``. LlmqError when it is a text and there is no tokenizer."""
        if prompt and isinstance(prompt, list) and isinstance(prompt[0], int):
            return prompt
        if self.encode is None:
            raise LlmqError("the model has no tokenizer, and the prompts are texts", "take --dataset random")
        return self.encode(prompt)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Workload:
    """dataset       random: tokens drawn uniformly; prefix: the same, behind prefixes that prompts share; sharegpt:
                  conversations' first turns; jsonl: prompts of a file; trace: lengths and times of a file
    path          the file of the last three
    num_prompts   requests; of a file, its first so many
    input_len     tokens of each prompt, prefix included; sharegpt, jsonl: the file says
    output_len    tokens generated for each, whatever they are; jsonl: where the file does not say
    range_ratio   random, prefix: lengths are drawn between (1 − r) and (1 + r) times these
    num_prefixes  prefix: how many different ones
    prefix_len    prefix: their tokens
    seed          of all that is drawn
    """

    num_prompts: int = 64
    input_len: int = 128
    output_len: int = 128
    seed: int = 0
    dataset: Dataset = "random"
    path: Path | None = None
    range_ratio: float = 0.0
    num_prefixes: int = 4
    prefix_len: int = 64

    def __post_init__(self) -> None:
        from_file = self.dataset in FROM_FILE
        checks = (
            (self.num_prompts >= 1, "num_prompts", "1 or more"),
            (self.input_len >= 1, "input_len", "1 or more"),
            (self.output_len >= 1, "output_len", "1 or more"),
            (self.dataset in DATASETS, "dataset", f"one of {', '.join(DATASETS)}"),
            (not from_file or self.path is not None, "dataset_path", f"a file, for --dataset {self.dataset}"),
            (from_file or self.path is None, "dataset_path", f"left out, for --dataset {self.dataset} is drawn"),
            (0 <= self.range_ratio < 1, "range_ratio", "0 or more and below 1"),
            (self.num_prefixes >= 1, "num_prefixes", "1 or more"),
            (self.dataset != "prefix" or 1 <= self.prefix_len < self.input_len, "prefix_len", "below --input-len"),
        )
        for valid, name, rule in checks:
            if not valid:
                value = self.path if name == "dataset_path" else getattr(self, name)
                raise LlmqError(
                    f"{name} must be {rule}, not {value}", f"check --{name.replace('_', '-')}", exit_code=USAGE
                )

    def as_json(self) -> dict[str, Any]:
        """What two runs must have alike to be compared."""
        return {name: str(value) if name == "path" and value else value for name, value in asdict(self).items()}

    def drawn(self, vocabulary: Vocabulary | None, cell: int = 0) -> list[Item]:
        """The requests of measurement number ``cell`` where prompts are random: see ``datasets.items_of``."""
        noise = random.Random(f"{self.dataset} {self.seed} {cell}")
        shared = self.prefix_len if self.dataset == "prefix" else 0
        prefixes = [_draw(noise, shared, vocabulary) for _ in range(self.num_prefixes)]
        found = []
        for number in range(self.num_prompts):
            length = max(shared + 1, self._length(self.input_len, noise))
            own = _draw(noise, length - shared, vocabulary)
            prompt = prefixes[number % self.num_prefixes] + own
            found.append(Item(_as_prompt(prompt), self._length(self.output_len, noise)))
        return found

    def _length(self, length: int, noise: random.Random) -> int:
        spread = int(length * self.range_ratio)
        return noise.randint(length - spread, length + spread)


def vocabulary_of(folder: Path) -> Vocabulary:
    """The tokens of the model in ``folder``, which needs no more than a config.json, and no tokenizer."""
    config = read_config(folder)
    special = {*config.eos_token_ids, *(() if config.bos_token_id is None else (config.bos_token_id,))}
    if not has_tokenizer(folder):
        return Vocabulary(config.vocab_size, frozenset(special))
    tokenizer = load_tokenizer(folder)

    def encode(text: str | list[Message]) -> list[int]:
        return tokenizer.encode(text) if isinstance(text, str) else encode_chat(tokenizer, text)

    return Vocabulary(config.vocab_size, frozenset(special), encode)


def warm_up(items: Sequence[Item], vocabulary: Vocabulary | None, seed: int, cell: int = 0) -> list[Item]:
    """Other prompts of the same lengths, so that nothing of the measured ones is warm but the machine; others again for
    every ``cell``."""
    noise = random.Random(f"warm-up {seed} {cell}")
    return [replace(item, prompt=draw_prompt(noise, prompt_len(item, vocabulary), vocabulary)) for item in items]


def draw_prompt(noise: random.Random, length: int, vocabulary: Vocabulary | None) -> Prompt:
    """A prompt of ``length`` random tokens, or words."""
    return _as_prompt(_draw(noise, length, vocabulary))


def prompt_len(item: Item, vocabulary: Vocabulary | None) -> int:
    """Tokens of a prompt; of a text for an unknown vocabulary, its words."""
    if vocabulary is not None and (vocabulary.encode or isinstance(item.prompt[0], int)):
        return vocabulary.count(item.prompt)
    texts = [item.prompt] if isinstance(item.prompt, str) else [_content(part) for part in item.prompt]
    return max(1, sum(len(text.split()) for text in texts))


def check_context(items: Sequence[Item], vocabulary: Vocabulary | None, context_length: int) -> None:
    """Raise LlmqError unless prompt and output of every request fit a context of so many tokens."""
    for number, item in enumerate(items, 1):
        length = prompt_len(item, vocabulary)
        if length + item.output_len > context_length:
            raise LlmqError(
                f"request {number}: {length} tokens in and {item.output_len} out make {length + item.output_len}, "
                f"and the model's context is {context_length}",
                "lower --input-len or --output-len, or shorten the file's",
                exit_code=USAGE,
            )


def _draw(noise: random.Random, length: int, vocabulary: Vocabulary | None) -> list[Any]:
    return noise.choices(WORDS.split() if vocabulary is None else _ordinary(vocabulary), k=length)


@lru_cache(maxsize=1)
def _ordinary(vocabulary: Vocabulary) -> list[int]:
    return [token for token in range(vocabulary.size) if token not in vocabulary.special]


def _as_prompt(drawn: list[Any]) -> Prompt:
    return " ".join(drawn) if isinstance(drawn[0], str) else drawn


def _content(part: int | Message) -> str:
    return "" if isinstance(part, int) else part["content"]
