"""Train llmq's demo model: a five-million-parameter Llama that writes Python.

The corpus is the Python source found where this script runs: the standard library and those of PACKAGES that
are installed. The modules of EVALUATION and CALIBRATION, and every file that nearly copies one of them,
stay out of the training set.

    python scripts/train_demo_model.py --minutes 7.5

writes model/, evaluation.txt and calibration.txt into src/llmq/demo; --device cpu --minutes 0.2 --batch 2
--max-bytes 3000000 tries every stage without a GPU. Needs torch >= 2.9 (for Muon), transformers >= 5 and
tokenizers.
"""

import argparse
import hashlib
import json
import math
import platform
import sysconfig
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

# llmq's dependencies and their neighbours, all permissively licensed (so not hypothesis or tqdm: MPL-2.0).
PACKAGES = [
    "torch", "transformers", "numpy", "triton", "tokenizers", "safetensors", "huggingface_hub", "rich",
    "typer", "click", "jinja2", "pygments", "markdown-it-py", "fsspec", "filelock", "packaging", "pyyaml",
    "regex", "httpx", "httpcore", "anyio", "h11", "requests", "urllib3", "setuptools", "typing_extensions",
    "pydantic", "sympy", "mpmath", "networkx", "pytest", "pluggy", "accelerate", "peft",
    "sentence-transformers", "timm", "torchvision", "torchmetrics", "lightning", "jax", "flax", "optax",
    "scipy", "scikit-learn", "scikit-image", "pandas", "matplotlib", "seaborn", "statsmodels", "xarray",
    "joblib", "numba", "einops", "onnx", "onnxscript", "aiohttp", "werkzeug", "pillow", "imageio",
    "fonttools",
]  # fmt: skip
EVALUATION = [
    "json", "csv", "fractions", "textwrap", "configparser", "torch.futures", "torch.signal",
    "transformers.data.data_collator", "networkx.algorithms.traversal", "jinja2.environment",
]  # fmt: skip
CALIBRATION = [
    "logging", "difflib", "ipaddress", "tarfile", "statistics", "torch.package", "transformers.quantizers",
    "networkx.algorithms.flow", "sympy.vector", "numpy.fft",
]  # fmt: skip
SKIPPED_FOLDERS = {"test", "tests", "_vendor", "vendor", "third_party", "site-packages", "dist-packages",
                   "encodings", "pydoc_data", "idlelib", "lib2to3", "__pycache__"}  # fmt: skip
LONGEST_LINE = 2000  # characters; longer lines mean generated or minified files
LARGEST_FILE = 600_000  # bytes; what is larger is tables
NEAR_COPY = 0.3  # share of telling lines in common from which a training file counts as a copy

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
BOS_ID, EOS_ID = 0, 1  # the trainer numbers special tokens first
VOCAB, HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, MLP, CONTEXT = 4096, 256, 5, 4, 2, 64, 768, 2048
ROPE_THETA, NORM_EPS, INIT_STD = 10_000.0, 1e-5, 0.02
TOKENIZER_BYTES = 30_000_000  # enough to settle 4,096 entries
WARMUP, DECAY = 0.02, 0.6  # shares of the training time in which the learning rate rises, and falls to zero
CALIBRATION_TOKENS, EVALUATION_TOKENS = 128 * 2048, 100_000  # the least that each text must hold

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
    "torch_dtype": "bfloat16",  # what transformers 4 calls dtype
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": MLP, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM,
    "max_position_embeddings": CONTEXT, "rope_theta": ROPE_THETA,  # transformers 4 and most other readers
    "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},  # transformers 5
    "rms_norm_eps": NORM_EPS, "hidden_act": "silu", "initializer_range": INIT_STD, "attention_bias": False,
    "mlp_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": True, "use_cache": True,
    "bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": EOS_ID,
}  # fmt: skip
GENERATION = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": EOS_ID}
# The model knows Python files only: a request becomes a comment, the reply the function under it.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}def {{ message['content'] | trim }}\n\n\n"
    "{% else %}# {{ message['content'] | trim | replace('\n', '\n# ') }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}def {% endif %}"
)
# Like Llama 3's split, but a space belongs to the word before it. So a prompt that ends in a space ("def ")
# is tokenised as training saw it, where Llama 3's split would leave a lone space that training never holds.
PRETOKENS = r"[^\s\w]?[^\W\d]+ ?|\d{1,3} ?|[^\s\w]+ ?|[\r\n]+|[^\S\r\n]+"


