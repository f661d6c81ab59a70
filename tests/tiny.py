"""Models and tokenizers of the families that users bring, small enough to make in a moment, saved as folders."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
VOCAB = 272  # 256 bytes, special tokens, and rows of the head that no token has, as in Pythia


def byte_tokenizer(**special: Any) -> PreTrainedTokenizerFast:
    """A token a byte, after the special tokens given, such as eos_token="</s>"."""
    names = [value for name, value in special.items() if name.endswith("_token")]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*names, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def neox(folder: Path) -> Path:
    """GPT-NeoX with a pad token beside its end-of-sequence token."""
    tokenizer = byte_tokenizer(eos_token="<|endoftext|>", pad_token="[PAD]")
    return _save(folder, GPTNeoXForCausalLM, _neox_config(), tokenizer)


def llama(folder: Path) -> Path:
    """Llama with tied embeddings, a chat template, a beginning-of-sequence token and no pad token."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    tokenizer = byte_tokenizer(bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return _save(folder, LlamaForCausalLM, config, tokenizer)


def gpt2(folder: Path) -> Path:
    """GPT-2: learned absolute positions, dropout in its config, no pad token."""
    return _save(folder, GPT2LMHeadModel, _gpt2_config(), byte_tokenizer(eos_token="<|endoftext|>"))


def neox_reward(folder: Path) -> Path:
    tokenizer = byte_tokenizer(eos_token="<|endoftext|>", pad_token="[PAD]")
    return _save(folder, GPTNeoXForSequenceClassification, _neox_config(num_labels=1), tokenizer)


def gpt2_reward(folder: Path) -> Path:
    """Its only special token ends a text, so that padding with it would hide where a text ends."""
    tokenizer = byte_tokenizer(eos_token="<|endoftext|>")
    return _save(folder, GPT2ForSequenceClassification, _gpt2_config(num_labels=1), tokenizer)


def distilbert_reward(folder: Path) -> Path:
    """A two-label classifier with a lower-case word tokenizer of its own."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz", *(f"##{c}" for c in "abcdefghij")]
    tokenizer = Tokenizer(models.WordPiece(vocab={w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    config = DistilBertConfig(  # type: ignore[call-arg]
        vocab_size=len(words), dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=64, num_labels=2
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
    )
    return _save(folder, DistilBertForSequenceClassification, config, fast)


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _neox_config(**more: Any) -> GPTNeoXConfig:
    return GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=0,
        **more,
    )


def _gpt2_config(**more: Any) -> GPT2Config:
    return GPT2Config(
        vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0, **more
    )


def _save(folder: Path, model: type, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
