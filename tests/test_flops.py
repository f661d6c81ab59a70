"""The operations that a batch needs, against what PyTorch counts in the passes of a real one."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSequenceClassification, LlamaConfig, MambaConfig, MambaForCausalLM
from watch import watch

from klq_fast import flops, options
from klq_fast.batch import PER_TOKEN, Rollout
from klq_fast.config import Config
from klq_fast.data import Prompt
from klq_fast.flops import needed_flops, peak_flops, throughput
from klq_fast.klq import KLQ
from klq_fast.models import Policy, load_policy, load_tokenizer
from klq_fast.rollout import TRAIN_STREAM, Generator

CPU = torch.device("cpu")
ROWS, PROMPT, RESPONSE = 3, 11, 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flops")
    for make in (tiny.neox, tiny.llama, tiny.gpt2, tiny.neox_reward, tiny.distilbert_reward):
        make(folder / make.__name__)
    return folder


def rollout() -> Rollout:
    return Rollout(
        prompt_tokens=torch.randint(200, (ROWS, PROMPT)),
        prompt_lengths=torch.full((ROWS,), PROMPT),
        response_tokens=torch.randint(200, (ROWS, RESPONSE)),
        response_lengths=torch.full((ROWS,), RESPONSE),
        ended=torch.zeros(ROWS, dtype=torch.bool),
        **{name: torch.randn(ROWS, RESPONSE) for name in PER_TOKEN},
    )


def counted(work: Callable[[], Any], tokens: int = PROMPT + RESPONSE - 1) -> float:
    """Matrix products, those inside our operators too, as the profiler sees them; and attention's, of which causality
    needs n·(n + 1)/2 of n² pairs of tokens."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    attention = counter.get_flop_counts()["Global"][torch.ops.aten.bmm]
    return watch(work).flops + attention * (tokens + 1) / (2 * tokens)


@pytest.mark.parametrize("name", ["neox", "llama", "gpt2"])
def test_log_probs_and_update_need_what_they_take(folder: Path, name: str) -> None:
    config, batch = Config(temperature=1.0), rollout()
    policy, loss = load_policy(str(folder / name), 1.0, CPU), KLQ.from_config(config).loss
    needed = needed_flops(policy, None, epochs=4)([PROMPT] * ROWS, [RESPONSE] * ROWS)

    def forward() -> None:
        with torch.no_grad():
            policy(batch)

    def update() -> None:
        policy(batch, loss, float(batch.num_tokens)).loss.backward()

    # 1%: the value head is left out, D of the V·D and more that a response token costs.
    assert needed["logprobs"] == pytest.approx(2 * counted(forward), rel=0.01)
    assert needed["update"] == pytest.approx(4 * counted(update), rel=0.01)
    if name == "neox":
        options.prepared(policy, Config(freeze_head=True))
        policy.zero_grad()
        frozen = needed_flops(policy, None, epochs=4)([PROMPT] * ROWS, [RESPONSE] * ROWS)
        assert frozen["update"] == pytest.approx(4 * counted(update), rel=0.01)
        assert frozen["update"] < 0.95 * needed["update"]


def test_rollout_needs_a_pass_over_all_tokens(folder: Path) -> None:
    """But for attention, which a step makes to the whole cache."""
    policy, tokenizer = load_policy(str(folder / "neox"), 1.0, CPU), load_tokenizer("policy", str(folder / "neox"))
    generator = Generator(policy, tokenizer, lambda *args: torch.zeros(ROWS), RESPONSE, 0.0, seed=0)
    prompts = [Prompt("", list(range(2, 2 + PROMPT)), None)] * ROWS
    found: list[Rollout] = []
    products = watch(lambda: found.append(generator.respond(prompts, range(ROWS), TRAIN_STREAM))).flops
    lengths = [PROMPT] * ROWS, found[0].response_lengths.tolist()
    assert lengths[1] == [RESPONSE] * ROWS  # none ended early
    batch = rollout()
    with torch.no_grad():
        forward = watch(lambda: policy(batch)).flops  # with the value head, as above
    assert products == pytest.approx(forward, rel=0.01)
    passed = counted(lambda: policy(batch))
    assert needed_flops(policy, None, epochs=1)(*lengths)["rollout"] == pytest.approx(passed, rel=0.01)


