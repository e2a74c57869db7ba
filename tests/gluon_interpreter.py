"""Gluon kernels on a CPU: programs one after the other, each partition of warps a thread, tensors PyTorch's.

Triton's own interpreter knows nothing of Gluon. This one runs the Python of a kernel, with stand-ins for its language,
and takes every freedom that the card has against the kernel:

    a copy       happens when somebody waits for its barrier; from the moment it is asked for, its place holds noise
    a product    is taken from shared memory when its warps wait for it
    a store      by the copy engine reads shared memory when its warps wait for it
    memory       outside of a tensor is an error, and so is what the kernel before may write, until ``wait``
    barriers     that nobody can pass any more are an error

so that what is used before it is there, or overwritten while it is used, shows in the result. What it does not show:
layouts, registers, fences, and what threads of one partition do to each other.
"""

from __future__ import annotations

import inspect
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import ampere, hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import ConstexprFunction, JITFunction

from llmq.runtime.kernels import pdl_triton

PATIENCE = 60.0  # seconds that a launch may take
OPTIONS = ("num_warps", "num_stages", "maxnreg", "launch_pdl", "launch_cooperative_grid")
Assembly = Mapping[str, Callable[..., Any]]
here = threading.local()


@dataclass(frozen=True)
class Type:
    """A type, which is the same as PyTorch's and Triton's of that name."""

    torch: torch.dtype
    name: str

    def __eq__(self, other: object) -> bool:
        return other == self.torch if isinstance(other, torch.dtype) else getattr(other, "name", None) == self.name

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def primitive_bitwidth(self) -> int:
        return 8 * self.torch.itemsize


TYPES = [
    Type(torch.int8, "int8"), Type(torch.int16, "int16"), Type(torch.int32, "int32"), Type(torch.int64, "int64"),
    Type(torch.float16, "fp16"), Type(torch.bfloat16, "bf16"), Type(torch.float32, "fp32"),
    Type(torch.float8_e4m3fn, "fp8e4nv"),
]  # fmt: skip


def type_of(dtype: torch.dtype) -> Type:
    return next(each for each in TYPES if each.torch == dtype)


def dtype_of(each: Type | torch.dtype) -> torch.dtype:
    return each.torch if isinstance(each, Type) else each


class Number(int):
    """An integer of the device, where a quotient is cut to that of the magnitudes."""

    def to(self, _: Type) -> Number:
        return self

    def __floordiv__(self, other: Any) -> Any:
        if not isinstance(other, int):
            return NotImplemented
        magnitude = abs(int(self)) // abs(int(other))
        return Number(magnitude if (self < 0) == (other < 0) else -magnitude)

    def __mod__(self, other: Any) -> Any:
        return self - self // other * other if isinstance(other, int) else NotImplemented


def _number(name: str) -> Callable[..., Any]:
    plain = getattr(int, name)

    def run(*operands: Any) -> Any:
        result = plain(*operands)
        return Number(result) if isinstance(result, int) else result

    return run


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "and", "rand", "or", "xor", "lshift", "rshift", "neg"):
    setattr(Number, f"__{_name}__", _number(f"__{_name}__"))


def numbers(*bounds: int, **_: Any) -> Iterator[Number]:
    """What a loop runs over."""
    return map(Number, range(*bounds))


class Value(torch.Tensor):
    """A tensor in registers."""

    @property
    def type(self) -> SimpleNamespace:  # type: ignore[override]
        return SimpleNamespace(layout=None)

    def to(self, type: Type | torch.dtype, bitcast: bool = False) -> Tensor:  # type: ignore[override]
        return self.view(dtype_of(type)) if bitcast else super().to(dtype_of(type))

    def split(self) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        first, second = self.unbind(-1)
        return first, second


def value(x: Tensor) -> Any:
    return x.as_subclass(Value)  # type: ignore[arg-type]