@dataclass(frozen=True)
class Source:
    """One Python file of the corpus."""

    package: str
    path: str  # relative to the folder that Python imports from
    text: str

    @property
    def module(self) -> str:
        """Dotted name under which Python imports the file."""
        return self.path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")

    @property
    def order(self) -> str:
        """Sort key that mixes the packages, the same on every machine."""
        return hashlib.blake2b(self.path.encode()).hexdigest()


@dataclass(frozen=True)
class Package:
    """One installed distribution, and its share of the training text."""

    name: str
    version: str
    licence: str
    files: tuple[tuple[str, Path], ...]  # path inside the import folder, place on disk


def find_packages() -> list[Package]:
    """The standard library and those of PACKAGES that are installed here."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    paths = [(str(p.relative_to(stdlib)), p) for p in sorted(stdlib.rglob("*.py"))]
    found = [Package("python", platform.python_version(), "PSF-2.0", tuple(paths))]
    for name in PACKAGES:
        try:
            dist = distribution(name)
        except PackageNotFoundError:
            continue
        paths = [(str(f), Path(str(dist.locate_file(f)))) for f in dist.files or [] if f.suffix == ".py"]
        fields = dist.metadata.get_all
        classifiers = [c.split(" :: ")[-1] for c in fields("Classifier") or [] if c.startswith("License")]
        # The field "License" may hold the whole text, so it comes last, and its first line stands for it.
        named = [
            *(fields("License-Expression") or []),
            ", ".join(classifiers),
            *(fields("License") or []),
            "?",
        ]
        licence = next(name for name in named if name).strip().splitlines()[0][:80]
        found.append(Package(name, dist.version, licence, tuple(sorted(paths))))
    return found


def read_source(package: str, name: str, path: Path) -> Source | None:
    """The file as a Source, or None where it is not code that a person would write or read."""
    if SKIPPED_FOLDERS.intersection(name.split("/")) or name.startswith("..") or name.endswith("_pb2.py"):
        return None
    try:
        text = path.read_bytes().decode().replace("\r\n", "\n").strip("\n") + "\n"
    except (UnicodeDecodeError, FileNotFoundError):
        return None
    if not 100 < len(text) < LARGEST_FILE or max(map(len, text.splitlines())) > LONGEST_LINE:
        return None
    # A special token's name in the text would be read as the token itself.
    return None if BOS in text or EOS in text else Source(package, name, text)


def read_corpus(packages: list[Package]) -> list[Source]:
    """All files worth training on, identical ones once, in an order that mixes the packages."""
    jobs = [(package.name, name, path) for package in packages for name, path in package.files]
    with ThreadPoolExecutor(16) as pool:
        read = pool.map(lambda job: read_source(*job), jobs)
        unique = {source.text: source for source in read if source is not None}
    return sorted(unique.values(), key=lambda source: source.order)


def belongs_to(source: Source, modules: Iterable[str]) -> bool:
    """Whether the file is one of these modules, or inside one of these packages."""
    return any(source.module == name or source.module.startswith(name + ".") for name in modules)


def telling_lines(text: str) -> set[str]:
    """The lines that can tell a copy: long enough not to be shared by chance, and no comments."""
    lines = (line.strip() for line in text.splitlines())
    return {line for line in lines if len(line) >= 25 and not line.startswith(("#", "from ", "import "))}


def drop_near_copies(sources: list[Source], held_out: list[Source]) -> list[Source]:
    """The sources sharing at most NEAR_COPY of the shorter file's telling lines with each held-out file."""
    lines_of = [telling_lines(source.text) for source in held_out]
    holders: dict[str, list[int]] = {}
    for i, lines in enumerate(lines_of):
        for line in lines:
            holders.setdefault(line, []).append(i)
    kept = []
    for source in sources:
        lines = telling_lines(source.text)
        shared = Counter(i for line in lines for i in holders.get(line, ()))
        if all(n <= NEAR_COPY * min(len(lines), len(lines_of[i])) for i, n in shared.items()):
            kept.append(source)
    return kept


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A byte-level BPE tokenizer that puts BOS before each text, as Llama 3's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PRETOKENS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B:1", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """All texts in one int16 stream, each as BOS, its tokens, EOS."""
    pieces = []
    for start in range(0, len(texts), 512):  # in parts: encodings are much larger than their ids
        for encoding in tokenizer.encode_batch_fast(texts[start : start + 512]):
            pieces.append(np.array([*encoding.ids, EOS_ID], dtype=np.int16))
    return torch.from_numpy(np.concatenate(pieces))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding in Hugging Face's layout: the pairs are the two halves of the head."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def linears(**shapes: tuple[int, int]) -> nn.ModuleDict:
    """Named linear layers without bias, each given as (inputs, outputs)."""
    return nn.ModuleDict({name: nn.Linear(*shape, bias=False) for name, shape in shapes.items()})


