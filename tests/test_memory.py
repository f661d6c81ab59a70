"""The memory that --dry-run predicts against what is measured, and the options that save memory."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM, MixtralConfig
from watch import watch

from klq_fast import memory, options, plots
from klq_fast.batch import Rollout
from klq_fast.checkpoint import restore_checkpoint, save_checkpoint
from klq_fast.config import Config, InputError
from klq_fast.decode import cache_name, decode
from klq_fast.klq import KLQ
from klq_fast.metrics import read_lines
from klq_fast.models import Policy, load_policy
from klq_fast.ppo import PPO
from klq_fast.rollout import with_logprobs
from klq_fast.train import main

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    for make in (tiny.neox, tiny.llama, tiny.gpt2, tiny.neox_reward, tiny.distilbert_reward):
        make(folder / make.__name__)
    tiny.write_jsonl(folder / "prompts.jsonl", ({"prompt": f"prompt {i}:"} for i in range(20)))
    (folder / "memory_rewards.py").write_text(
        "calls = []\n"
        "def letter_a(prompts, responses):\n"
        "    return [10 * response.count('a') / (len(response) + 1) for response in responses]\n"
        "def fails_once(prompts, responses):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 4:\n"
        "        raise ConnectionError('the judge is away')\n"
        "    return letter_a(prompts, responses)\n"
        "def length(prompts, responses):\n"
        "    return [float(len(response)) for response in responses]\n"
    )
    return folder


@pytest.fixture(autouse=True)
def _importable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(folder))


def settings(**more: Any) -> Config:
    return Config(**{"temperature": 1.0, "learning_rate": 1e-3, "response_length": 6, **more})


def rollout(vocab: int, prompts: list[int], response_length: int = 6) -> Rollout:
    """Rows of random tokens, with random log-probs, values and targets."""
    count, generator = len(prompts), torch.Generator().manual_seed(1)

    def numbers() -> Tensor:
        return torch.randn(count, response_length, generator=generator)

    return Rollout(
        prompt_tokens=torch.randint(vocab, (count, max(prompts)), generator=generator),
        prompt_lengths=torch.tensor(prompts),
        response_tokens=torch.randint(vocab, (count, response_length), generator=generator),
        response_lengths=torch.full((count,), response_length),
        ended=torch.zeros(count, dtype=torch.bool),
        logprobs=-numbers().abs(),
        ref_logprobs=-numbers().abs(),
        values=numbers(),
        rewards=torch.randn(count, generator=generator),
        advantages=numbers(),
        returns=numbers(),
    )


def backward(policy: Policy, batch: Rollout, config: Config) -> None:
    loss = (KLQ if config.algorithm == "klq" else PPO).from_config(config).loss
    policy(batch, loss, float(batch.num_tokens)).loss.backward()


def gradients(policy: Policy) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    return found


# The prediction.


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 9 M parameters, beside which what the interpreter allocates is small, and prompts of 96 tokens."""
    folder = tmp_path_factory.mktemp("small")
    config = GPTNeoXConfig(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=0,
    )
    tokenizer = tiny.byte_tokenizer(eos_token="<|endoftext|>", pad_token="[PAD]")
    tiny._save(folder / "policy", GPTNeoXForCausalLM, config, tokenizer)
    tiny.write_jsonl(folder / "prompts.jsonl", ({"prompt": f"{i:3d} " + "x" * 92} for i in range(20)))
    return folder


# Makes the runs whose arguments come in lines, and says of each but the first by how much the most that was resident
# exceeds what was before. The first one is for what is imported, touched of libraries' files and cached by the way.
CHILD = """
import gc, json, sys
import torch
from klq_fast import plots, train

def resident(name):
    line = next(line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) * 1024

plots.draw = lambda run: None
results, sys.stdout = sys.stdout, sys.stderr
for line in sys.stdin:
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak is counted from here
    before = resident("VmRSS")
    train.main(json.loads(line))
    print(resident("VmHWM") - before, file=results)
"""