@pytest.mark.parametrize(("name", "tolerance"), [("neox_reward", 0.01), ("distilbert_reward", 0.1)])
def test_scores_need_a_pass_of_the_reward_model(folder: Path, name: str, tolerance: float) -> None:
    """DistilBERT attends both ways, and so to twice as many pairs as are counted: 7% of this small one."""
    model = AutoModelForSequenceClassification.from_pretrained(folder / name).eval()
    model.config.pad_token_id = 0  # causal classifiers look for it
    policy, tokens = load_policy(str(folder / "neox"), 1.0, CPU), torch.full((ROWS, PROMPT + RESPONSE), 9)

    def score() -> None:
        with torch.no_grad():
            model(input_ids=tokens, attention_mask=torch.ones_like(tokens))

    needed = needed_flops(policy, model, epochs=1)([PROMPT] * ROWS, [RESPONSE] * ROWS)
    assert needed["score"] == pytest.approx(counted(score, PROMPT + RESPONSE), rel=tolerance)
    assert needed_flops(policy, None, epochs=1)([PROMPT], [RESPONSE])["score"] == 0


def test_rows_of_any_length_add_up(folder: Path) -> None:
    needed = needed_flops(load_policy(str(folder / "neox"), 1.0, CPU), None, epochs=2)
    together, parts = needed([5, 9, 1], [3, 1, 6]), [needed([p], [r]) for p, r in ((5, 3), (9, 1), (1, 6))]
    assert together == {phase: sum(part[phase] for part in parts) for phase in together}


def test_layers_without_attention_heads_make_no_products_of_pairs() -> None:
    """Mamba's take as much of a token whatever its row's length; of a hybrid's layers those that attend count."""
    tiny_mamba = MambaConfig(vocab_size=272, hidden_size=32, num_hidden_layers=2, state_size=8)
    policy = Policy(MambaForCausalLM(tiny_mamba).eval(), 1.0)
    batch = rollout()
    needed = needed_flops(policy, None, epochs=1)
    two, one = needed([10, 20], [5, 5]), needed([31], [10])  # 14 + 24 tokens pass, and 40
    of_head = 2 * 10 * policy.model.get_output_embeddings().weight.numel()
    assert (two["rollout"] - of_head) / 38 == (one["rollout"] - of_head) / 40
    assert needed([PROMPT] * ROWS, [RESPONSE] * ROWS)["rollout"] == pytest.approx(
        counted(lambda: policy(batch)), rel=0.1
    )
    hybrid: dict[str, Any] = {"num_attention_heads": 2, "head_dim": 16, "num_hidden_layers": 3}
    for attending in (1, 2):
        hybrid["layer_types"] = ["full_attention"] * attending + ["linear_attention"] * (3 - attending)
        assert flops._attention(LlamaConfig(**hybrid)) == 4 * 32 * attending


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),  # an eighth of one
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GeForce RTX 3090", None),
        ("cpu", None),
    ],
)
def test_peaks_of_devices(name: str, tera: float | None) -> None:
    assert peak_flops(name) == (None if tera is None else tera * 1e12)


def test_utilization_is_what_is_needed_of_what_the_devices_can(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load_policy(str(folder / "neox"), 1.0, CPU)
    config = Config(epochs=2, reward_model=str(folder / "neox_reward"))
    lengths: Any = SimpleNamespace(prompt_lengths=torch.tensor([5, 9]), response_lengths=torch.tensor([3, 1]))
    model = AutoModelForSequenceClassification.from_pretrained(folder / "neox_reward")
    needed = needed_flops(policy, model, epochs=2)([5, 9], [3, 1])
    record = {"seconds": 4.0, "update_seconds": 2.0}
    plain = throughput(policy, config, devices=8)(lengths, record)
    expected = {"tokens_per_second": 18 / 4.0, "tflops_per_device": sum(needed.values()) / 4.0 / 8 / 1e12}
    assert plain == pytest.approx(expected)
    monkeypatch.setattr(flops, "peak_flops", lambda name: 5e6)
    shares = {"mfu": sum(needed.values()) / 4.0 / (8 * 5e6), "update_mfu": needed["update"] / 2.0 / (8 * 5e6)}
    assert throughput(policy, config, devices=8)(lengths, record) == pytest.approx(expected | shares)
