"""One process of `python -m benchmarks.train_step`: a few batches of klq_fast's loop, or of TRL's PPO, watched.

    PYTHON benchmarks/train_step_worker.py SPECIFICATION.json

It runs under the Python that has TRL too, so it imports klq_fast only where that is what it runs. The specification is
what `train_step.specification` writes; the result goes to the file that it names.
"""

import gc
import importlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

PHASES = ("rollout", "score", "logprobs", "update")
PACKAGES = ("torch", "transformers", "accelerate", "trl", "flash-attn")

# What either loop loads on first use. Loaded beforehand, it counts as libraries, not as memory of the run.
MODULES = """torch._dynamo torch._inductor torch.distributed.tensor torch.distributed.fsdp torch.distributed.checkpoint
    safetensors.torch accelerate transformers.generation transformers.modeling_outputs
    transformers.models.auto.modeling_auto transformers.models.auto.tokenization_auto
    transformers.models.gpt_neox.modeling_gpt_neox fsspec.core matplotlib.pyplot matplotlib.backends.backend_agg"""


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    run = {"trl": trl_ppo, "check": check}.get(spec["contender"], klq_fast_loop)
    result = run(spec)
    result["versions"] = {name: version for name in PACKAGES if (version := version_of(name))}
    Path(spec["result"]).write_text(json.dumps(result), encoding="utf-8")


def klq_fast_loop(spec: dict[str, Any]) -> dict[str, Any]:
    """The command line's own function, as users call it; times and figures are those of its metrics.jsonl."""
    from klq_fast.train import main

    size, run = spec["size"], Path(spec["scratch"]) / "run"
    options = {
        "algorithm": spec["contender"],
        "policy": spec["policy"],
        "reward-model": spec["reward_model"],
        "dataset": spec["dataset"],
        "output-dir": run,
        "episodes": spec["batches"] * size["rows"],
        "batch-size": size["rows"],
        "prompt-length": size["longest_prompt"],
        "response-length": size["response"],
        "epochs": size["epochs"],
        "microbatch-tokens": spec["microbatch_tokens"],
        "missing-eos-penalty": 0,
        "threads": spec["threads"],
        "eval-every": 10**6,  # the two evaluations that every run makes, on one prompt, are outside of its batches
    }
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    with watched(spec) as result:
        main(["custom", *arguments])
    batches = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    result["seconds"] = [batch["seconds"] for batch in batches]
    result["phases"] = {phase: [batch.get(f"{phase}_seconds") for batch in batches] for phase in PHASES}
    result["loss"] = [batch["loss"] for batch in batches]
    result["score"] = [batch["score"] for batch in batches]
    result["kl"] = [batch["kl"] for batch in batches]
    result["response_tokens"] = [round(batch["response_length"] * size["rows"]) for batch in batches]
    result["eos"] = [round((1 - batch["no_eos"]) * size["rows"]) for batch in batches]
    result["peak_bytes"] = batches[-1]["peak_memory_bytes"] - held_before(result, spec)
    result["moved"] = largest_change(spec["policy"], run / "policy")
    return result