@dataclass
class Pointer:
    """Addresses of numbers in a tensor's memory."""

    tensor: Tensor
    constant: bool  # no kernel before writes it
    at: Any = 0

    @property
    def dtype(self) -> SimpleNamespace:
        return SimpleNamespace(element_ty=type_of(self.tensor.dtype))

    def to(self, type: Type, bitcast: bool) -> Pointer:
        return Pointer(self.tensor.view(dtype_of(type)), self.constant)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.tensor, self.constant, self.at + offset)

    def memory(self, mask: Any) -> tuple[Tensor, Tensor]:
        """The tensor's numbers as they lie in memory, and which of them are meant where ``mask`` is set."""
        if not (self.constant or here.waited):
            raise RuntimeError("memory that the kernel before may write is used before wait")
        size = 1 + sum((n - 1) * stride for n, stride in zip(self.tensor.shape, self.tensor.stride(), strict=True))
        at = torch.as_tensor(self.at)
        inside = torch.as_tensor(True if mask is None else mask)
        at, inside = torch.broadcast_tensors(at, inside)
        wrong = inside & ((at < 0) | (at >= size))
        if bool(wrong.any()):
            raise IndexError(f"address {int(at[wrong][0])} of a tensor of {size} numbers")
        return self.tensor.as_strided((size,), (1,)), torch.where(inside, at, 0).long()


@dataclass
class Descriptor:
    """What the copy engine knows of a tensor."""

    host: TensorDescriptor
    constant: bool

    @property
    def dtype(self) -> Type:
        return type_of(self.host.base.dtype)

    @property
    def layout(self) -> Any:
        return self.host.layout

    @property
    def block_type(self) -> SimpleNamespace:
        shape = self.host.block_shape
        return SimpleNamespace(shape=shape, nbytes=math.prod(shape) * self.host.base.itemsize)

    def box(self, corner: Sequence[int]) -> tuple[Tensor, tuple[slice, ...], tuple[slice, ...]]:
        """The tensor, and where in it, and where in a box at ``corner``, what is in both lies."""
        if not (self.constant or here.waited):
            raise RuntimeError("memory that the kernel before may write is copied before wait")
        tensor = self.host.base.as_strided(self.host.shape, self.host.strides)
        outer, inner = [], []
        for first, length, most in zip(corner, self.host.block_shape, self.host.shape, strict=True):
            start, stop = max(first, 0), max(min(first + length, most), max(first, 0))
            outer.append(slice(start, stop))
            inner.append(slice(start - first, stop - first))
        return tensor, tuple(outer), tuple(inner)


@dataclass
class Shared:
    """A part of shared memory: ``at`` has, for each element, its place in ``memory``."""

    memory: Tensor
    at: Tensor
    layout: Any

    @property
    def dtype(self) -> Type:
        return type_of(self.memory.dtype)

    @property
    def shape(self) -> torch.Size:
        return self.at.shape

    def index(self, number: int) -> Shared:
        if not 0 <= number < len(self.at):
            raise IndexError(f"place {number} of {len(self.at)} in shared memory")
        return Shared(self.memory, self.at[number], self.layout)

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return Shared(self.memory, self.at.narrow(dim, start, length), self.layout)

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.memory, self.at.permute(*order), self.layout)

    def _reinterpret(self, type: Type, shape: Sequence[int], layout: Any) -> Shared:
        memory = self.memory.view(dtype_of(type))
        first = int(self.at.min()) * self.memory.itemsize // memory.itemsize
        return Shared(memory, first + places(shape, memory.dtype, layout), layout)

    def load(self, layout: Any = None) -> Any:
        return value(self.memory[self.at])

    def store(self, x: Any) -> None:
        self.memory[self.at] = torch.as_tensor(x).to(self.memory.dtype)

    def spoil(self) -> None:
        self.memory[self.at] = noise(self.at.shape, self.memory.dtype)