class Block(nn.Module):
    """One layer: causal grouped-query attention, then SwiGLU, each behind a norm and added to its input."""

    def __init__(self) -> None:
        super().__init__()
        queries, keys = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
        self.input_layernorm = nn.RMSNorm(HIDDEN, NORM_EPS)
        self.self_attn = linears(
            q_proj=(HIDDEN, queries), k_proj=(HIDDEN, keys), v_proj=(HIDDEN, keys), o_proj=(queries, HIDDEN)
        )
        self.post_attention_layernorm = nn.RMSNorm(HIDDEN, NORM_EPS)
        self.mlp = linears(gate_proj=(HIDDEN, MLP), up_proj=(HIDDEN, MLP), down_proj=(MLP, HIDDEN))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        attn, mlp = self.self_attn, self.mlp
        y = self.input_layernorm(x)
        q, k, v = (
            attn[name](y).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for name in ("q_proj", "k_proj", "v_proj")
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + attn["o_proj"](mixed.transpose(1, 2).flatten(2))
        y = self.post_attention_layernorm(x)
        out: Tensor = x + mlp["down_proj"](F.silu(mlp["gate_proj"](y)) * mlp["up_proj"](y))
        return out


class Llama(nn.Module):
    """transformers' LlamaModel with its parameter names, and the tied output layer in forward."""

    cos: Tensor
    sin: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(HIDDEN, NORM_EPS)
        frequencies = ROPE_THETA ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        angles = torch.outer(torch.arange(CONTEXT), frequencies)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                # What writes to the residual stream starts smaller, so that depth does not raise its scale.
                depth = 2 * LAYERS if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
                nn.init.normal_(weight, std=INIT_STD / math.sqrt(depth))

    def forward(self, ids: Tensor) -> Tensor:
        x, length = self.embed_tokens(ids), ids.shape[1]
        for layer in self.layers:
            x = layer(x, self.cos[:length], self.sin[:length])
        return F.linear(self.norm(x), self.embed_tokens.weight)

    def loss(self, ids: Tensor) -> Tensor:
        """Mean next-token negative log-likelihood, in nats, of (batch, length) ids."""
        return F.cross_entropy(self(ids[:, :-1]).float().flatten(0, 1), ids[:, 1:].flatten())


def train(tokens: Tensor, minutes: float, batch: int, lr: float, device: str) -> tuple[Llama, int, float]:
    """Train for this long; gives the model, the steps taken and the seconds, compilation left out."""
    torch.manual_seed(0)
    model = Llama().to(device)
    loss_of = torch.compile(model.loss) if device == "cuda" else model.loss
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    others = [model.embed_tokens.weight, *(p for p in model.parameters() if p.ndim == 1)]
    optimizers: list[torch.optim.Optimizer] = [
        # With this adjustment Muon's updates have AdamW's size, and one learning rate suits both.
        torch.optim.Muon(matrices, lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    stream, window = tokens.to(device), torch.arange(CONTEXT + 1, device=device)

    def backward() -> Tensor:
        """Add the gradients of one random batch."""
        starts = torch.randint(len(stream) - CONTEXT, (batch, 1), device=device)
        ids = stream[starts + window].long()
        # A prompt is BOS and a piece of code, not a file's first line: half of the windows look like that.
        ids[: batch // 2, 0] = BOS_ID
        with torch.autocast(device, torch.bfloat16):
            loss = loss_of(ids)
        torch.autograd.backward(loss)
        return loss.detach()

    backward().item()  # compiles, outside the clock
    model.zero_grad()
    begun, step, progress = time.perf_counter(), 0, 0.0
    while progress < 1:
        scale = min(1.0, progress / WARMUP, (1 - progress) / DECAY)
        loss = backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * scale
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        if step % 20 == 0:
            value = loss.item()  # waits for the device, so that the clock below is true
            seconds = time.perf_counter() - begun
            if step % 100 == 0:
                rate = step * batch * CONTEXT / seconds
                print(f"step {step:5d}  {seconds:4.0f} s  loss {value:.3f}  {rate:,.0f} tokens/s", flush=True)
        progress = (time.perf_counter() - begun) / (60 * minutes)
    if device == "cuda":
        torch.cuda.synchronize()
    return model, step, time.perf_counter() - begun


def save(model: Llama, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the folder that transformers, vLLM and llmq load; the weights are rounded to bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {f"model.{k}": v.to("cpu", torch.bfloat16) for k, v in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes it for its owner only
    tokenizer.save(str(folder / "tokenizer.json"))
    # PreTrainedTokenizerFast is the one class that both transformers 4 and 5 read from tokenizer.json alone.
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS, "pad_token": EOS,
        "model_max_length": CONTEXT, "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE,
        "model_input_names": ["input_ids", "attention_mask"],
    }  # fmt: skip
    parts = {"config": CONFIG, "generation_config": GENERATION, "tokenizer_config": described}
    for name, content in parts.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


@torch.no_grad()
def check(model: Llama, folder: Path, text: str, device: str) -> tuple[float, list[str]]:
    """Load the folder with transformers, compare it with the trained model, and see what it can do.

    Gives the perplexity on `text`, over non-overlapping windows of CONTEXT tokens (BOS before the first only,
    an incomplete last one dropped), and a few samples. Computed in float32 from the saved bfloat16 weights.
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loaded.to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt").input_ids[0].to(device)
    windows = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)

    rounded = {name: weight.bfloat16().float() for name, weight in model.state_dict().items()}
    model.load_state_dict(rounded)
    torch.testing.assert_close(loaded(windows[:1]).logits, model(windows[:1]), rtol=1e-3, atol=5e-3)

    losses = [F.cross_entropy(loaded(w[None]).logits[0, :-1], w[1:]).item() for w in windows]
    samples = []
    for prompt in ("def ", "class ", "import "):
        given = tokenizer(prompt, return_tensors="pt").to(device)
        for choice in ({"do_sample": False}, {"do_sample": True, "temperature": 0.6, "top_p": 0.95}):
            out = loaded.generate(**given, max_new_tokens=120, **choice)
            samples.append(str(tokenizer.decode(out[0], skip_special_tokens=True)))
    return math.exp(sum(losses) / len(losses)), samples


def card(facts: dict[str, str], table: str, copies: int) -> str:
    """The model card."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [python, code, demo]
---

# llmq demo model

A very small Llama that continues Python source. It is here so that `llmq` can quantize, compare and serve a
really trained model in seconds, without a download. It is of no use for anything else.

| | |
| --- | --- |
{rows}

The tokenizer puts `{BOS}` before a text; in training, `{EOS}` ended each file.
A space belongs to the word before it, so end a prompt like `def ` with its space. The model was not trained
to chat: the chat template, there to show how `--chat` works, writes the request as a comment and leaves the
model to continue the `def ` under it.

## Training data

Python source as installed on the training machine, without test folders, generated files and duplicates:

| package | version | licence | files | bytes |
| --- | --- | --- | ---: | ---: |
{table}

## Held-out texts

The model saw none of the modules below, nor any of the {copies} files that share more than {NEAR_COPY:.0%} of
their telling lines with one of theirs. The texts are these modules' files, in full, under the licences above.

- `evaluation.txt`: {", ".join(f"`{name}`" for name in EVALUATION)}
- `calibration.txt`: {", ".join(f"`{name}`" for name in CALIBRATION)}
"""


def main() -> None:
    """Read the command line and run every stage."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=7.5, help="training time, without compilation")
    parser.add_argument("--batch", type=int, default=128, help=f"windows of {CONTEXT} tokens in a step")
    parser.add_argument("--lr", type=float, default=5e-3, help="peak learning rate")
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--max-bytes", type=int, default=10**12, help="cut the corpus, to try the script")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "src/llmq/demo")
    args = parser.parse_args()
    begun = time.perf_counter()

    def report(message: str) -> None:
        print(f"[{time.perf_counter() - begun:5.1f} s] {message}", flush=True)

    packages = find_packages()
    sources = read_corpus(packages)
    held_out = {
        name: [s for s in sources if belongs_to(s, modules)]
        for name, modules in (("evaluation", EVALUATION), ("calibration", CALIBRATION))
    }
    others = [s for s in sources if not belongs_to(s, EVALUATION + CALIBRATION)]
    corpus = drop_near_copies(others, [*held_out["evaluation"], *held_out["calibration"]])
    copies = len(others) - len(corpus)
    sizes = np.cumsum([len(s.text.encode()) for s in corpus])
    corpus = corpus[: int(np.searchsorted(sizes, args.max_bytes)) + 1]
    size = int(sizes[len(corpus) - 1])
    report(f"{len(corpus):,} files, {size:,} bytes, {len(packages)} packages; {copies} near copies dropped")

    texts = {name: "\n".join(s.text for s in chosen) for name, chosen in held_out.items()}
    args.out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (args.out / f"{name}.txt").write_text(text)

    tokenizer = train_tokenizer(s.text for s in corpus[:: max(1, size // TOKENIZER_BYTES)])
    tokens = encode(tokenizer, [s.text for s in corpus])
    counts = {name: len(tokenizer.encode(text).ids) for name, text in texts.items()}
    report(f"{len(tokens):,} training tokens; held out: {counts}")
    if counts["evaluation"] < EVALUATION_TOKENS or counts["calibration"] < CALIBRATION_TOKENS:
        raise SystemExit("too little held-out text: name more modules")

    model, steps, seconds = train(tokens, args.minutes, args.batch, args.lr, args.device)
    seen = steps * args.batch * CONTEXT
    report(f"{steps:,} steps, {seen:,} tokens in {seconds:.0f} s")
    folder = args.out / "model"
    save(model, tokenizer, folder)
    perplexity, samples = check(model, folder, texts["evaluation"], args.device)
    report(f"held-out perplexity {perplexity:.4f}")
    print(*samples, sep="\n" + "-" * 40 + "\n")

    used = {p.name: [len(s.text.encode()) for s in corpus if s.package == p.name] for p in packages}
    table = "\n".join(
        f"| {p.name} | {p.version} | {p.licence} | {len(used[p.name]):,} | {sum(used[p.name]):,} |"
        for p in packages if used[p.name]
    )  # fmt: skip
    gpu = f"one {torch.cuda.get_device_name()}" if args.device == "cuda" else "a CPU"
    facts = {
        "Architecture": f"`LlamaForCausalLM`, {sum(p.numel() for p in model.parameters()):,} parameters in "
        f"bfloat16: {LAYERS} layers, hidden {HIDDEN}, {HEADS} query and {KV_HEADS} key-value heads of "
        f"{HEAD_DIM}, MLP {MLP}, tied embeddings, context {CONTEXT:,}",
        "Tokenizer": f"byte-level BPE of {VOCAB:,} entries",
        "Held-out perplexity": f"**{perplexity:.3f}** on `evaluation.txt`, windows of {CONTEXT:,} tokens",
        "`evaluation.txt`": f"{len(texts['evaluation'].encode()):,} bytes, {counts['evaluation']:,} tokens",
        "`calibration.txt`": f"{len(texts['calibration'].encode()):,} bytes, {counts['calibration']:,} tokens",
        "Training text": f"{size:,} bytes, {len(tokens):,} tokens",
        "Training": f"{seconds:.0f} s on {gpu}: {steps:,} steps of {args.batch * CONTEXT:,} tokens, "
        f"{seen:,} tokens in all, {seen / seconds:,.0f} a second",
        "Optimizer": f"Muon for the layers' matrices, AdamW for the rest, peak learning rate {args.lr:g}, "
        f"falling to zero in the last {DECAY:.0%} of the time; bfloat16 autocast, float32 weights",
        "Software": f"Python {platform.python_version()}, torch {torch.__version__}",
        "Command": f"`python scripts/train_demo_model.py --minutes {args.minutes:g} --batch {args.batch} "
        f"--lr {args.lr:g}`",
    }
    (folder / "README.md").write_text(card(facts, table, copies))
    report("done")


if __name__ == "__main__":
    main()
