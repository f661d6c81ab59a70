"""The budget's arithmetic against a model's own operations; the comparison with TRL: its stand-ins and its tables."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

from benchmarks import budget, train_step

SIZE = train_step.Size("2 layers", 2, 32, 2, 128, rows=16, longest_prompt=32, response=8, microbatch=4, trl_rollout=16)


def neox(layers: int, hidden: int, heads: int, vocab: int, **more: Any) -> GPTNeoXForCausalLM:
    config = GPTNeoXConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )
    with torch.device("meta"):
        return GPTNeoXForCausalLM._from_config(config, **more)


def test_parameters_are_those_of_the_model() -> None:
    model = neox(16, 2048, 8, 50304)
    assert budget.PYTHIA_1B.parameters == sum(p.numel() for p in model.parameters()) == 1_011_781_632
    trunk, embedding = model.base_model, model.get_parameter("gpt_neox.embed_in.weight").numel()
    assert budget.PYTHIA_1B.trunk == sum(p.numel() for p in trunk.parameters()) - embedding


def test_operations_are_those_of_the_model() -> None:
    """Counted by PyTorch in a forward and backward pass. Causal attention is half of what its products count."""
    shape, rows, length = budget.Model(layers=3, hidden=64, vocab=384), 2, 48
    model = neox(3, 64, 4, 384, attn_implementation="eager")
    tokens = torch.zeros(rows, length, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter:
        model.base_model(input_ids=tokens)  # type: ignore[operator]
    attention = 2 * rows * length * length * 64 * 3
    # Some releases of transformers make the rotation's angles by a matrix product: 192 operations of 32 million.
    expected = shape.trunk_flops(rows * length, length) + attention
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-5)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens).logits.sum().backward()  # type: ignore[operator]
    forward = shape.trunk_flops(rows * length, length) + attention + shape.head_flops(rows * length)
    assert counter.get_total_flops() == pytest.approx(3 * forward, rel=1e-5)


def test_batch_is_the_sum_of_its_passes() -> None:
    """Four epochs of three passes, and one each for score, policy and reference, of real tokens; TRL's on padded ones,
    with a value model. Sizes without padding and without a prompt's own pass make the two easy to state."""
    model, batch = budget.Model(2, 64, 1024), budget.Batch(rows=4, prompt=20, longest=20, response=10)
    trunk, head = model.trunk_flops(120, 30), model.head_flops(40)
    ours, theirs = budget.flops(model, batch), budget.trl_flops(model, batch)
    assert sum(ours.values()) == ours["prefill"] + ours["decode"] + (1 + 2 + 12) * trunk + (2 + 12) * head
    assert theirs["update"] == 12 * (2 * trunk + model.head_flops(120))
    assert theirs["prefill"] == ours["prefill"] == model.trunk_flops(80, 20) + model.head_flops(4)


def test_more_gpus_share_work_and_memory() -> None:
    one, eight = (budget.seconds(budget.PYTHIA_1B, budget.TLDR, budget.A100, gpus) for gpus in (1, 8))
    assert one["communication"] == 0 < eight["communication"]
    for phase in ("score", "log-probs"):
        assert eight[phase] == pytest.approx(one[phase] / 8)
    assert 1 < eight["update"] / (one["update"] / 8) < 1.05  # five microbatches' gradients are summed, not eight's
    assert one["rollout"] / 8 < eight["rollout"] < one["rollout"] / 3  # every GPU reads all weights in every step
    most = [budget.most(budget.memory(budget.PYTHIA_1B, budget.TLDR, gpus)) for gpus in budget.GPUS]
    assert most == sorted(most, reverse=True)


def test_tables_stand_in_the_document() -> None:
    document = (Path(__file__).parents[1] / "docs" / "budget.md").read_text(encoding="utf-8")
    for table in budget.tables().split("\n\n"):
        assert table in document, "docs/budget.md is not what `python -m benchmarks.train_step --predict` prints"


