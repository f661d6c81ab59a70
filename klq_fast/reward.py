"""Scores of responses: from a reward model, which may have a tokenizer of its own, or from a Python function."""

import importlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from traceback import extract_tb
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .config import InputError
from .data import Prompt
from .models import load_reward_model, load_tokenizer, max_positions
from .options import on_device

# (prompts, responses, ended) -> a score each, float32 on the CPU
Reward = Callable[[Sequence[Prompt], Sequence[str], Sequence[bool]], Tensor]


def load_reward(
    reward: str | None,
    reward_model: str | None,
    device: torch.device,
    max_tokens: int,
    *,
    eos: bool = True,
    shift: float | Literal["reference"] = 0.0,
    offload: bool = False,
) -> Reward:
    """`eos`, `shift`: Config's reward_eos and reward_shift, which says "reference" until the number is measured.
    offload: a reward model waits in CPU memory until it is asked."""
    if not reward and not reward_model:
        raise InputError("--reward-model: got neither a reward model nor a reward function, expected one of them")
    if reward:
        score = reward_from_function(reward)
    else:
        assert reward_model
        model, tokenizer = load_reward_model(reward_model, device), load_tokenizer("reward-model", reward_model)
        score = reward_from_model(model, tokenizer, max_tokens, eos=eos)
        if offload:
            score = _offloaded(score, model, device)
    return score if shift == "reference" else shifted(score, shift)


def shifted(reward: Reward, shift: float) -> Reward:
    """The reward with a number added to each score."""
    return lambda prompts, responses, ended: reward(prompts, responses, ended) + shift


def _offloaded(reward: Reward, model: PreTrainedModel, device: torch.device) -> Reward:
    model.cpu()

    def score(prompts: Sequence[Prompt], responses: Sequence[str], ended: Sequence[bool]) -> Tensor:
        with on_device(model, device):
            return reward(prompts, responses, ended)

    return score


def reward_from_function(name: str) -> Reward:
    """`MODULE:FUNCTION`, a function from (prompts, responses), two lists of texts, to a list of floats.

    Raises:
        InputError: no such module or function; later, a call that raises, or whose result is not a number for each.
    """
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
        function = getattr(module, function_name)
    except Exception as error:  # whatever importing the user's module raises
        raise InputError(f"--reward {name}: {type(error).__name__}: {error}, expected MODULE:FUNCTION") from error
    if not callable(function):
        raise InputError(f"--reward {name}: got a {type(function).__name__}, expected a function")

    def score(prompts: Sequence[Prompt], responses: Sequence[str], ended: Sequence[bool]) -> Tensor:
        example = f"(its first prompt: {prompts[0].text[:200]!r}, response: {responses[0][:200]!r})"
        try:
            result = function([p.text for p in prompts], list(responses))
            is_list = isinstance(result, Iterable) and not isinstance(result, str | Mapping)
            scores = list(result) if is_list else []
        except Exception as error:
            frames = extract_tb(error.__traceback__)
            own = [frame for frame in frames if frame.filename == getattr(module, "__file__", None)]
            where = own or frames  # the module's own line helps more than that of a library it calls
            raised = f"it raised {type(error).__name__}: {error}, at {where[-1].filename}:{where[-1].lineno}"
            raise InputError(f"--reward {name}: {raised} {example}") from error
        if not is_list:
            raise InputError(f"--reward {name}: got {result!r:.200}, expected a list of floats {example}")
        if len(scores) != len(prompts):
            raise InputError(f"--reward {name}: got {len(scores)} scores, expected {len(prompts)} {example}")
        for prompt, response, value in zip(prompts, responses, scores, strict=True):
            try:
                finite = math.isfinite(value) and abs(value) < 1e38  # near float32's largest number
            except (TypeError, ValueError, OverflowError):  # no number, or a tensor of several, or an enormous int
                finite = False
            if not finite:
                raise InputError(
                    f"--reward {name}: got {value!r}, expected a finite number, for the prompt {prompt.text[:200]!r} "
                    f"and the response {response[:200]!r}"
                )
        return torch.tensor([float(value) for value in scores])

    return score


def reward_from_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_tokens: int, *, eos: bool = True
) -> Reward:
    """Scores prompt + response as the reward model's own tokenizer reads them.

    A chat goes through the reward model's own template where it has one. eos: where the tokenizer has an
    end-of-sequence token it is added to a response that ended. A text longer than the model's positions loses its
    beginning.
    """
    labels = model.config.num_labels or 1
    if labels > 2:
        raise InputError(f"--reward-model: got {labels} labels, expected 1 (a score) or 2 (the second is good)")
    # Neither may know a limit: a tokenizer without one says 10**30, more than its own truncation takes.
    longest = min(tokenizer.model_max_length, max_positions(model) or 2**31)
    tokenizer.truncation_side = "left"  # the response is at the end

    def tokenize(text: str, limit: int) -> list[int]:
        return tokenizer(text, truncation=True, max_length=limit)["input_ids"]

    def tokens_of(prompt: Prompt, response: str, ended: bool) -> list[int]:
        if prompt.messages is not None and tokenizer.chat_template is not None:
            chat = [*prompt.messages, {"role": "assistant", "content": response}]
            text = tokenizer.apply_chat_template(chat, tokenize=False)
            return tokenizer(text, add_special_tokens=False, truncation=True, max_length=longest)["input_ids"]
        text, end = prompt.text + response, tokenizer.eos_token_id
        tokens = tokenize(text, longest)
        if eos and ended and end is not None and tokens[-1:] != [end]:
            tokens = [*(tokens if len(tokens) < longest else tokenize(text, longest - 1)), end]
        return tokens

    @torch.no_grad()
    def score(prompts: Sequence[Prompt], responses: Sequence[str], ended: Sequence[bool]) -> Tensor:
        rows = [tokens_of(*row) for row in zip(prompts, responses, ended, strict=True)]
        scores = torch.zeros(len(rows))
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        while order:
            # The longest left decide how many fit; they are alike in length, so little of it is padding.
            count = max(1, max_tokens // len(rows[order[-1]]))
            chosen, order = order[-count:], order[:-count]
            width = len(rows[chosen[-1]])
            # Causal classifiers find a row's end by the pad token's id: pad with one that no row ends with.
            pad = min(set(range(count + 1)) - {rows[i][-1] for i in chosen})
            model.config.get_text_config().pad_token_id = pad
            tokens = torch.tensor([rows[i] + [pad] * (width - len(rows[i])) for i in chosen], device=model.device)
            lengths = torch.tensor([len(rows[i]) for i in chosen], device=model.device)
            mask = (torch.arange(width, device=model.device) < lengths[:, None]).long()
            logits = model(input_ids=tokens, attention_mask=mask).logits
            scores[chosen] = logits[:, -1].float().cpu()
        if not scores.isfinite().all():
            row = int((~scores.isfinite()).nonzero()[0])
            raise InputError(
                f"--reward-model: got the score {float(scores[row])} for the prompt {prompts[row].text[:200]!r} and "
                f"the response {responses[row][:200]!r}, expected a finite number"
            )
        return scores

    return score