def trl_ppo(spec: dict[str, Any]) -> dict[str, Any]:
    """TRL's trainer as its users call it, timed from outside: nothing of it is changed but what is said here.

    For its own good: no activation checkpointing, no samples for show, no saving; microbatches of the size that was
    fastest; on CUDA bf16 autocast, TF32, and the frozen models in bf16. One fault is turned off, which would cost it
    time: on the last batch of a pass over the prompts (here on every batch) each microbatch would be a step.
    """
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer  # type: ignore[import-not-found]

    torch.set_num_threads(spec["threads"])
    size, cuda = spec["size"], spec["device"] == "cuda"
    arguments = PPOConfig(
        output_dir=str(Path(spec["scratch"]) / "trl"),
        total_episodes=spec["batches"] * size["rows"],
        per_device_train_batch_size=size["microbatch"],
        gradient_accumulation_steps=size["rows"] // size["microbatch"],
        num_mini_batches=1,
        num_ppo_epochs=size["epochs"],
        local_rollout_forward_batch_size=size["trl_rollout"],
        response_length=size["response"],
        stop_token="eos",
        missing_eos_penalty=None,
        temperature=0.7,
        kl_coef=0.05,
        learning_rate=1.41e-5,
        gradient_checkpointing=False,
        num_sample_generations=0,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=not cuda,
        bf16=cuda,
        tf32=True if cuda else None,
    )
    with watched(spec) as result:

        def load(auto: Any, name: str, frozen: bool) -> Any:
            return auto.from_pretrained(spec[name], dtype=torch.bfloat16 if frozen and cuda else torch.float32)

        rows = json.loads((Path(spec["dataset"]) / "tokens.json").read_text(encoding="utf-8"))
        prompts = Dataset.from_dict({"input_ids": rows})
        trainer = PPOTrainer(
            args=arguments,
            processing_class=AutoTokenizer.from_pretrained(spec["policy"], padding_side="left"),
            model=load(AutoModelForCausalLM, "policy", frozen=False),
            ref_model=load(AutoModelForCausalLM, "policy", frozen=True),
            reward_model=load(AutoModelForSequenceClassification, "reward_model", frozen=True),
            value_model=load(AutoModelForSequenceClassification, "reward_model", frozen=False),
            train_dataset=prompts,
            eval_dataset=prompts,
        )
        trainer.accelerator.gradient_state.plugin_kwargs["sync_with_dataloader"] = False
        times = watch_trl(trainer, ppo_trainer, result, spec)
        trainer.train()
    log = [entry for entry in trainer.state.log_history if "objective/kl" in entry]
    coefficient = arguments.vf_coef
    result["loss"] = [entry["loss/policy_avg"] + coefficient * entry["loss/value_avg"] for entry in log]
    result["score"] = [entry["objective/scores"] for entry in log]
    result["kl"] = [entry["objective/kl"] for entry in log]
    result["eos"] = [entry["val/num_eos_tokens"] for entry in log]
    result["seconds"] = times.pop("batch")
    result["phases"] = times
    trained = Path(spec["scratch"]) / "policy"
    trainer.policy_model.save_pretrained(trained)
    result["moved"] = largest_change(spec["policy"], trained)
    return result


def watch_trl(trainer: Any, module: Any, result: dict[str, Any], spec: dict[str, Any]) -> dict[str, list[float]]:
    """Times each phase of the trainer's loop by the functions that it calls; where asked to, keeps its first batch."""
    import torch
    from transformers import TrainerCallback

    times: dict[str, list[float]] = {name: [] for name in ("batch", *PHASES)}
    result["response_tokens"] = []
    spent = dict.fromkeys(PHASES, 0.0)
    since = {"batch": 0.0, "update": 0.0}

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.monotonic()

    seen: dict[str, list[Any]] = {}

    def see(name: str, value: Any) -> None:
        """Kept of the first batch alone, so that nothing lives longer in later ones than TRL lets it."""
        if spec["record"] and not times["batch"]:
            seen.setdefault(name, []).append(value)

    def wrap(name: str, phase_of: Callable[..., str | None], look: Callable[[Any, Any], None]) -> None:
        original = getattr(module, name)

        def call(*args: Any, **options: Any) -> Any:
            phase = phase_of(*args)
            started = now() if phase else 0.0  # no waiting for a GPU but where a phase begins or ends
            output = original(*args, **options)
            if phase:
                spent[phase] += now() - started
            look(args, output)
            return output

        setattr(module, name, call)

    def look_at_generation(args: Any, output: Any) -> None:
        see("context_length", args[1].shape[1])
        see("query_responses", output[0])

    def look_at_scores(args: Any, output: Any) -> None:
        if args[0] is trainer.reward_model:
            see("scores", output[1])

    def look_at_logprobs(args: Any, output: Any) -> None:
        if not output.requires_grad:  # in turn the policy's and the reference's, of some rows each
            see("logprobs", output)

    def look_at_whitening(args: Any, output: Any) -> None:
        """Everything after the advantages' whitening is the update."""
        since["update"] = now()
        result["response_tokens"].append(int(args[1].sum()))
        if seen:
            logprobs, rows = seen.pop("logprobs"), {"query_responses", "scores"}
            first = {name: torch.cat(values) if name in rows else values[0] for name, values in seen.items()}
            first |= {"logprobs": torch.cat(logprobs[::2]), "ref_logprobs": torch.cat(logprobs[1::2])}
            torch.save(first, spec["record"])
            seen.clear()

    wrap("batch_generation", lambda *_: "rollout", look_at_generation)
    wrap("get_reward", lambda model, *_: "score" if model is trainer.reward_model else None, look_at_scores)
    wrap("selective_log_softmax", lambda *_: None, look_at_logprobs)
    wrap("masked_whiten", lambda *_: None, look_at_whitening)

    class Batches(TrainerCallback):
        def on_train_begin(self, *args: Any, **options: Any) -> None:
            since["batch"] = now()

        def on_step_end(self, *args: Any, **options: Any) -> None:
            end = now()
            spent["update"] = end - since["update"]
            # What is neither generation nor scoring before the update: reference, values, rewards, advantages.
            spent["logprobs"] = since["update"] - since["batch"] - spent["rollout"] - spent["score"]
            times["batch"].append(end - since["batch"])
            for phase in PHASES:
                times[phase].append(spent[phase])
                spent[phase] = 0.0
            result["peak_bytes"] = peak_memory(spec) - held_before(result, spec)
            since["batch"] = now()

    trainer.add_callback(Batches())
    return times


