"""Registration with Transformers and PEFT without an `import hf_gg` in the user's script.

Neither library looks for plugins, but torch does: at the end of `import torch` it calls every entry point of the group
`torch.backends`. Ours is `install`. It puts a finder on `sys.meta_path` that imports our side of a library right after
the module with the library's registry has been executed. `import hf_gg` does the same where there is no entry point.

All of this runs inside import statements of code that never heard of it. So it imports nothing that torch has not
loaded, costs well under 2 ms, and does not raise: a registration that fails becomes one warning. And our side of a
library may import at module level only what the awaited module has loaded: `transformers.modeling_utils`, for one, is
often half executed.
"""

import os
import sys
from threading import get_ident


TYPE_CHECKING = False  # type checkers know the name; torch itself loads `typing`, but a bare `import hf_gg` does not
if TYPE_CHECKING:
    from typing import Any


# The module to wait for, and the module whose import registers us. `peft.mapping_func` is the first one to run after
# all tuners are loaded.
HOOKS = {
    "transformers.quantizers.auto": "hf_gg.integrations.transformers",
    "peft.mapping_func": "hf_gg.integrations.peft",
}
SWITCH = "HF_GG_AUTOLOAD"


class PostImportFinder:
    """Finder that has a registration run right after the module it depends on has been executed.

    It stays on `sys.meta_path` when nothing is left to wait for: taking it off would make an import in another thread,
    which may be going through that list, skip the next finder.

    Attributes:
        hooks: name of the module to wait for -> name of the module to import then; those that have not run yet.
    """

    def __init__(self) -> None:
        self.hooks = dict(HOOKS)
        self._searches: set[tuple[int, str]] = set()

    def find_spec(self, fullname, path=None, target=None):
        """Finds an awaited module through the other finders and wraps its loader; None for every other module."""
        search = (get_ident(), fullname)
        # one of the finders that are asked here may ask all of them in its turn, us included
        if fullname not in self.hooks or search in self._searches:
            return None
        self._searches.add(search)
        try:
            others = [other for other in sys.meta_path if other is not self and hasattr(other, "find_spec")]
            specs = (other.find_spec(fullname, path, target) for other in others)
            spec = next((spec for spec in specs if spec is not None), None)
        finally:
            self._searches.discard(search)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _HookedLoader(spec.loader, self)  # type: ignore[assignment]
        return spec

    def run(self, awaited: str) -> None:
        """Runs the hook of a module, once."""
        registration = self.hooks.pop(awaited, None)
        if registration is None:
            return
        try:
            # Not `import_module`: where another thread is importing this very module and waits for the one that we
            # are called from, it raises a deadlock error. This one leaves the registration to the other thread.
            __import__(registration)
        except Exception as error:  # whatever it is, the library's own import must go on
            _warn(awaited.partition(".")[0], registration, error)


class _HookedLoader:
    """The loader of an awaited module, with the hook behind `exec_module`; in everything else the loader itself."""

    def __init__(self, loader, finder: PostImportFinder) -> None:
        self._loader, self._finder = loader, finder

    def __getattr__(self, name: str):
        return getattr(self._loader, name)

    def exec_module(self, module) -> None:
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._finder.run(module.__name__)


def _run_when_imported(finder: PostImportFinder, awaited: str) -> None:
    """Runs the hook of a module that is being imported, perhaps by code that made torch call `install`.

    Its loader is at work already, and the import system tells of the end of an import nowhere but in the module's
    spec, whose `_initializing` becomes False; the module is not in `sys.modules` then if its import failed.
    """
    spec: Any = sys.modules[awaited].__spec__
    plain = type(spec)

    class AnnouncingSpec(plain):  # type: ignore[misc, valid-type]
        @property
        def _initializing(self) -> bool:
            return True

        @_initializing.setter
        def _initializing(self, value: bool) -> None:
            self.__class__ = plain
            self._initializing = value
            if awaited in sys.modules:
                finder.run(awaited)

    spec.__class__ = AnnouncingSpec


def _is_initializing(name: str) -> bool:
    return bool(getattr(getattr(sys.modules.get(name), "__spec__", None), "_initializing", False))


_finder = PostImportFinder()


def install() -> None:
    """Places the import hook unless `HF_GG_AUTOLOAD` is 0, false, no or off. The entry point that torch calls."""
    if os.environ.get(SWITCH, "").strip().lower() not in {"0", "false", "no", "off"}:
        place()
    elif _finder not in sys.meta_path:
        # torch has imported hf_gg for nothing; the user's own `import hf_gg` must still run it, and register
        for name in [name for name in list(sys.modules) if name.partition(".")[0] == "hf_gg"]:
            del sys.modules[name]


def on_import() -> None:
    """Places the import hook for an `import hf_gg`, unless it is torch's on the way to `install`, which decides."""
    if not _is_initializing("torch"):
        place()


def place() -> None:
    """Places the import hook, whatever `HF_GG_AUTOLOAD` says, and registers with what is imported already."""
    try:
        if _finder not in sys.meta_path:
            sys.meta_path.insert(0, _finder)
        for awaited in HOOKS:
            if _is_initializing(awaited):
                _run_when_imported(_finder, awaited)
            elif awaited in sys.modules:
                _finder.run(awaited)
    except Exception as error:  # would end the `import torch` that called us
        _warn("transformers", HOOKS["transformers.quantizers.auto"], error)


def when_imported(awaited: str, registration: str) -> None:
    """Imports a module of ours as soon as another library's has been executed, which may have happened."""
    _finder.hooks[awaited] = registration
    if _is_initializing(awaited):
        _run_when_imported(_finder, awaited)
    elif awaited in sys.modules:
        _finder.run(awaited)


def _warn(library: str, registration: str, error: Exception) -> None:
    import warnings

    message = (
        f"hf_gg could not register with {library} ({type(error).__name__}: {error}): RF8 models do not work with it. "
        f'`python -c "import {registration}"` shows the traceback, `pip install -U hf-gg {library}` brings matching '
        f"versions, {SWITCH}=0 switches this registration off."
    )
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    except Exception:  # `-W error` would end somebody else's import
        print(message, file=sys.stderr)