@pytest.mark.cpu
def test_the_predicted_peak_is_what_a_run_makes_resident(
    small: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    # glibc gives back what is freed of blocks from this size on, so that what is resident is what is in use.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(2**16))
    predicted, lines = [], ""
    for algorithm, rows, microbatch_tokens in (("klq", 1, 128), ("klq", 4, 128), ("ppo", 4, 512)):
        values: dict[str, Any] = {
            "policy": str(small / "policy"),
            "dataset": str(small / "prompts.jsonl"),
            "reward": "memory_rewards:length",
            "algorithm": algorithm,
            "microbatch_tokens": microbatch_tokens,
            "batch_size": rows,
            "episodes": rows,
            "epochs": 2,  # in the second step Adam has its state
            "prompt_length": 96,
            "response_length": 32,
            "temperature": 1.0,
            "eval_prompts": 1,
        }
        predicted.append(memory.predict(Config(**values), [96] * rows, device="CPU").peak)
        given = [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
        run = tmp_path / f"run{len(predicted)}"
        lines += json.dumps(["custom", *given, "--threads=1", f"--output-dir={run}"]) + "\n"
    child = subprocess.run([sys.executable, "-c", CHILD], input=lines, capture_output=True, text=True)
    measured = [int(line) for line in child.stdout.split()]
    assert len(measured) == 3, child.stderr
    # Python's own objects, and what libraries' allocators keep: 1 to 3 MiB of 195 and 212. The first run also has some
    # 40 of libraries' code and tables, which are the same for any model.
    assert measured[1:] == pytest.approx(predicted[1:], rel=0.03)
    assert predicted[2] > 1.08 * predicted[1]  # the microbatch matters by more than that


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("algorithm", "option"),
    [("klq", ""), ("ppo", ""), ("klq", "activation_checkpointing"), ("klq", "lora_rank"), ("klq", "freeze_head")],
)
def test_the_predicted_update_is_what_pytorch_allocates(small: Path, algorithm: str, option: str) -> None:
    """The same microbatches with numbers, counted by PyTorch's profiler."""
    config = settings(
        algorithm=algorithm,
        policy=str(small / "policy"),
        batch_size=6,
        microbatch_tokens=330,
        response_length=16,
        **({option: 8 if option == "lora_rank" else True} if option else {}),
    )
    prompts = [60, 70, 80, 80, 90, 96]
    needs = memory.predict(config, prompts, device="CPU")
    policy = options.prepared(load_policy(str(small / "policy"), 1.0, CPU), config)
    if config.activation_checkpointing:
        options.checkpoint_activations(policy.model)
    optimizer = options.adam(policy, config)

    def update() -> list[Tensor]:
        for rows in ([80, 90, 96], [60, 70, 80]):
            backward(policy, rollout(8192, rows, 16), config)
        optimizer.step()
        grads = [p.grad for p in policy.parameters() if p.grad is not None]
        return grads

    update()  # Adam's state is made in the first step
    optimizer.zero_grad()
    peak = watch(update).peak
    stays = needs.parameters + needs.optimizer + needs.reference
    # What operators take and free inside of themselves does not show on the meta device.
    assert needs.update - stays == pytest.approx(peak, rel=0.01)


@pytest.mark.cpu
@pytest.mark.parametrize("max_tokens", [200, 2000])
def test_the_predicted_rollout_and_log_probs_are_what_pytorch_allocates(small: Path, max_tokens: int) -> None:
    """Prompts are read in parts of 200 tokens, or together."""
    prompts, length = [60, 70, 80, 80, 90, 96], 16
    config = settings(policy=str(small / "policy"), batch_size=6, microbatch_tokens=max_tokens, response_length=length)
    needs = memory.predict(config, prompts, device="CPU")
    policy, batch = load_policy(str(small / "policy"), 1.0, CPU), rollout(8192, prompts, length)
    numbers = torch.rand(6, length, dtype=torch.float64)

    def answer() -> object:
        return decode(policy, batch.prompt_tokens, batch.prompt_lengths, length, [], 0, numbers, max_tokens)

    def measure() -> object:
        return with_logprobs(batch, policy, policy, max_tokens)

    stays = needs.parameters + needs.optimizer + needs.reference
    assert needs.rollout - stays == pytest.approx(watch(answer).peak, rel=0.01)
    assert needs.logprobs - stays == pytest.approx(watch(measure).peak, rel=0.01)


def test_only_a_config_is_read(tmp_path: Path, small: Path) -> None:
    text = (small / "policy" / "config.json").read_text()
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "config.json").write_text(text)
    config = settings(policy=str(tmp_path / "policy"))
    assert memory.predict(config, device="CPU") == memory.predict(
        replace(config, policy=str(small / "policy")), device="CPU"
    )


