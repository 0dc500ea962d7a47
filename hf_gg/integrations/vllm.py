"""vLLM opens checkpoints of hf_gg through its plugin interface: `register` is the entry point `vllm.general_plugins`.

Nothing here needs Transformers' quantizer: vLLM may come with a Transformers that `hf_gg.integrations.transformers`
does not take. So vLLM's side uses our operators and formats alone.
"""

from __future__ import annotations


METHOD = "gg"


def register() -> None:
    """Make `gg` a quantization method of vLLM; a second call does nothing. vLLM calls it in each of its processes."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

    if METHOD not in QUANTIZATION_METHODS:
        from .vllm_layers import GGVllmConfig

        register_quantization_config(METHOD)(GGVllmConfig)
