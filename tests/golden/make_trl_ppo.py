"""Makes trl_ppo.json: what TRL 1.12.0's PPO trainer computes in one batch of a tiny model, and from which numbers.

    python -m venv trl && trl/bin/pip install torch==2.13.0 transformers==5.23.0 trl==1.12.0
    trl/bin/python tests/golden/make_trl_ppo.py

The trainer's arithmetic stands inside its `train`. So its own loop is run, and what its local variables hold is written
down when it calls the function that whitens the advantages and when it calls `backward`; nothing of it is copied here.
Policy, reference, value and reward model are random; the learning rate is such that ratios and values leave their
clipping intervals within a few steps.
"""

import inspect
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
import trl  # type: ignore[import-not-found]
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer  # type: ignore[import-not-found]

ROWS, LENGTH = 8, 6
WORDS = ["[PAD]", "</s>", *"abcdefgh"]
BATCH = "logprobs ref_logprobs scores values rewards returns padding_mask padding_mask_p1".split()
STEP = "micro_batch_inds mb_advantage mb_logprobs mb_return mb_values new_logprobs vpred loss pg_loss vf_loss".split()


def plain(value: Any) -> Any:
    """Nested lists; a float32 in the 9 digits that determine it."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        if value.dtype == torch.float32 and value.dim() == 0:
            return float(f"{value.item():.9g}")
        return [plain(x) for x in value] if value.dim() else value.item()
    return value.tolist() if hasattr(value, "tolist") else value


def model(seed: int, kind: type, scale: float, **more: Any) -> Any:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(WORDS), n_positions=16, n_embd=16, n_layer=1, n_head=2, pad_token_id=0, eos_token_id=1, **more
    )
    made = kind(config)
    head = made.score if kind is GPT2ForSequenceClassification else made.lm_head
    torch.nn.init.normal_(head.weight, std=scale)
    return made


def main() -> None:
    vocab = {word: i for i, word in enumerate(WORDS)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="a")),
        pad_token="[PAD]",
        eos_token="</s>",
        padding_side="left",
    )
    settings = {
        "gamma": 0.97,
        "lam": 0.9,
        "kl_coef": 0.3,
        "cliprange": 0.2,
        "cliprange_value": 0.2,
        "vf_coef": 0.1,
        "temperature": 0.7,
    }
    args = PPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=ROWS // 2,
        gradient_accumulation_steps=2,
        num_mini_batches=2,
        num_ppo_epochs=2,
        total_episodes=ROWS,
        local_rollout_forward_batch_size=ROWS,
        response_length=LENGTH,
        stop_token="eos",
        missing_eos_penalty=1.0,
        learning_rate=0.02,
        num_sample_generations=0,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        seed=8,
        **settings,
    )
    prompts = torch.Generator().manual_seed(0)
    queries = [torch.randint(2, len(WORDS), (3,), generator=prompts).tolist() for _ in range(ROWS)]
    trainer = PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=model(1, GPT2LMHeadModel, 0.1),
        ref_model=model(2, GPT2LMHeadModel, 0.1),
        reward_model=model(3, GPT2ForSequenceClassification, 1.0, num_labels=1),
        value_model=model(4, GPT2ForSequenceClassification, 0.3, num_labels=1),
        train_dataset=Dataset.from_dict({"input_ids": queries}),
        eval_dataset=Dataset.from_dict({"input_ids": queries}),
    )
    batch: dict[str, Any] = {}
    steps: list[dict[str, Any]] = []
    whiten, backward, mean = ppo_trainer.masked_whiten, trainer.accelerator.backward, ppo_trainer.masked_mean

    def caller() -> dict[str, Any]:
        frame = inspect.currentframe()
        assert frame and frame.f_back and frame.f_back.f_back
        return frame.f_back.f_back.f_locals

    def recording_whiten(values: torch.Tensor, mask: torch.Tensor, **options: Any) -> torch.Tensor:
        result = whiten(values, mask, **options)
        batch.update({name: plain(value) for name, value in caller().items() if name in BATCH})
        batch.update(advantages=plain(values), whitened=plain(result.masked_fill(~mask, 0)))
        return result

    def recording_backward(loss: torch.Tensor) -> None:
        found = caller()
        step = {name: plain(found[name]) for name in STEP}
        gradients = torch.autograd.grad(loss, (found["new_logprobs"], found["vpred"]), retain_graph=True)
        step["grad_logprobs"], step["grad_values"] = map(plain, gradients)
        step["vf_clipfrac"] = plain(found["vf_clipfrac"])
        steps.append(step)
        backward(loss)

    def recording_mean(values: torch.Tensor, mask: torch.Tensor, *options: Any) -> torch.Tensor:
        result = mean(values, mask, *options)
        if steps and "pg_clipfrac" not in steps[-1]:  # the first mean after `backward`
            steps[-1]["pg_clipfrac"] = plain(result)
        return result

    ppo_trainer.masked_whiten, ppo_trainer.masked_mean = recording_whiten, recording_mean
    trainer.accelerator.backward = recording_backward
    transformers.set_seed(args.seed)  # the trainer leaves numpy's generator, which orders the rows, unseeded
    trainer.train()
    versions = {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    text = ",\n".join(
        f'"{name}": {json.dumps(value)}'
        for name, value in {"versions": versions, "settings": settings, **batch}.items()
    )
    text = f'{{{text},\n"steps": [\n' + ",\n".join(json.dumps(step) for step in steps) + "]}\n"
    Path(__file__).with_name("trl_ppo.json").write_text(text)
    print(len(steps), "steps,", len(text), "bytes")


if __name__ == "__main__":
    main()
