"""Attention without padding: a microbatch goes through the model as one row, its sequences one after the other.

Linear layers, norms and activations treat each token alone, so only attention has to know where a sequence begins. It
is replaced through transformers' AttentionInterface; a padded batch, as in a decoding step, goes to PyTorch's SDPA.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import is_flash_attn_2_available

from .batch import Sequences

ATTENTION = "klq_fast"
# What some models' attention does beyond softmax(q·kᵀ)·v, as they name it to an attention function.
BEYOND = ("sliding_window", "softcap", "s_aux", "position_bias")


def attention(
    module: nn.Module,
    query: Tensor,  # (B, H, L, d), packed (1, H, S, d)
    key: Tensor,  # (B, K, L', d), K dividing H; packed (1, K, S, d)
    value: Tensor,  # like key
    attention_mask: Tensor | None,
    sequences: Sequences | None = None,  # None: padded
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:  # (B, L, H, d), packed (1, S, H, d)
    """Causal attention: padded, as `attention_mask` says; or within each of the packed sequences.

    Packed on CUDA in 16 bits it is one call of flash-attn where installed, else of PyTorch's own build of it. Elsewhere
    the sequences are padded on the right for the attention alone, where causality hides the padding without a mask.
    """
    if sequences is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    if beyond := [name for name in BEYOND if options.get(name) is not None]:
        raise ValueError(f"packed attention: got {', '.join(beyond)}, expected full causal attention")
    if _flash_takes(query, value):
        return _flash(query, key, value, sequences, scaling), None
    query, key, value = (sequences.pad(x[0].transpose(0, 1)).transpose(1, 2) for x in (query, key, value))
    output, _ = sdpa_attention_forward(module, query, key, value, None, scaling=scaling, is_causal=True)  # (B, L, H, d)
    return sequences.unpad(output)[None], None


def _flash_takes(query: Tensor, value: Tensor) -> bool:
    size = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and size == value.shape[-1]
        and size % 8 == 0
        and size <= 256
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _flash(query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scaling: float | None) -> Tensor:
    bounds = (sequences.bounds, sequences.bounds, sequences.longest, sequences.longest)
    if is_flash_attn_2_available():
        from flash_attn import flash_attn_varlen_func

        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (S, heads, d)
        output = flash_attn_varlen_func(query, key, value, *bounds, softmax_scale=scaling, causal=True)
    else:
        groups = query.shape[1] // key.shape[1]  # PyTorch 2.11's has no heads of keys shared by queries
        query, key, value = (x[0].transpose(0, 1) for x in (query, repeat_kv(key, groups), repeat_kv(value, groups)))
        output = varlen_attn(query, key, value, *bounds, scale=scaling, window_size=(-1, 0))
    return output[None]


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


@torch.no_grad()
def enable_packing(model: PreTrainedModel) -> bool:
    """Replaces the model's attention where it can be, and says whether the model then takes packed sequences.

    It does where transformers lets attention be replaced, every layer attends to all that came before, and two short
    sequences give packed what they give alone: recurrent layers and positions that are not told apart do not.
    """
    config = model.config.get_text_config()
    full = all(kind == "full_attention" for kind in getattr(config, "layer_types", None) or ())
    limited = any(getattr(config, name, None) for name in ("sliding_window", "attn_logit_softcapping"))
    if not (model._supports_attention_backend and full and not limited):
        return False
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    tokens = torch.arange(5, device=model.device)[None] % config.vocab_size
    sequences = Sequences(np.array([2, 3]), model.device)
    packed = model.base_model(input_ids=tokens, **sequences.model_inputs(), use_cache=False).last_hidden_state
    alone = [
        model.base_model(input_ids=part, use_cache=False).last_hidden_state for part in tokens.split([2, 3], dim=1)
    ]
    expected = torch.cat(alone, dim=1)
    # Rounding is far below this, in bf16 too; a sequence that saw the other would be far above it.
    same = bool((packed - expected).abs().max() <= 0.05 * expected.abs().max())
    if not same:
        model.set_attn_implementation(before)
    return same