def test_what_is_counted_by_parameters(folder: Path) -> None:
    """Of a model with an untied and one with a tied head: neox has 2·V·D in embedding and head, llama V·D once."""
    for name in ("neox", "llama"):
        config = settings(policy=str(folder / name), batch_size=4, reward_model=str(folder / "neox_reward"))
        size = sum(p.numel() for p in load_policy(str(folder / name), 1.0, CPU).parameters())
        cpu = memory.predict(config, [10] * 4, device="CPU")
        assert (cpu.parameters, cpu.gradients, cpu.optimizer) == (4 * size, 4 * size, 8 * size)
        assert cpu.reference == 4 * size
        # two layers, keys and values, of 32 numbers (llama: one key-value head of two), 4 rows of 10 + 6 tokens
        assert cpu.kv_cache == 2 * 2 * (16 if name == "llama" else 32) * 4 * 4 * 16
        gpu = memory.predict(config, [10] * 4, device="GPU", world_size=4)
        assert gpu.parameters == 4 * size // 4 + 2 * size
        assert (gpu.gradients, gpu.optimizer, gpu.reference) == (4 * size, 2 * size, 2 * size)
        assert gpu.reward_model == cpu.reward_model // 2
        adapted = options.prepared(load_policy(str(folder / name), 1.0, CPU), replace(config, lora_rank=2))
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        both = sum(p.numel() for p in adapted.parameters())
        # Frozen master weights are whole in each of several processes, and on the CPU beside a GPU.
        for device, count, masters, computing in (
            ("CPU", 1, 4 * both, 0),
            ("CPU", 2, 4 * (both - trained) + 4 * trained // 2, 4 * both),
            ("GPU", 4, 4 * trained // 4, 2 * both),
        ):
            lora = memory.predict(replace(config, lora_rank=2), [10] * 4, device=device, world_size=count)
            assert (lora.parameters, lora.reference) == (masters + computing, 0)
        assert memory.predict(replace(config, adam_8bit=True), [10] * 4, device="CPU").optimizer == int(
            2 * size * (1 + 4 / 256)
        )
        offloaded = memory.predict(replace(config, offload=True), [10] * 4, device="GPU", world_size=4)
        assert offloaded.update == gpu.update - gpu.reference - gpu.reward_model
        assert offloaded.logprobs == gpu.logprobs - gpu.reward_model
        plain = memory.predict(replace(config, reward_model=None), [10] * 4, device="GPU", world_size=4)
        assert plain.score == plain.parameters + plain.optimizer + plain.reference  # the cache is gone by then


def test_the_table_has_a_column_for_here_and_for_gpus(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = settings(policy=str(folder / "neox"), batch_size=8, reward_model=str(folder / "distilbert_reward"))
    lines = memory.table(config, [10, 20, 30])
    assert "2 CPUs" in lines[1] and "1 GPU" in lines[1] and "8 GPUs" in lines[1]
    names = {" ".join(line.split()[:-4]) for line in lines[2:-1]}
    assert {"parameters", "gradients", "optimizer", "reference", "reward model", "KV cache", "activations"} <= names
    assert {"kernel buffers", "rollout", "score", "logprobs", "update", "peak"} <= names


def test_a_dry_run_predicts_for_the_prompts_that_there_are(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 9 and 10 letters, and so of as many tokens; --prompt-length alone would allow 512."""
    names = {"policy": folder / "neox", "dataset": folder / "prompts.jsonl", "reward": "memory_rewards:length"}
    files = {option: str(name) for option, name in names.items()}
    given = [f"--{name}={value}" for name, value in files.items()]
    main(["custom", *given, "--batch-size=8", "--eval-prompts=1", f"--output-dir={tmp_path / 'run'}", "--dry-run"])
    said = capsys.readouterr().out.splitlines()
    config = Config(**files, batch_size=8)  # type: ignore[arg-type]
    lengths = [9] * 9 + [10] * 10  # "prompt 0:" and nine more, "prompt 10:" and nine more, less one held out
    for expected, there in ((lengths, True), ((), False)):
        (cache,) = [line for line in memory.table(config, expected) if "KV cache" in line]
        assert (f"# {cache}" in said) is there


def test_no_config_is_one_line(folder: Path, tmp_path: Path) -> None:
    (line,) = memory.table(settings(policy=str(tmp_path / "nowhere")))
    assert line.startswith("memory: not predicted: --policy: no config.json could be read from")


def test_a_model_that_the_meta_device_cannot_pass_is_one_line(tmp_path: Path) -> None:
    """It has no grouped product in float32, which mixtures of experts take on a CPU."""
    MixtralConfig(
        vocab_size=272,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
    ).save_pretrained(tmp_path)
    config = settings(policy=str(tmp_path), batch_size=2)
    with pytest.raises(NotImplementedError) as raised:
        memory.predict(config, [4, 4], device="CPU")
    assert isinstance(raised.value.__cause__, RuntimeError)
    (line,) = memory.table(config, [4, 4])
    assert line == f"memory: not predicted: {raised.value}" and "BF16" in line


# The options.


@pytest.mark.parametrize("name", ["neox", "llama", "gpt2"])
def test_activation_checkpointing_gives_identical_gradients(folder: Path, name: str) -> None:
    config, batch = settings(), rollout(250, [5, 9, 12])
    policy = load_policy(str(folder / name), 1.0, CPU)
    backward(policy, batch, config)
    expected = gradients(policy)
    without = watch(lambda: backward(policy, batch, config)).peak
    gradients(policy)
    options.checkpoint_activations(policy.model)
    backward(policy, batch, config)
    found = gradients(policy)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert watch(lambda: backward(policy, batch, config)).peak < without


def test_generation_is_not_checkpointed(folder: Path) -> None:
    policy = load_policy(str(folder / "neox"), 1.0, CPU)
    tokens = torch.arange(5)[None]
    expected = policy.model.generate(tokens, max_new_tokens=8, do_sample=False)  # type: ignore[operator]
    options.checkpoint_activations(policy.model)
    with torch.no_grad():
        output = policy.model(tokens, use_cache=True)
        assert getattr(output, cache_name(policy.model)).get_seq_length() == 5  # transformers' own would drop the cache
        found = policy.model.generate(tokens, max_new_tokens=8, do_sample=False)  # type: ignore[operator]
    assert torch.equal(found, expected)


def test_blocks_are_the_layers_and_not_their_experts() -> None:
    class Trunk(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = [nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(1, 1) for _ in range(5))}) for _ in range(3)]
            self.layers = nn.ModuleList(layer)

    model: Any = nn.Module()
    model.base_model = Trunk()
    assert options.blocks(model) == list(model.base_model.layers)


@pytest.mark.parametrize("name", ["neox", "llama", "gpt2"])
def test_lora_starts_as_its_reference_and_trains_adapters_alone(folder: Path, name: str) -> None:
    config, batch = settings(lora_rank=4, learning_rate=1e-2), rollout(250, [5, 9, 12])
    plain = load_policy(str(folder / name), 1.0, CPU)
    policy = options.prepared(load_policy(str(folder / name), 1.0, CPU), config)
    reference: Any = options.WithoutAdapters(policy)
    with torch.no_grad():
        start, _ = plain(batch)
        for model in (policy, reference):
            assert torch.equal(model(batch)[0], start)
    optimizer = options.adam(policy, config)
    state = dict(plain.model.state_dict())
    for _ in range(3):
        backward(policy, batch, config)
        optimizer.step()
        optimizer.zero_grad()
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert all(".lora_" in name or name.startswith("value_head.") for name in trained)
    assert sum(".lora_A." in name for name in trained) == 2 * 4 + 2 * 3 * (name == "llama")  # linear layers, 2 blocks
    with torch.no_grad():
        now, _ = policy(batch)
        assert (now - start).abs().max() > 1e-2
        assert torch.equal(reference(batch)[0], start)  # nothing of it has moved
        tokens = batch.prompt_tokens
        logits = policy.model(tokens).logits
        assert torch.equal(reference.model(tokens).logits, plain.model(tokens).logits)
        assert torch.equal(policy.model(tokens).logits, logits)  # the adapters are on again
        assert reference.temperature == 1.0 and reference.value_head.weight is policy.value_head.weight
        merged = options.merged(policy.model, policy.model.state_dict())
        assert merged.keys() == state.keys()
        plain.model.load_state_dict(merged)
        torch.testing.assert_close(plain.model(tokens).logits, logits, rtol=1e-4, atol=1e-5)  # W + s·B·A rounds once


def test_merging_without_adapters_changes_nothing(folder: Path) -> None:
    model = load_policy(str(folder / "neox"), 1.0, CPU).model
    state = model.state_dict()
    assert options.merged(model, state) == state


def test_every_rank_draws_the_same_adapters(folder: Path) -> None:
    def drawn(seed: int) -> Tensor:
        torch.manual_seed(torch.seed())  # whatever state the process is in
        policy = options.prepared(load_policy(str(folder / "neox"), 1.0, CPU), settings(lora_rank=4, seed=seed))
        return torch.cat([p.flatten() for name, p in policy.named_parameters() if ".lora_A." in name])

    assert torch.equal(drawn(3), drawn(3))
    assert not torch.equal(drawn(3), drawn(4))


def test_a_frozen_head_has_no_gradient_and_the_others_are_as_before(folder: Path) -> None:
    batch = rollout(250, [5, 9, 12])
    policy = load_policy(str(folder / "neox"), 1.0, CPU)
    backward(policy, batch, settings())
    expected = gradients(policy)
    backward(options.prepared(policy, settings(freeze_head=True)), batch, settings())
    found = gradients(policy)
    assert len(expected.keys() - found.keys()) == 1 and policy.model.get_output_embeddings().weight.grad is None
    assert all(torch.equal(found[key], expected[key]) for key in found)


def test_a_tied_head_cannot_be_frozen(folder: Path) -> None:
    with pytest.raises(InputError, match="--freeze-head: the head of LlamaForCausalLM is its input embedding too"):
        options.prepared(load_policy(str(folder / "llama"), 1.0, CPU), settings(freeze_head=True))


def test_8_bit_adam_moves_as_adam_does_in_a_quarter_of_its_memory(small: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="an extra, adam-8bit: importing it prints to every process's stderr")
    batch, policies = rollout(8192, [5, 9, 12]), {}
    for adam_8bit in (False, True):
        config = settings(adam_8bit=adam_8bit)
        policy = policies[adam_8bit] = load_policy(str(small / "policy"), 1.0, CPU)
        optimizer = options.adam(policy, config)
        for step in range(4):
            options.set_learning_rate(optimizer, 1e-3 / (1 + step))
            backward(policy, batch, config)
            optimizer.step()
            optimizer.zero_grad()
    before = torch.nn.utils.parameters_to_vector(load_policy(str(small / "policy"), 1.0, CPU).parameters())
    exact, rounded = (torch.nn.utils.parameters_to_vector(p.parameters()) - before for p in policies.values())
    # Each moment is rounded to 1 of 256 levels of its block: a few per cent of a step, and nothing of its direction.
    assert torch.nn.functional.cosine_similarity(exact, rounded, dim=0) > 0.98
    assert float(rounded.norm()) == pytest.approx(float(exact.norm()), rel=0.05)
    size = sum(p.numel() for p in policy.parameters())
    moments = [x for state in optimizer.state.values() for name, x in state.items() if name != "step"]
    held = sum(getattr(x, "codes", x).nbytes + getattr(x, "scale", torch.empty(0)).nbytes for x in moments)
    assert 2 * size <= held < 2.1 * size  # against 8 · size: two numbers of a byte, and the scales

    save_checkpoint(tmp_path, 4, policy, optimizer)
    other = load_policy(str(small / "policy"), 1.0, CPU)
    resumed = options.adam(other, config)
    assert restore_checkpoint(tmp_path, other, resumed) == 4
    for model, of in ((policy, optimizer), (other, resumed)):
        backward(model, batch, config)
        of.step()
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), other.parameters(), strict=True))


def test_a_model_is_on_the_device_while_it_is_used() -> None:
    """The meta device stands for a GPU: another device than the CPU, where the weights are to be afterwards."""
    model = nn.BatchNorm1d(3).requires_grad_(False)  # it has buffers too
    before = {name: x.clone() for name, x in model.state_dict().items()}
    places = {name: x.data_ptr() for name, x in model.state_dict().items()}
    with pytest.raises(KeyError), options.on_device(model, torch.device("meta")):
        assert {x.device.type for x in model.state_dict().values()} == {"meta"}
        raise KeyError
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name]) and x.data_ptr() == places[name]


@pytest.mark.cpu
def test_offload_without_a_gpu_is_refused() -> None:
    with pytest.raises(InputError, match="--offload: got no GPU here"):
        options.check(settings(offload=True))


@pytest.mark.parametrize(
    ("setting", "package", "extra"),
    [({"lora_rank": 4}, "peft", "lora"), ({"adam_8bit": True}, "torchao", "adam-8bit")],
)
def test_a_missing_package_is_named(
    setting: dict[str, Any], package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"needs {package} .*pip install \"klq_fast\[{extra}\]\""):
        options.check(settings(**setting))


# Whole runs.


def run(folder: Path, output: Path, *more: str, reward: str = "letter_a") -> list[dict[str, Any]]:
    main(
        f"custom --policy {folder / 'neox'} --dataset {folder / 'prompts.jsonl'} --reward memory_rewards:{reward} "
        f"--batch-size 8 --episodes 32 --response-length 6 --learning-rate 1e-2 --epochs 2 --eval-every 2 "
        f"--checkpoint-every 1 --output-dir {output}".split()
        + list(more)
    )
    return [{k: v for k, v in record.items() if k in ("batch", "score", "kl", "loss")} for record in lines(output)]


def lines(output: Path) -> Iterator[dict[str, Any]]:
    yield from read_lines(output / "metrics.jsonl")


OPTIONS = {
    "lora": ("--lora-rank", "4"),
    "frozen": ("--freeze-head", "--activation-checkpointing"),
    "8-bit": ("--adam-8bit",),
}


@pytest.mark.cpu
@pytest.mark.parametrize("case", OPTIONS)
def test_a_run_with_options_resumes_exactly_and_exports_a_plain_model(
    folder: Path, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import memory_rewards  # type: ignore[import-not-found]

    monkeypatch.setattr(plots, "draw", lambda run: None)  # it takes longer than these runs

    if case == "8-bit":
        pytest.importorskip("torchao")
    whole = run(folder, tmp_path / "whole", *OPTIONS[case])
    memory_rewards.calls.clear()
    with pytest.raises(SystemExit):
        run(folder, tmp_path / "parts", *OPTIONS[case], reward="fails_once")
    assert 0 < len(list(lines(tmp_path / "parts"))) < 4
    assert run(folder, tmp_path / "parts", *OPTIONS[case], "--resume", reward="fails_once") == whole
    assert whole[0]["kl"] == 0.0 and whole[-1]["kl"] != 0.0

    policies = [AutoModelForCausalLM.from_pretrained(tmp_path / of / "policy") for of in ("whole", "parts")]
    before = AutoModelForCausalLM.from_pretrained(folder / "neox").state_dict()
    states = [policy.state_dict() for policy in policies]
    assert states[0].keys() == states[1].keys() == before.keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in before)
    changed = {name for name in before if not torch.equal(states[0][name], before[name])}
    assert any(".mlp." in name for name in changed)
    heads = [
        AutoModelForCausalLM.from_pretrained(of).get_output_embeddings().weight
        for of in (tmp_path / "whole" / "policy", folder / "neox")
    ]
    assert torch.equal(*heads) is (case != "8-bit")
    AutoTokenizer.from_pretrained(tmp_path / "whole" / "policy")
