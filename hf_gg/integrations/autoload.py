"""Registration with Transformers and PEFT without an `import hf_gg` in the user's script.

Neither library looks for plugins, but torch does: at the end of `import torch` it calls every entry point of the group
`torch.backends`. Ours is `install`. It loads nothing of the user's stack; it leaves a finder on `sys.meta_path` that
waits until the module which holds a library's registry has been executed, imports our side of it, and goes away when
nothing is left to wait for. `import hf_gg` does the same, for places without the entry point.

What the hook promises to code that never heard of it:

* It does not raise. A registration that fails becomes one `RuntimeWarning`, and the library's own import goes on.
* It finds modules through the other finders (editable installs, zip files), and the modules it waited for end up
  with the loader they would have had without it.
* `HF_GG_AUTOLOAD=0` switches `install` off, `TORCH_DEVICE_BACKEND_AUTOLOAD=0` all of torch's entry points. An
  `import hf_gg` written by the user registers in either case.
* With a Transformers older than 5 nothing is registered: silently when torch called, with a warning when the user
  imported `hf_gg`.

Registration runs in the middle of other imports (often `transformers.modeling_utils` is only half executed), so our
side may import at module level only what `transformers.quantizers.auto` itself has already loaded.

This module runs on every `import torch`, also where no bytecode is kept: it is short, it imports nothing that the
interpreter has not loaded, and what is needed only when a library turns up is in `hf_gg.integrations.post_import`.
"""

import os
import sys


TYPE_CHECKING = False  # type checkers know the name; `import typing` would cost more than this module
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

# The module to wait for, and the module whose import registers us. `peft.mapping_func` is the first one to run after
# all tuners are loaded; the package itself is no use, since it is half imported when it makes torch call `install`.
HOOKS = {
    "transformers.quantizers.auto": "hf_gg.integrations.transformers",
    "peft.mapping_func": "hf_gg.integrations.peft",
}
SWITCH = "HF_GG_AUTOLOAD"


class PostImportFinder:
    """Finder that has a registration run right after the module it depends on has been executed.

    Attributes:
        hooks: name of the module to wait for -> name of the module to import then; those that have not run yet.
        explicit: whether the user asked for registration, and so wants to hear why it is impossible.
        searching: (thread, module name) of the searches under way.
    """

    hf_gg_autoload = True

    def __init__(self) -> None:
        self.hooks = dict(HOOKS)
        self.explicit = False
        self.searching: set[tuple[int, str]] = set()

    def find_spec(
        self, fullname: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """Finds an awaited module through the other finders and wraps its loader; None for every other module."""
        if fullname not in self.hooks:
            return None
        try:
            from .post_import import find_hooked_spec
        except ImportError:  # uninstalled since it was loaded
            return None
        return find_hooked_spec(self, fullname, path, target)


def install() -> None:
    """Places the import hook unless `HF_GG_AUTOLOAD` is 0, false, no or off. The entry point that torch calls."""
    if _switched_on():
        _place(explicit=False)
    elif _loaded_by_torch:
        from .post_import import forget

        forget()


def install_on_import() -> None:
    """Places the import hook for `import hf_gg`: always if the user wrote it, else as `HF_GG_AUTOLOAD` says."""
    if not is_initializing("torch"):
        _place(explicit=True)
    elif _switched_on():
        _place(explicit=False)


def is_initializing(name: str) -> bool:
    """Whether the module is being imported at the moment: in `sys.modules`, but not executed to its end."""
    return bool(getattr(getattr(sys.modules.get(name), "__spec__", None), "_initializing", False))


def _place(explicit: bool) -> None:
    try:
        finders: list[Any] = sys.meta_path
        finder = next((known for known in finders if getattr(known, "hf_gg_autoload", False)), None)
        if finder is None:
            finder = PostImportFinder()
            finders.insert(0, finder)
        finder.explicit |= explicit
        for awaited in HOOKS:
            if sys.modules.get(awaited) is not None:
                from .post_import import run_when_executed

                run_when_executed(finder, awaited)
    except Exception as error:  # would end the `import torch` that called us
        print(f"hf_gg: no automatic registration ({type(error).__name__}: {error})", file=sys.stderr)


def _switched_on() -> bool:
    return os.environ.get(SWITCH, "").strip().lower() not in {"0", "false", "no", "off"}


_loaded_by_torch = is_initializing("torch")