def check(spec: dict[str, Any]) -> dict[str, Any]:
    """klq_fast's log-probs and scores of the first batch that TRL answered, against TRL's own."""
    import torch
    from transformers import AutoTokenizer

    from klq_fast.batch import Rollout
    from klq_fast.data import Prompt
    from klq_fast.models import load_reference
    from klq_fast.reward import load_reward
    from klq_fast.rollout import with_logprobs

    torch.set_num_threads(spec["threads"])
    device, limit = torch.device(spec["device"]), spec["microbatch_tokens"]
    found = torch.load(spec["record"], map_location=device)
    width = found["context_length"]
    prompt_tokens, response_tokens = found["query_responses"].split([width, spec["size"]["response"]], dim=1)
    tokenizer = AutoTokenizer.from_pretrained(spec["policy"])
    rows = len(prompt_tokens)
    rollout = Rollout(
        prompt_tokens=prompt_tokens,
        prompt_lengths=(prompt_tokens != tokenizer.pad_token_id).sum(1).cpu(),
        response_tokens=response_tokens,
        response_lengths=torch.full((rows,), response_tokens.shape[1]),
        ended=torch.zeros(rows, dtype=torch.bool),
    )
    policy = load_reference(spec["policy"], 0.7, device)  # in the precision in which the loop measures both
    rollout = with_logprobs(rollout, policy, policy, limit)
    texts = tokenizer.batch_decode(prompt_tokens, skip_special_tokens=True)
    prompts = [Prompt(text, tokenizer(text)["input_ids"]) for text in texts]
    answers = [f" {text}" for text in tokenizer.batch_decode(response_tokens)]
    scores = load_reward(None, spec["reward_model"], device, limit)(prompts, answers, [False] * rows)

    def error(ours: Any, theirs: Any) -> float:
        return (ours.float().cpu() - theirs.float().cpu()).abs().max().item()

    return {
        "logprobs": error(rollout.logprobs, found["logprobs"]),
        "ref_logprobs": error(rollout.ref_logprobs, found["ref_logprobs"]),
        "scores": error(scores, found["scores"]),
    }


@contextmanager
def watched(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Counts optimizer steps, and the memory that the block adds to what the imported libraries take."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    for name in MODULES.split():
        if importlib.util.find_spec(name.split(".")[0]):
            importlib.import_module(name)
    result: dict[str, Any] = {"steps": 0, "cpu_seconds": []}

    def count(*_: Any) -> None:
        result["steps"] += 1
        if result["steps"] % spec["size"]["epochs"] == 0:  # the processor's time up to the end of each batch
            result["cpu_seconds"].append(time.process_time())

    hook = register_optimizer_step_post_hook(count)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew (man 5 proc)
    result["import_bytes"] = memory("VmRSS")
    yield result
    hook.remove()
    result["end_peak_bytes"] = peak_memory(spec) - held_before(result, spec)


def peak_memory(spec: dict[str, Any]) -> int:
    """The most bytes so far: resident on a CPU, allocated on a GPU."""
    import torch

    return torch.cuda.max_memory_allocated() if spec["device"] == "cuda" else memory("VmHWM")


def held_before(result: dict[str, Any], spec: dict[str, Any]) -> int:
    """What the libraries hold before a run begins, of which a GPU has nothing."""
    return 0 if spec["device"] == "cuda" else result["import_bytes"]


def memory(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def largest_change(before: str, after: Path) -> float:
    """The most that a weight has moved between two folders."""
    from safetensors.torch import load_file

    old, new = (load_file(Path(folder) / "model.safetensors") for folder in (before, after))
    return max((new[name].float() - tensor.float()).abs().max().item() for name, tensor in old.items())


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
