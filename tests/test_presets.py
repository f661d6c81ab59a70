"""The paper's tasks, each from its preset to a trained policy, on stand-ins: models of the same architectures with the
same habits of tokenizers and heads, and datasets of the same columns. What is expected is written by hand."""

import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import datasets
import huggingface_hub
import pytest
import tiny
import torch
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import (
    AutoModelForCausalLM,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GenerationConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from klq_fast import hub, reward
from klq_fast.config import Config
from klq_fast.data import Prompt
from klq_fast.models import load_policy, load_tokenizer
from klq_fast.presets import PRESETS, parse_command_line
from klq_fast.reward import Reward
from klq_fast.train import main

PAPER = ("imdb", "tldr", "hh")
VOCAB, WIDTH, POSITIONS = 320, 32, 640
LENGTH = 53  # of a response, in each of the three
ALPHABET = " ok"  # with the end-of-sequence token, all that the stand-ins' policies write


@pytest.fixture(autouse=True)
def _without_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever this machine's network: nobody listens on port 9, and nothing is in the caches. Nor is anything tried
    again: the library waits in between, for 23 s a file."""

    def wait(seconds: float) -> None:
        raise AssertionError(f"it waits {seconds} s to try again")

    monkeypatch.setattr(time, "sleep", wait)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    hub.hub_answers.cache_clear()
    yield
    hub.hub_answers.cache_clear()


# Stand-ins. Policies write letters of ALPHABET, whatever they read, and an end one time in 60: so that what they write
# can be read, and about as many of 53 tokens end by themselves as do not.


def only_writes(model: Any, tokenizer: PreTrainedTokenizerFast) -> Any:
    letters = tokenizer(ALPHABET, add_special_tokens=False)["input_ids"]
    logits = torch.full((VOCAB,), -50.0)
    logits[letters] = 0.0
    logits[tokenizer.eos_token_id] = -2.1  # at temperature 0.7: exp(-3) of a letter's probability
    with torch.no_grad():
        if isinstance(model, LlamaForCausalLM):
            # The head is the embedding: where its first column outweighs the others, the norm makes of that √32 · 5.
            model.model.embed_tokens.weight[:, 0] = 3 + logits / (5 * WIDTH**0.5)
            model.model.norm.weight.copy_(torch.eye(WIDTH)[0] * 5)
        else:
            model.base_model.final_layer_norm.weight.zero_()
            model.base_model.final_layer_norm.bias.copy_(torch.eye(WIDTH)[0])
            model.get_output_embeddings().weight[:, 0] = logits
    return model


def save(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def neox_config(**more: Any) -> GPTNeoXConfig:
    return GPTNeoXConfig(
        vocab_size=VOCAB,  # with rows that no token has, as Pythia's 50,304 for 50,277
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=POSITIONS,
        bos_token_id=0,
        eos_token_id=0,
        hidden_dropout=0.5,
        attention_dropout=0.5,
        **more,
    )


def neox_tokenizer(pad: bool) -> PreTrainedTokenizerFast:
    """<|endoftext|> is token 0; a [PAD] was put behind the vocabulary, in a row that the embeddings have already."""
    tokenizer = tiny.byte_tokenizer(eos_token="<|endoftext|>")
    tokenizer.bos_token = "<|endoftext|>"
    if pad:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    return tokenizer


def make_tldr(folder: Path) -> None:
    tokenizer = neox_tokenizer(pad=True)
    save(folder / "policy", only_writes(GPTNeoXForCausalLM(neox_config()), tokenizer), tokenizer)
    save(folder / "reward-model", GPTNeoXForSequenceClassification(neox_config(num_labels=1)), tokenizer)
    rows = [{"prompt": prompt, "completion": " a summary"} for prompt in TLDR_ROWS]
    DatasetDict(
        train=Dataset.from_list(rows[:4]), validation=Dataset.from_list(rows[4:]), test=Dataset.from_list(UNREAD)
    ).save_to_disk(folder / "dataset")


def make_hh(folder: Path) -> None:
    """GPT-2 with learned positions and no pad token; the dialogues in folders, gzipped, as in hh-rlhf."""
    tokenizer = neox_tokenizer(pad=False)
    save(folder / "policy", only_writes(GPTNeoXForCausalLM(neox_config()), tokenizer), tokenizer)
    gpt2 = GPT2Config(  # type: ignore[call-arg]  # num_labels is any configuration's
        vocab_size=VOCAB, n_positions=POSITIONS, n_embd=WIDTH, n_layer=2, n_head=2, eos_token_id=0, num_labels=1
    )
    save(folder / "reward-model", GPT2ForSequenceClassification(gpt2), tiny.byte_tokenizer(eos_token="<|endoftext|>"))
    for name, rows in (
        ("harmless-base/train", HH_ROWS[:2]),
        ("helpful-base/train", HH_ROWS[2:4]),
        ("helpful-base/test", HH_ROWS[4:]),
        ("red-team-attempts/red_team_attempts", [{"transcript": "\n\nHuman: a\n\nAssistant: b"}]),
    ):
        path = folder / "dataset" / f"{name}.jsonl.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_list(rows).to_json(path, compression="gzip")


def make_imdb(folder: Path) -> None:
    """Llama-3.2's tied embeddings, <|begin_of_text|> before every text, no pad token, and a generation config."""
    tokenizer = tiny.byte_tokenizer(bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        attention_dropout=0.5,
    )
    policy = only_writes(LlamaForCausalLM(config), tokenizer)
    policy.generation_config = GenerationConfig(
        bos_token_id=0, eos_token_id=1, do_sample=True, temperature=0.6, top_p=0.9
    )
    save(folder / "policy", policy, tokenizer)

    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *"abcdefghijklmnopqrstuvwxyz",
        *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"),
    ]
    pieces = Tokenizer(models.WordPiece(vocab={word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    pieces.normalizer = normalizers.BertNormalizer()
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    reader = PreTrainedTokenizerFast(
        tokenizer_object=pieces,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=512,
    )
    classifier = DistilBertConfig(  # type: ignore[call-arg]
        vocab_size=len(words), dim=WIDTH, n_layers=2, n_heads=2, hidden_dim=64, num_labels=2
    )
    save(folder / "reward-model", DistilBertForSequenceClassification(classifier), reader)
    (folder / "dataset" / "plain_text").mkdir(parents=True)
    for split, rows in (("train", IMDB_ROWS[:4]), ("test", IMDB_ROWS[4:]), ("unsupervised", IMDB_ROWS[:1])):
        Dataset.from_list(rows).to_parquet(folder / "dataset" / "plain_text" / f"{split}-00000-of-00001.parquet")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("presets")
    torch.manual_seed(0)
    for name, make in (("tldr", make_tldr), ("hh", make_hh), ("imdb", make_imdb)):
        make(folder / name)
    return folder


# Records, and the prompts that they are to become: a token is a byte, and prompts have up to 512 (IMDb's 8).

HEAD = "SUBREDDIT: r/relationships\n\nTITLE: My [20M] dog\n\nPOST: "
LINES = [f"Line {i} of a post that is far too long for the prompt." for i in range(10)]  # of 53
TLDR_ROWS = [
    f"{HEAD}Short.\n\nTL;DR:",
    f"{HEAD}{chr(10).join(LINES)}\n\nTL;DR:",  # 602
    f"{HEAD}{'x' * 800}\n\nTL;DR:",  # no line break in the post
    f"{HEAD}One.\n\nTwo, with a café.\n\nTL;DR:",
    f"{HEAD}Held out.\n\nTL;DR:",
    f"{HEAD}Held out too.\n\nTL;DR:",
]
TLDR_PROMPTS = [
    TLDR_ROWS[0],
    # 55 of the head, 8 of the cue, 8 lines of 53 and 7 breaks between them: 494, and another line would not fit.
    f"{HEAD}{chr(10).join(LINES[:8])}\n\nTL;DR:",
    f"{HEAD}{'x' * (512 - 55 - 8)}\n\nTL;DR:",
    *TLDR_ROWS[3:],
]
UNREAD = [{"prompt": "of the test split, which nobody asked for", "completion": ""}]

OLD = "\n\nHuman: Tell me everything." + "\n\nAssistant: " + "blah " * 50  # 292
KEPT = "\n\nHuman: More." + "\n\nAssistant: " + "blah " * 85  # 453
HH_PROMPTS = [
    "\n\nHuman: Who is it?\n\nAssistant:",
    "\n\nHuman: What's 2+2?\n\nAssistant: 4.\n\nHuman: Sure?\n\nAssistant:",
    f"{KEPT}\n\nHuman: And then?\n\nAssistant:",  # 484, and with one turn more 776
    '\n\nHuman: Say "Assistant:" once.\n\nAssistant:',
    "\n\nHuman: Held out?\n\nAssistant:",
    "\n\nHuman: Held out too?\n\nAssistant:",
]
HH_ROWS = [
    {"chosen": f"{before}{prompt} The chosen answer.", "rejected": f"{before}{prompt} The other one."}
    for before, prompt in zip(["", "", OLD, "", "", ""], HH_PROMPTS, strict=True)
]

IMDB_ROWS = [
    {"text": "I rented this film.<br /><br />It is bad.", "label": 0},
    {"text": "A café in Paris, and a thief.", "label": 1},
    {"text": "Dull é", "label": 0},  # 7 bytes: all of it
    {"text": "Awful!é, or: a film.", "label": 0},  # the last one is half of é
    {"text": "Held out, and bad.", "label": 0},
    {"text": "Good, and held out.", "label": 1},
]
IMDB_PROMPTS = ["I rente", "A café", "Dull é", "Awful!", "Held ou", "Good, a"]  # seven bytes behind <|begin_of_text|>

PROMPTS = {"tldr": TLDR_PROMPTS, "hh": HH_PROMPTS, "imdb": IMDB_PROMPTS}


# A run of each.


@dataclass
class Ran:
    preset: str
    folder: Path
    asked: list[tuple[str, str, bool]] = field(default_factory=list)  # prompt, response, ended: what was to be scored
    read: list[list[int]] = field(default_factory=list)  # tokens, without padding: what the reward model read
    scores: dict[tuple[str, str, bool], float] = field(default_factory=dict)  # what it said, before any shift
    steps: list[tuple[str, float, float]] = field(default_factory=list)  # optimizer, eps, learning rate of each step

    def config(self) -> Config:
        return Config.from_yaml((self.folder / "config.yaml").read_text(encoding="utf-8"))


def arguments(folder: Path, preset: str) -> list[str]:
    return [f"--{name}={folder / preset / name}" for name in ("policy", "reward-model", "dataset")]


@pytest.fixture(scope="module", params=PAPER)
def ran(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Two batches of four: each of the four prompts is answered twice, the two held out at each of 3 evaluations."""
    run = Ran(request.param, tmp_path_factory.mktemp("run") / request.param)
    original = reward.reward_from_model

    def watched(model: PreTrainedModel, *args: Any, **settings: Any) -> Reward:
        def look(module: nn.Module, args: Any, inputs: dict[str, Tensor]) -> None:
            for tokens, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
                run.read.append(tokens[mask.bool()].tolist())

        model.register_forward_pre_hook(look, with_kwargs=True)
        score = original(model, *args, **settings)

        def ask(prompts: Sequence[Prompt], responses: Sequence[str], ended: Sequence[bool]) -> Tensor:
            rows = list(zip((p.text for p in prompts), responses, ended, strict=True))
            scores = score(prompts, responses, ended)
            run.asked.extend(rows)
            run.scores.update(zip(rows, scores.tolist(), strict=True))
            return scores

        return ask

    def step(optimizer: Any, *_: Any) -> None:
        (group,) = optimizer.param_groups
        run.steps.append((type(optimizer).__name__, group["eps"], float(group["lr"])))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reward, "reward_from_model", watched)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        hook = register_optimizer_step_pre_hook(step)
        sizes = "--episodes 8 --batch-size 4 --eval-every 1 --threads 1".split()
        main([run.preset, *arguments(folder, run.preset), f"--output-dir={run.folder}", *sizes])
        hook.remove()
    return run


def test_each_prompt_is_as_the_task_writes_it(ran: Ran) -> None:
    """Trained on: each once a pass. Held out: the validation split, or test where there is none; and nothing else."""
    train, heldout = PROMPTS[ran.preset][:4], PROMPTS[ran.preset][4:]
    asked = [prompt for prompt, _, _ in ran.asked]
    assert {prompt: asked.count(prompt) for prompt in train} == dict.fromkeys(train, 2)
    assert set(asked) == {*train, *heldout}
    assert [asked.count(prompt) for prompt in heldout] in ([3, 3], [4, 4])  # and once more where a shift is measured


def test_the_reward_model_reads_the_task_s_text(ran: Ran, folder: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / ran.preset / "reward-model")
    if ran.preset == "imdb":  # as pieces of its own
        expected = [tokenizer(prompt + response)["input_ids"] for prompt, response, _ in ran.asked]
        assert all(row[0] == 2 and row[-1] == 3 for row in ran.read)
        assert sorted(ran.read) == sorted(expected)
    else:  # 0 is <|endoftext|>
        texts = [tokenizer.decode(row) for row in ran.read]
        end = "<|endoftext|>" if ran.preset == "tldr" else ""
        assert sorted(texts) == sorted(prompt + response + end * ended for prompt, response, ended in ran.asked)
        assert all((row[-1] == 0) == text.endswith("<|endoftext|>") for row, text in zip(ran.read, texts, strict=True))


def test_a_response_ends_at_the_task_s_stop_token(ran: Ran) -> None:
    """A letter is a token: what ended has fewer than 53 letters, and holds no special token; what did not has all."""
    assert {ended for _, _, ended in ran.asked} == {True, False}
    for _, response, ended in ran.asked:
        assert set(response) <= set(ALPHABET)
        assert len(response) < LENGTH if ended else len(response) == LENGTH


def test_the_policy_starts_as_its_reference_and_keeps_its_size(ran: Ran, folder: Path) -> None:
    """Exactly: dropout, which its config has at 0.5, is off. No token was added for padding; settings of generation are
    the policy's own again."""
    assert tiny.read_jsonl(ran.folder / "metrics.jsonl")[0]["kl"] == 0.0
    places = (folder / ran.preset / "policy", ran.folder / "policy")
    before, after = (AutoModelForCausalLM.from_pretrained(place) for place in places)
    assert before.config.vocab_size == after.config.vocab_size == after.get_input_embeddings().num_embeddings == VOCAB
    assert before.generation_config.to_diff_dict() == after.generation_config.to_diff_dict()
    own, kept = (PreTrainedTokenizerFast.from_pretrained(place) for place in places)
    assert own.pad_token == kept.pad_token == {"tldr": "[PAD]", "hh": None, "imdb": None}[ran.preset]
    assert len(own) == len(kept)


def test_the_optimizer_s_settings(ran: Ran) -> None:
    """Two batches of 4 epochs, each with one minibatch: Adam with eps 1e-5 and a rate that falls linearly to 0."""
    assert ran.steps == [("Adam", 1e-5, pytest.approx(1.41e-5 * (1 - i / 8))) for i in range(8)]


def test_scores_are_shifted_where_the_task_says_so(ran: Ran) -> None:
    """So that the policy's mean on held-out prompts is 0 before training; the number stays with the run."""
    heldout = [row for row in ran.asked if row[0] in PROMPTS[ran.preset][4:]]
    mean = sum(ran.scores[row] for row in heldout[:2]) / 2
    shift = ran.config().reward_shift
    assert shift == (pytest.approx(-mean, abs=1e-6) if ran.preset == "tldr" else 0.0)
    first = tiny.read_jsonl(ran.folder / "eval.jsonl")[0]
    assert first["score"] == pytest.approx(0.0 if ran.preset == "tldr" else mean, abs=1e-6)
    assert abs(mean) > 1e-3
    resumed = parse_command_line([ran.preset, "--reward-shift=reference", "--resume", f"--output-dir={ran.folder}"])
    assert resumed.reward_shift == shift


# Without the hub.


def output_of(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    """The command's exit status, what it says, and its errors."""
    try:
        main(args)
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    return status, *capsys.readouterr()


@pytest.mark.parametrize("preset", PAPER)
def test_a_dry_run_explains_what_it_cannot_load(capsys: pytest.CaptureFixture[str], preset: str) -> None:
    config = PRESETS[preset]()
    status, said, error = output_of(capsys, preset, "--dry-run")
    assert (status, error) == (0, "")
    column = {"imdb": "text", "tldr": "prompt", "hh": "chosen"}[preset]
    for words in (
        f"policy: {config.policy}, of the Hugging Face hub",
        f"reward-model: {config.reward_model}, of the Hugging Face hub",
        f"dataset: {config.dataset}, of the Hugging Face hub",
        f"the column {column} of the splits train",
        f"hf download {config.policy} --local-dir ./policy",
        f"hf download --repo-type dataset {config.dataset} --local-dir ./dataset",
        f"python -m klq_fast.train {preset} --policy ./policy --reward-model ./reward-model --dataset ./dataset",
    ):
        assert f"# {words}" in said or f"#     {words}" in said or words in said


@pytest.mark.parametrize("preset", PAPER)
def test_a_dry_run_on_folders_reads_the_prompts(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, preset: str
) -> None:
    run = tmp_path / "run"
    status, said, _ = output_of(capsys, preset, *arguments(folder, preset), f"--output-dir={run}", "--dry-run")
    assert status == 0 and not run.exists()
    cut = {"imdb": 5, "tldr": 2, "hh": 1}[preset]
    limit = 8 if preset == "imdb" else 512
    assert f"4 prompts, 2 held out, {cut} cut to {limit} tokens; the first: {PROMPTS[preset][0]!r}" in said
    assert f"dataset: {folder / preset / 'dataset'}, on this machine" in said


@pytest.mark.parametrize("missing", ["policy", "reward-model", "dataset"])
def test_a_run_without_the_hub_says_so_in_one_line(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, missing: str
) -> None:
    """The others are folders."""
    args = [argument for argument in arguments(folder, "tldr") if not argument.startswith(f"--{missing}=")]
    status, _, error = output_of(capsys, "tldr", *args, f"--output-dir={tmp_path / 'run'}")
    name = getattr(PRESETS["tldr"](), missing.replace("-", "_"))
    kind = "--repo-type dataset " if missing == "dataset" else ""
    assert status == 2 and error == (
        f"error: --{missing} {name}: there is no such folder, it is not in this machine's cache, and the hub "
        f"(http://127.0.0.1:9) does not answer; where it does, `hf download {kind}{name} --local-dir FOLDER` "
        f"makes a folder to give here: --{missing} FOLDER\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_hub_that_does_not_speak_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A firewall that swallows what is sent: it connects, and no answer ever comes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(hub, "SECONDS", 0.3)
        started = time.monotonic()
        assert not hub.hub_answers() and time.monotonic() - started < 10


def test_a_hub_that_answers_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it answers: here that there is no such page. What it does not have is then told as before."""

    class Empty(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(404)

        do_GET = do_HEAD

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Empty) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert hub.hub_answers() and not hub.only_here("someone/something")
        server.shutdown()


def test_what_is_in_the_cache_is_read_without_the_hub(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As downloads leave it: a folder of snapshots, and which of them is the main one."""
    cache = tmp_path / "hub" / "models--someone--policy"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0123abc")
    shutil.copytree(folder / "hh" / "policy", cache / "snapshots" / "0123abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert (
        load_tokenizer("policy", "someone/policy")("a")["input_ids"]
        == load_tokenizer("policy", str(folder / "hh" / "policy"))("a")["input_ids"]
    )
    policy = load_policy("someone/policy", 1.0, torch.device("cpu"))
    assert policy.model.config.vocab_size == VOCAB