def places(shape: Sequence[int], dtype: torch.dtype, layout: Any) -> Tensor:
    """Where the elements of a tensor lie: a tile wider than the swizzle is a block of each width after the other. The
    swizzle itself only exchanges pieces of a row, in the same way in all tiles of a kernel."""
    *front, columns = shape
    width = getattr(layout, "swizzle_byte_width", 0) // dtype.itemsize or columns
    tile = front[1:] if len(front) > 1 else front
    tiles, rows = math.prod(shape) // (math.prod(tile) * columns), math.prod(tile)
    at = torch.arange(math.prod(shape)).view(tiles, columns // width, rows, width)
    return at.transpose(1, 2).reshape(*shape)


def noise(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    if dtype.is_floating_point:
        return torch.full(shape, math.nan).to(dtype)
    return torch.randint(-100, 100, shape).to(dtype)


@dataclass
class Barrier:
    """An mbarrier: a phase ends when ``count`` have arrived and all expected bytes have."""

    program: Program
    count: int = 0
    phase: int = 0
    missing: int = 0
    expected: int = 0
    waited: bool = False  # somebody who has come to it has waited for the kernel before
    copies: list[Callable[[], int]] = field(default_factory=list)

    def arrive(self, number: int, expected: int = 0) -> None:
        with self.program.changed:
            self.waited |= here.waited
            self.missing -= number
            self.expected += expected
            if self.missing < 0:
                raise RuntimeError("more arrive at a barrier than it counts")
            self.end()

    def end(self) -> None:
        if self.missing == 0 and self.expected == 0:
            self.phase, self.missing = self.phase + 1, self.count
            self.program.changed.notify_all()

    def wait(self, parity: int) -> None:
        with self.program.changed:
            while self.phase & 1 == parity:
                if self.copies:
                    for copy in self.copies:
                        self.expected -= copy()
                    self.copies.clear()
                    self.end()
                elif not self.program.changed.wait(0.01):
                    self.program.launch.check()
            here.waited |= self.waited


@dataclass
class Barriers:
    barriers: list[Barrier]

    def index(self, number: int) -> Barrier:
        return self.barriers[number]


@dataclass
class Sum:
    """A product that has been asked for."""

    a: Any
    b: Shared
    acc: Any
    use_acc: bool
    result: Any = None

    def take(self) -> None:
        a, b = (x.load() if isinstance(x, Shared) else x for x in (self.a, self.b))
        acc = self.acc.result if isinstance(self.acc, Sum) else self.acc
        product = (a.double() @ b.double()).to(acc.dtype)
        self.result = acc + product if self.use_acc else product

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"{name} of a product that nobody has waited for")


class Launch:
    """What the programs of a launch share."""

    def __init__(self, assembly: Assembly) -> None:
        self.assembly, self.lock, self.begun = assembly, threading.Lock(), time.monotonic()
        self.failures: list[Exception] = []

    def check(self) -> None:
        """Of who waits for others: that they still may come."""
        if self.failures or time.monotonic() - self.begun > PATIENCE:
            raise RuntimeError("some wait for others that do not come")

    def run(self, tasks: Sequence[Callable[[], None]]) -> None:
        """Run ``tasks`` at once, and raise what the first of them raises."""

        def guarded(task: Callable[[], None]) -> None:
            try:
                task()
            except Exception as failure:
                self.failures.append(failure)

        threads = [threading.Thread(target=guarded, args=(task,)) for task in tasks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.failures:
            raise self.failures[0]


class Program:
    """One program of a launch."""

    def __init__(self, place: Sequence[int], grid: Sequence[int], launch: Launch) -> None:
        self.place, self.grid, self.launch = (*place, 0, 0), (*grid, 1, 1), launch
        self.changed = threading.Condition()
        self.waited = False  # one of its partitions has, for the kernel before

    def partition(self, run: Callable[..., None], arguments: Sequence[Any], warps: int, waited: bool) -> None:
        """Run what one partition of warps does, in the thread that this is called from."""
        here.program, here.warps, here.waited = self, warps, waited
        here.products, here.stores, here.copies = [], [], [[]]
        run(*arguments)
        self.waited |= here.waited
        if here.products or here.stores or any(here.copies):
            raise RuntimeError("a program ends while the matrix unit or the copy engine still reads its memory")


class mbarrier:
    MBarrierLayout = staticmethod(lambda *_: "barriers")

    @staticmethod
    def init(barrier: Barrier, count: int) -> None:
        barrier.count = barrier.missing = count

    @staticmethod
    def invalidate(barrier: Barrier) -> None:
        pass

    @staticmethod
    def expect(barrier: Barrier, size: int, pred: Any = True) -> None:
        if pred:
            barrier.arrive(1, size)

    @staticmethod
    def arrive(barrier: Barrier, *, count: int = 1, pred: Any = True) -> None:
        if pred:
            barrier.arrive(count)

    @staticmethod
    def wait(barrier: Barrier, phase: int, pred: Any = True, deps: Any = ()) -> None:
        if pred:
            barrier.wait(phase)


class tma:
    @staticmethod
    def async_copy_global_to_shared(
        source: Descriptor, corner: Sequence[int], barrier: Barrier, target: Shared, pred: Any = True
    ) -> None:
        if not pred:
            return
        tensor, outer, inner = source.box(corner)
        if target.at.numel() != math.prod(source.host.block_shape):
            raise RuntimeError(f"a box of {source.host.block_shape} for a place of {list(target.shape)}")
        target.spoil()

        def copy() -> int:
            box = torch.zeros(source.host.block_shape, dtype=tensor.dtype)
            box[inner] = tensor[outer]
            target.store(box.view(target.shape))
            return source.block_type.nbytes  # type: ignore[no-any-return]

        with here.program.changed:
            barrier.waited |= here.waited
            barrier.copies.append(copy)
            here.program.changed.notify_all()

    @staticmethod
    def async_copy_shared_to_global(target: Descriptor, corner: Sequence[int], source: Shared) -> None:
        tensor, outer, inner = target.box(corner)
        here.stores.append(lambda: tensor.__setitem__(outer, source.load().view(target.host.block_shape)[inner]))

    @staticmethod
    def store_wait(pendings: int) -> None:
        while len(here.stores) > pendings:
            here.stores.pop(0)()


class async_copy:
    @staticmethod
    def async_copy_global_to_shared(target: Shared, source: Pointer, mask: Any = None) -> None:
        memory, at = source.memory(mask)
        target.spoil()
        inside = torch.as_tensor(True if mask is None else mask)
        here.copies[-1].append(lambda: target.store(torch.where(inside, memory[at], torch.zeros_like(memory[at]))))

    @staticmethod
    def commit_group() -> None:
        here.copies.append([])

    @staticmethod
    def wait_group(num_outstanding: int) -> None:
        """Of what has been committed all but the last groups; the last of ``here.copies`` has not been."""
        while len(here.copies) - 1 > num_outstanding:
            for copy in here.copies.pop(0):
                copy()


def mma_v2(a: Any, b: Any, acc: Any) -> Any:
    return acc + (a.double() @ b.double()).to(acc.dtype)


def warpgroup_mma(a: Any, b: Shared, acc: Any, *, use_acc: Any = True, is_async: bool = False, **_: Any) -> Any:
    product = Sum(a, b, acc, bool(use_acc))
    here.products.append(product)
    return product if is_async else warpgroup_mma_wait(0, [product])


def warpgroup_mma_wait(num_outstanding: int = 0, deps: Sequence[Any] = ()) -> Any:
    while len(here.products) > num_outstanding:
        here.products.pop(0).take()
    done = tuple(each.result if isinstance(each, Sum) and each.result is not None else each for each in deps)
    return done[0] if len(done) == 1 else done


class language:
    """Of ``gl`` and ``tl`` what the kernels use."""

    int8, int16, int32, int64, float16, bfloat16, float32, float8e4nv = TYPES
    constexpr = staticmethod(lambda x: x)
    static_range, range = staticmethod(range), staticmethod(numbers)
    cdiv = staticmethod(lambda a, b: (a + b - 1) // b)
    debug_barrier = staticmethod(lambda: None)
    convert_layout = staticmethod(lambda x, *_, **__: x)
    cast = staticmethod(lambda x, type: x.to(type) if isinstance(x, Tensor) else x)
    pointer_type = staticmethod(lambda type: type)
    NVMMADistributedLayout = SliceLayout = BlockedLayout = DotOperandLayout = staticmethod(lambda *_, **__: None)
    SwizzledSharedLayout = staticmethod(lambda *_, **__: None)
    program_id = staticmethod(lambda axis: Number(here.program.place[axis]))
    num_programs = staticmethod(lambda axis: Number(here.program.grid[axis]))
    num_warps = staticmethod(lambda: here.warps)
    arange = staticmethod(lambda start, end, layout=None: value(torch.arange(start, end)))
    full = staticmethod(lambda shape, x, type, layout=None: value(torch.full(tuple(shape), x, dtype=dtype_of(type))))
    zeros = staticmethod(lambda shape, type, layout=None: value(torch.zeros(tuple(shape), dtype=dtype_of(type))))
    full_like, zeros_like = staticmethod(torch.full_like), staticmethod(torch.zeros_like)
    join = staticmethod(lambda a, b: torch.stack([a, b], -1))
    rsqrt = staticmethod(torch.rsqrt)
    div_rn = staticmethod(lambda a, b: a / b)
    exp2 = staticmethod(torch.exp2)
    abs = staticmethod(torch.abs)
    sum = staticmethod(lambda x, axis: plain(x.sum(axis)))
    max = staticmethod(lambda x, axis: plain(x.amax(axis)))
    broadcast = staticmethod(lambda a, b: torch.broadcast_tensors(a, b))

    @staticmethod
    def minimum(a: Any, b: Any) -> Any:
        return language.where(torch.as_tensor(a <= b), a, b) if isinstance(a <= b, Tensor) else min(a, b)

    @staticmethod
    def maximum(a: Any, b: Any) -> Any:
        return language.where(torch.as_tensor(a >= b), a, b) if isinstance(a >= b, Tensor) else max(a, b)

    @staticmethod
    def where(condition: Any, a: Any, b: Any) -> Any:
        return torch.where(condition, a, b) if isinstance(condition, Tensor) else a if condition else b

    @staticmethod
    def load(pointer: Pointer, mask: Any = None, other: Any = 0, **_: Any) -> Any:
        memory, at = pointer.memory(mask)
        found = memory[at]
        return plain(
            found if mask is None else torch.where(torch.as_tensor(mask), found, torch.tensor(other).to(found))
        )

    @staticmethod
    def store(pointer: Pointer, x: Any, mask: Any = None) -> None:
        memory, at = pointer.memory(mask)
        at, x, inside = torch.broadcast_tensors(at, torch.as_tensor(x), torch.as_tensor(True if mask is None else mask))
        memory[at[inside]] = x[inside].to(memory.dtype)

    @staticmethod
    def allocate_shared_memory(dtype: Any, shape: Sequence[int], layout: Any) -> Any:
        if layout == "barriers":
            return Barriers([Barrier(here.program) for _ in range(shape[0])])
        dtype = dtype_of(dtype)
        return Shared(noise((math.prod(shape),), dtype), places(shape, dtype, layout), layout)

    @staticmethod
    def atomic_add(pointer: Pointer, number: int, sem: str) -> int:
        """Who adds nothing is looking whether others have."""
        memory, at = pointer.memory(None)
        with here.program.launch.lock:
            before = int(memory[at])
            memory[at] += number
        if number == 0:
            time.sleep(1e-3)
            here.program.launch.check()
        return before

    @staticmethod
    def warp_specialize(parts: Sequence[tuple[Any, Sequence[Any]]], warps: Sequence[int], _: Sequence[int]) -> None:
        program, waited, own = here.program, here.waited, (here.warps, *warps)
        program.launch.run([partial(program.partition, *part, n, waited) for part, n in zip(parts, own, strict=True)])
        here.waited |= program.waited

    @staticmethod
    def inline_asm_elementwise(asm: str, constraints: str, args: Sequence[Any], **_: Any) -> Any:
        return here.program.launch.assembly[asm](*args)


def plain(x: Tensor) -> Any:
    """A number by itself as Python's: it may be an index."""
    number = x.item() if x.dim() == 0 else None
    return value(x) if number is None else Number(number) if type(number) is int else number


class Interpreter:
    """Functions of Triton and Gluon as plain Python, by what their modules call them."""

    def __init__(self) -> None:
        self.functions: dict[int, Callable[..., Any]] = {}
        self.modules: dict[int, dict[str, Any]] = {}

    def function(self, jit: Any) -> Callable[..., Any]:
        if id(jit) not in self.functions:
            names = jit.fn.__globals__
            if id(names) not in self.modules:
                self.modules[id(names)] = {name: self.translate(each) for name, each in names.items()} | {
                    "range": numbers
                }
            self.functions[id(jit)] = FunctionType(jit.fn.__code__, self.modules[id(names)], jit.fn.__name__)
        return self.functions[id(jit)]

    def translate(self, each: Any) -> Any:
        if each is pdl_triton.wait:
            return lambda _: setattr(here, "waited", True)
        if isinstance(each, JITFunction):
            return lambda *arguments, **named: self.function(each)(*arguments, **named)
        if isinstance(each, ConstexprFunction):
            return each.fn
        if isinstance(each, gl.constexpr):
            return each.value
        if each is gl or each is tl:
            return language
        ours = {
            id(hopper.mbarrier): mbarrier, id(hopper.tma): tma, id(hopper.warpgroup_mma): warpgroup_mma,
            id(hopper.warpgroup_mma_wait): warpgroup_mma_wait, id(hopper.fence_async_shared): lambda: None,
            id(ampere.async_copy): async_copy, id(ampere.mma_v2): mma_v2,
        }  # fmt: skip
        return ours.get(id(each), each)


@dataclass
class Kernel:
    """A kernel that is launched as Triton's are.

    constants  arguments that no kernel before writes
    assembly   what inline assembly does, by its text
    together   all programs are there at once, as they wait for each other
    """

    jit: Any
    interpreter: Interpreter
    constants: Sequence[str]
    assembly: Assembly
    together: bool

    def __getitem__(self, grid: Sequence[int]) -> Callable[..., None]:
        def start(*arguments: Any, **named: Any) -> None:
            warps = named["num_warps"]
            named = {name: each for name, each in named.items() if name not in OPTIONS}
            signature = inspect.signature(self.jit.fn)
            bound = signature.bind(*arguments, **named).arguments
            wrapped = [
                each if "constexpr" in str(signature.parameters[name].annotation) else self.wrap(name, each)
                for name, each in bound.items()
            ]
            launch, run = Launch(self.assembly), self.interpreter.function(self.jit)
            programs = [Program(place, grid, launch) for place in itertools.product(*map(range, grid))]
            tasks = [partial(program.partition, run, wrapped, warps, False) for program in programs]
            for together in [tasks] if self.together else [[task] for task in tasks]:
                launch.run(together)

        return start

    def wrap(self, name: str, each: Any) -> Any:
        constant = name in self.constants
        if isinstance(each, TensorDescriptor):
            return Descriptor(each, constant)
        if isinstance(each, Tensor):
            return Pointer(each, constant)
        return Number(each) if type(each) is int else each


@contextmanager
def interpreted(
    kernels: Mapping[str, ModuleType],
    constants: Sequence[str],
    assembly: Assembly | None = None,
    together: bool = False,
) -> Iterator[None]:
    """Run ``kernels``, by name and module, here; see ``Kernel``."""
    interpreter = Interpreter()
    with ExitStack() as patches:
        for name, module in kernels.items():
            kernel = Kernel(getattr(module, name), interpreter, constants, assembly or {}, together)
            patches.enter_context(mock.patch.object(module, name, kernel))
        yield