def test_stand_ins_answer_at_full_length_and_read_their_answers_back(tmp_path: Path) -> None:
    train_step.make_stand_ins(SIZE, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "policy", dtype=torch.float64)
    rows = json.loads((tmp_path / "prompts" / "tokens.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "prompts" / "train.jsonl").read_text().splitlines()]
    assert tokenizer([line["prompt"] for line in lines])["input_ids"] == rows
    assert [len(row) for row in rows] == train_step.prompt_lengths(SIZE)
    assert max(map(len, rows)) == SIZE.longest_prompt and min(map(len, rows)) >= 100 / 512 * 32

    tokens = torch.tensor([row[:6] for row in rows])
    assert tokenizer(tokenizer.batch_decode(tokens))["input_ids"] == tokens.tolist()
    probabilities = (model(tokens).logits / 0.7).softmax(-1)
    special = probabilities[..., [tokenizer.eos_token_id, tokenizer.pad_token_id]]
    assert special.max() < 1e-15  # in the 20,000 tokens of a GPU's batch and 10,000 batches never
    assert probabilities[..., 2:].std() > 0.1 / SIZE.vocab  # and the others differ


def test_prompt_lengths_are_like_tldr_s() -> None:
    lengths = train_step.prompt_lengths(train_step.PYTHIA_1B)
    assert len(lengths) == 192 and min(lengths) >= 100 and max(lengths) == 512
    assert 300 < sum(lengths) / 192 < 320


def run(seconds: float, mebibytes: int, **more: Any) -> dict[str, Any]:
    """A worker's result: three batches, the first slow."""
    return {
        "seconds": [9.0, seconds, seconds],
        "phases": {phase: [1.0, 0.25, 0.25] for phase in train_step.PHASES},
        "steps": 12,
        "response_tokens": [128] * 3,
        "eos": [0] * 3,
        "loss": [0.5] * 3,
        "kl": [0.0, 0.1, 0.2],
        "moved": 1e-5,
        "import_bytes": 400 * 2**20,
        "peak_bytes": mebibytes * 2**20,
        "end_peak_bytes": (mebibytes + 9) * 2**20,
        "cpu_seconds": [20.0, 21.0, 22.0],
        "versions": {},
        **more,
    }


def entry(**runs: list[dict[str, Any]]) -> dict[str, Any]:
    numbered = {name: [each | {"round": i} for i, each in enumerate(done)] for name, done in runs.items()}
    found: dict[str, Any] = {"size": vars(SIZE), "device": "cpu", "runs": numbered, "missed": []}
    return found | {"wrong": train_step.wrong_runs(found)}


def test_table_says_how_much_faster_and_leaner() -> None:
    """Ratios are of the rounds, whose machine may have been slower: 2 and 4 here, not the medians' 6 / 2."""
    found = entry(klq=[run(1, 100), run(3, 100)], trl=[run(2, 200), run(12, 400)])
    assert not found["wrong"]
    figures = train_step.figures(found, "klq")
    assert figures["speed"] == {"median": 3, "min": 2, "max": 4}
    assert figures["less_memory"] == {"median": 0.375, "min": 0.25, "max": 0.5}
    assert figures["rate"] == SIZE.rows / 2 and figures["first"]["median"] == 9
    ours, trl = train_step.lines(found)
    assert ours[0] == "klq_fast, KLQ" and ours[1].startswith("2.000 (1.000 to 3.000); first 9") and trl[-1] == ""
    assert any(
        "2 times TRL's speed: kept; at most 0.6 of its memory: kept" in line for line in train_step.remarks(found)
    )


def test_what_was_not_measured_is_said() -> None:
    found = entry(klq=[run(1, 100)])
    assert train_step.lines(found)[1][:2] == ["TRL 1.12.0, PPO", "not measured yet"]
    page = train_step.markdown(
        {"machine": {"device": "CPU", "command": "…"}, "rounds": 1, "batches": 3, "sizes": [found]}
    )
    assert page.count("not measured yet") == 2  # TRL, and the GPU


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"steps": 11}, "optimizer steps"),
        ({"response_tokens": [128, 127, 128]}, "response tokens"),
        ({"eos": [0, 1, 0]}, "end-of-sequence tokens"),
        ({"loss": [0.5, float("nan"), 0.5]}, "losses that are numbers"),
        ({"moved": 0.0}, "moved weights"),
        ({"kl": [1e-6, 0.0, 0.0]}, "KL of 0"),
    ],
)
def test_run_that_did_other_work_is_found(wrong: dict[str, Any], what: str) -> None:
    (problem,) = entry(klq=[run(1, 100, **wrong)])["wrong"]
    assert what in problem and "klq_fast, KLQ" in problem


def test_disagreement_with_trl_is_found() -> None:
    found = entry(klq=[run(1, 100)], trl=[run(2, 200)]) | {"check": {"logprobs": 1e-6, "scores": 0.1}}
    (problem,) = train_step.wrong_runs(found)
    assert "scores of TRL's first batch" in problem


def test_our_loop_is_watched(tmp_path: Path) -> None:
    """One process of ours, as the comparison runs it."""
    train_step.make_stand_ins(SIZE, tmp_path)
    options = SimpleNamespace(threads=1, batches=2)
    spec = train_step.specification("ppo", SIZE, "cpu", options, tmp_path, record=False)  # type: ignore[arg-type]
    found = train_step.run_worker(spec)
    assert found is not None
    assert train_step.wrong_runs({"size": vars(SIZE), "device": "cpu", "runs": {"ppo": [found]}}) == []
    assert found["steps"] == 8 and found["moved"] < 1e-3
    assert 2**20 < found["peak_bytes"] <= found["end_peak_bytes"] < 2**30
    for batch in range(2):
        phases = [found["phases"][phase][batch] for phase in train_step.PHASES]
        assert all(phase > 0 for phase in phases) and sum(phases) <= found["seconds"][batch]
