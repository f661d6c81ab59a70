"""KL-regularised Q-learning (arXiv 2508.17000) for RLHF: Q = τ·log(π/π_ref) + V, regressed on λ-returns.

Importing this package imports torch and nothing heavier; `python -m klq_fast.train` needs the extra `train`.
"""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path

# A wheel holds the kernels inside this package. In a checkout (bare, or installed with `pip install -e`) they lie
# beside it, in kernels/, without an __init__.py so that PyPI's package of that name still wins where it is installed.
# Registering that folder as the namespace package klq_fast.kernels makes both look alike.
if not (Path(__file__).parent / "kernels").is_dir():
    _spec = ModuleSpec("klq_fast.kernels", None, is_package=True)
    _spec.submodule_search_locations = [str(Path(__file__).parents[1] / "kernels")]
    kernels = sys.modules["klq_fast.kernels"] = module_from_spec(_spec)

from .kernels.klq_loss.op import KLQLoss, KLQLossOutput, LinearKLQLoss, klq_loss, linear_klq_loss
from .kernels.lambda_returns.op import LambdaReturns, gae, lambda_returns, lambda_returns_with_metrics
from .kernels.linear_logprob.op import linear_log_ratio, linear_logprobs
from .kernels.log_ratio.op import log_ratio, logprobs
from .kernels.ppo_loss.op import PPOLossOutput, ppo_loss

__all__ = [
    "KLQLoss",
    "KLQLossOutput",
    "LambdaReturns",
    "LinearKLQLoss",
    "PPOLossOutput",
    "gae",
    "klq_loss",
    "lambda_returns",
    "lambda_returns_with_metrics",
    "linear_klq_loss",
    "linear_log_ratio",
    "linear_logprobs",
    "log_ratio",
    "logprobs",
    "ppo_loss",
]
