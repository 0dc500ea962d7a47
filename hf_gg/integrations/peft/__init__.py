"""Adapters of PEFT on quantized models. Importing this module registers everything.

`docs/peft.md` says what works with which tuner. PEFT has no registry for kinds of quantized layers, so functions of it
are wrapped: those through which every tuner passes, and on a model without quantized modules each of them only calls
the original. Where the installed PEFT lacks one, a warning says what does not work, and PEFT is otherwise left alone.
"""

import warnings

from . import helpers, injection, methods, modules_to_save, native, state
from .layers import MergeWarning


# what it is for, the function, whether every PEFT has what is wrapped
_HOOKS = (
    ("adapters on quantized layers", injection.install, True),
    ("`trainable_token_indices` with quantized embeddings", injection.install_trainable_tokens, False),
    ("`modules_to_save` with quantized modules", modules_to_save.install, True),
    ("adapters on quantized embeddings", state.install, True),
    ("the status of quantized layers", helpers.install_backend, False),
    ("`prepare_model_for_kbit_training`", helpers.install_kbit, True),
    ("CorDA on quantized models", helpers.install_corda, False),
    ("LoRA-GA on quantized models", helpers.install_loraga, False),
    ("BACKSLASH and DEEPSHAPE", methods.install, True),
    ("BACKSLASH and DEEPSHAPE in `model.load_adapter`", native.install, True),
)


def install() -> None:
    """Wrap PEFT; a second call does nothing."""
    for what, function, everywhere in _HOOKS:
        try:
            function()
        except (ImportError, AttributeError) as error:
            if everywhere or isinstance(error, AttributeError):
                message = f"hf_gg does not support {what} with the installed PEFT: {error}. Install peft>=0.21."
                warnings.warn(message, stacklevel=2)


install()

__all__ = ["MergeWarning"]
