"""Compiles every Triton kernel, in every configuration the public operations choose, for sm_80, sm_90 and sm_100.

    python -m benchmarks.compile_report

No GPU is needed. The public operations run on small CPU tensors with impl="triton", while a launch of a kernel is
recorded instead of carried out, once for each target: what Triton's own binder makes of the arguments (types,
constants, divisibility by 16) and the options. Whatever differs is compiled once, as for the GPU, and the log of
NVIDIA's assembler gives registers, stack and spills. (So what is launched must depend on tensors' dtypes and shapes
alone, never on the device.)

Exits with 1 where a kernel spills registers, has a stack frame, needs more shared memory than an SM has, does not
compile, or is launched by no operation.
"""

import argparse
import contextlib
import io
import itertools
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

import klq_fast
from klq_fast.kernels import checks
from klq_fast.kernels.lambda_returns.op import lambda_returns_with_metrics

# Shared memory a block can have: CUDA C++ programming guide, table of compute capabilities.
SHARED_MEMORY = {80: 163 * 2**10, 90: 227 * 2**10, 100: 227 * 2**10}
PROCESSES = min(8, len(os.sched_getaffinity(0)))  # compilations at a time; each takes a core and some 300 MiB

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The smallest, two that are no multiple of 16, those of Pythia, Llama 3, Qwen 2.5 and Gemma 2.
VOCABS = (2, 1001, 50257, 50304, 128256, 152064, 256000)


class Launch(NamedTuple):
    """One kernel, specialised: what triton.compile takes."""

    kernel: JITFunction
    capability: int
    signature: dict[str, str]
    constexprs: dict[tuple[int, ...], Any]
    attrs: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    def describe(self) -> str:
        """The specialisation in words, the same for every target."""
        names = list(self.signature)
        constants = {names[path[0]]: value for path, value in self.constexprs.items()}
        pointers = [f"{name} {kind[1:]}" for name, kind in self.signature.items() if kind.startswith("*")]
        aligned = [names[path[0]] for path, attr in self.attrs.items() if attr]
        return ", ".join(
            [
                *pointers,
                *(f"{name}={value}" for name, value in constants.items()),
                f"{self.options['num_warps']} warps, {self.options['num_stages']} stages",
                f"÷16: {' '.join(aligned)}" if aligned else "nothing ÷16",
            ]
        )


class Usage(NamedTuple):
    """What ptxas says of a kernel, per thread, and its shared memory per block; all bytes but `registers`."""

    registers: int
    stack: int
    spills: int
    shared: int

    def __str__(self) -> str:
        shared = f"{self.shared / 2**10:5.1f} KiB shared"
        return f"{self.registers:3d} registers, {self.stack:4d} B stack, {self.spills:4d} B spilled, {shared}"

    def fault(self, capability: int) -> bool:
        return self.spills > 0 or self.stack > 0 or self.shared > SHARED_MEMORY[capability]


def find_kernels() -> set[JITFunction]:
    """The @triton.jit functions of kernels/*/kernel.py that no other of them calls."""
    functions: set[JITFunction] = set()
    for path in sorted((Path(__file__).parents[1] / "kernels").glob("*/kernel.py")):
        module = import_module(f"klq_fast.kernels.{path.parent.name}.kernel")
        functions |= {each for each in vars(module).values() if isinstance(each, JITFunction)}
    called = {id(each.fn.__globals__.get(name)) for each in functions for name in each.fn.__code__.co_names}
    return {each for each in functions if id(each) not in called}


@contextlib.contextmanager
def recorded_launches() -> Iterator[dict[str, Launch]]:
    """Inside, a launch fills the dictionary and does nothing else; the operations take impl="triton" on CPU tensors."""
    launches: dict[str, Launch] = {}
    targets = {capability: GPUTarget("cuda", capability, 32) for capability in SHARED_MEMORY}
    backends = {capability: make_backend(target) for capability, target in targets.items()}
    binders: dict[tuple[int, int], Any] = {}

    def record(self: JITFunction, *args, grid, warmup, **kwargs) -> None:
        for capability, backend in backends.items():
            key = id(self), capability
            if key not in binders:
                binders[key] = create_function_from_signature(self.signature, self.params, backend)
            bound, specialization, options = binders[key](*args, **kwargs)
            packed = self._pack_args(backend, kwargs, bound, specialization, options)
            launch = Launch(self, capability, packed[1], packed[2], packed[3], packed[0].__dict__)
            launches.setdefault(f"{capability} {id(self)} {packed[1:]} {launch.options}", launch)

    run, interpreted = JITFunction.run, checks._interpreted
    JITFunction.run, checks._interpreted = record, lambda: True
    try:
        yield launches
    finally:
        JITFunction.run, checks._interpreted = run, interpreted


def call_every_operation() -> None:
    """Every public operation that has a kernel, forward and backward, over the options that kernels can depend on."""
    torch.manual_seed(0)
    for dtype, vocab in itertools.product(DTYPES, VOCABS):
        call_from_logits(dtype, vocab)
    pairs = [*((dtype, dtype) for dtype in DTYPES), (torch.bfloat16, torch.float32)]
    for (hidden, weight), vocab, options in itertools.product(pairs, VOCABS, HEAD_OPTIONS):
        call_from_hidden(hidden, weight, vocab, **options)
    for tokens, mask in itertools.product((1, 3, 16), (False, True)):
        call_from_logprobs(tokens, mask)
    for shape, flags in itertools.product(SCAN_SHAPES, itertools.product((False, True), repeat=4)):
        # 16-bit inputs differ by their loads alone: there, all options or none.
        for dtype in DTYPES if len(set(flags)) == 1 else DTYPES[:1]:
            call_scan(dtype, *shape, *flags)


HEAD_OPTIONS: tuple[dict[str, bool], ...] = (
    {},
    {"bias": True},
    {"softcap": True},
    {"bias": True, "softcap": True, "mask": True},
    {"frozen_weight": True},
    {"frozen_hidden": True},
)
SCAN_SHAPES = ((1, 1), (2, 16), (16, 53), (5, 1000), (4, 1024), (3, 5000))


def call_from_logits(dtype: torch.dtype, vocab: int) -> None:
    tokens = torch.randint(vocab, (3,))
    wide = torch.randn(3, 2, vocab, dtype=dtype)  # wide[:, 0] has rows that are further apart than they are long
    for logits in (wide[:, 0].contiguous(), wide[:, 0]):
        policy = logits.detach().requires_grad_()
        klq_fast.logprobs(policy, tokens, impl="triton").sum().backward()
        klq_fast.logprobs(policy, tokens, inplace_backward=True, impl="triton").sum().backward()
        for reference in (logits.detach(), logits.float()):
            klq_fast.log_ratio(policy, reference, tokens, impl="triton").sum().backward()


def call_from_hidden(
    hidden_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    vocab: int,
    *,
    bias: bool = False,
    softcap: bool = False,
    mask: bool = False,
    frozen_hidden: bool = False,
    frozen_weight: bool = False,
) -> None:
    hidden = torch.randn(3, 8, dtype=hidden_dtype, requires_grad=not frozen_hidden)
    weight = torch.randn(vocab, 8, dtype=weight_dtype, requires_grad=not frozen_weight)
    tokens = torch.randint(vocab, (3,))
    targets = (*torch.randn(3, 3), torch.tensor([True, False, True]) if mask else None)
    options: dict[str, Any] = {
        "bias": torch.randn(vocab, dtype=weight_dtype, requires_grad=True) if bias else None,
        "softcap": 30.0 if softcap else None,
        "impl": "triton",
    }
    with torch.no_grad():
        klq_fast.linear_logprobs(hidden, weight, tokens, **options)
    klq_fast.linear_logprobs(hidden, weight, tokens, **options).sum().backward()
    klq_fast.linear_klq_loss(hidden, weight, tokens, *targets, tau=0.05, **options).loss.backward()


def call_from_logprobs(tokens: int, mask: bool) -> None:
    logprobs, ref_logprobs, values, returns = (torch.randn(tokens) for _ in range(4))
    targets = (ref_logprobs, values.requires_grad_(), returns, torch.ones(tokens, dtype=torch.bool) if mask else None)
    klq_fast.klq_loss(logprobs.requires_grad_(), *targets, tau=0.05, impl="triton").loss.backward()


def call_scan(dtype: torch.dtype, B: int, T: int, per_token: bool, mask: bool, bootstrap: bool, packed: bool) -> None:
    shape = (B * T,) if packed else (B, T)
    log_ratio, values = torch.randn(2, *shape).to(dtype)
    rewards = torch.randn(shape if per_token else (B,)).to(dtype)
    valid = torch.rand(shape) < 0.5 if mask else None
    options: dict[str, Any] = {
        "bootstrap": torch.randn(B).to(dtype) if bootstrap else None,
        "cu_seqlens": torch.arange(0, B * T + 1, T, dtype=torch.int32) if packed else None,
        "impl": "triton",
    }
    klq_fast.lambda_returns(log_ratio, values, rewards, valid, tau=0.05, **options)
    lambda_returns_with_metrics(log_ratio, values, rewards, valid, tau=0.05, **options)
    klq_fast.gae(rewards, values, valid, **options)


to_compile: list[Launch] = []  # known to the processes that compile, since they are forked: a kernel cannot be sent


def compile_number(number: int) -> Usage | str:
    """The usage of to_compile[number], or what the compiler said instead."""
    launch = to_compile[number]
    log = io.StringIO()
    source = ASTSource(launch.kernel, launch.signature, launch.constexprs, launch.attrs)
    try:
        with contextlib.redirect_stdout(log):
            compiled = triton.compile(source, GPUTarget("cuda", launch.capability, 32), options=launch.options)
    except Exception as error:  # whatever a compiler may raise: it goes into the report, and the others go on
        return f"{type(error).__name__}: {error}"
    text = log.getvalue()

    def most(pattern: str) -> int:
        return max(int(number) for number in re.findall(pattern, text))

    spills = most(r"(\d+) bytes spill stores") + most(r"(\d+) bytes spill loads")
    return Usage(most(r"Used (\d+) registers"), most(r"(\d+) bytes stack frame"), spills, compiled.metadata.shared)


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET is set, and interpreted kernels cannot be compiled: unset it")
    start = time.perf_counter()
    torch.set_num_threads(1)  # the tensors are small, and processes are forked below
    with recorded_launches() as recorded:
        call_every_operation()
    to_compile.extend(recorded.values())
    never = sorted(each.__name__ for each in find_kernels() - {launch.kernel for launch in to_compile})

    usages: list[Usage | str] = []
    with tempfile.TemporaryDirectory() as cache:
        knobs.cache.dir = cache  # a kernel from an older cache would come without its log
        knobs.nvidia.dump_ptxas_log = True
        with multiprocessing.get_context("fork").Pool(PROCESSES) as pool:
            for usage in pool.imap(compile_number, range(len(to_compile))):
                usages.append(usage)
                if sys.stderr.isatty() or len(usages) % 100 == 0:
                    end = "\r" if sys.stderr.isatty() else "\n"
                    print(f"{len(usages)} of {len(to_compile)} compiled", end=end, file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return print_report(to_compile, usages, never, time.perf_counter() - start)


def print_report(launches: list[Launch], usages: list[Usage | str], never: list[str], seconds: float) -> int:
    rows: dict[tuple[str, str], dict[int, Usage | str]] = {}
    for launch, usage in zip(launches, usages, strict=True):
        rows.setdefault((launch.kernel.__name__, launch.describe()), {})[launch.capability] = usage
    faults = [f"{name}: launched by no operation" for name in never] or ([] if launches else ["no kernel was found"])
    for name, group in itertools.groupby(sorted(rows.items(), key=lambda row: row[0]), key=lambda row: row[0][0]):
        print(f"\n{name}")
        for (_, specialisation), by_capability in group:
            print(f"  {specialisation}")
            for capability, usage in by_capability.items():
                print(f"    sm_{capability}: {usage}")
                if isinstance(usage, str) or usage.fault(capability):
                    faults.append(f"{name}, sm_{capability}: {usage}; {specialisation}")
    versions = f"Triton {triton.__version__}, PyTorch {torch.__version__}"
    print(f"\n{len(launches)} compiled in {seconds:.0f} s with {versions}.")
    for fault in faults:
        print(f"FAULT {fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
