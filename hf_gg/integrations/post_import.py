"""What happens when a library that `hf_gg.integrations.autoload` waits for is imported.

Everything here runs inside an import statement of somebody else, so no error of ours leaves this module.
"""

import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from threading import get_ident
from types import ModuleType
from typing import Any

from .autoload import SWITCH, PostImportFinder, is_initializing


OLDEST_TRANSFORMERS = (5, 0)

logger = logging.getLogger(__name__)


def find_hooked_spec(
    finder: PostImportFinder, fullname: str, path: Sequence[str] | None, target: ModuleType | None
) -> ModuleSpec | None:
    """Asks the other finders for a module and puts its hook behind the loader they found.

    Args:
        finder: ours, which is not asked.
        fullname: name of a module in `finder.hooks`.
        path: `__path__` of its parent package.
        target: the module in a reload.

    Returns:
        The spec to import with, or None where no finder knows the module.
    """
    search = (get_ident(), fullname)
    if search in finder.searching:  # one of the others asks all finders in its turn, us included
        return None
    finder.searching.add(search)
    try:
        spec = _ask_others(finder, fullname, path, target)
    finally:
        finder.searching.discard(search)
    loader = getattr(spec, "loader", None)
    if spec is not None and hasattr(loader, "exec_module") and not isinstance(loader, _HookedLoader):
        spec.loader = _HookedLoader(loader, finder)  # type: ignore[assignment]
    return spec


def run_when_executed(finder: PostImportFinder, awaited: str) -> None:
    """Runs the hook of a module in `sys.modules`: now, or when the import under way is through."""
    if is_initializing(awaited):
        _after_import(awaited, lambda: run(finder, awaited))
    else:
        run(finder, awaited)


def run(finder: PostImportFinder, awaited: str) -> None:
    """Runs the hook of an executed module, once; after the last one the finder is taken off `sys.meta_path`."""
    if is_initializing("torch"):  # operators cannot be defined before torch is complete
        _after_import("torch", lambda: run(finder, awaited))
        return
    registration = finder.hooks.pop(awaited, None)
    if registration is None:  # it ran before, perhaps in another thread
        return
    found = _version_of("transformers")
    too_old = _is_too_old(found)
    if too_old:
        finder.hooks.clear()
    if not finder.hooks:
        # A new list: another thread may be iterating over this one, and would skip a finder.
        sys.meta_path = [other for other in sys.meta_path if other is not finder]
    if not too_old:
        _register(awaited.partition(".")[0], registration)
    elif finder.explicit:
        _warn(
            f"hf_gg needs transformers {OLDEST_TRANSFORMERS[0]} or newer and found {found}: the quantization method "
            f"'gg' is not registered. Run `pip install -U 'transformers>={OLDEST_TRANSFORMERS[0]}'`."
        )
    else:
        logger.debug("transformers %s is too old for hf_gg: nothing registered", found)
        forget()


def forget() -> None:
    """Takes hf_gg out of `sys.modules` after torch imported it for nothing.

    The user's `import hf_gg` would otherwise find it loaded, run no code, and neither register nor say why it cannot.
    """
    ours = {name for name in list(sys.modules) if name == "hf_gg" or name.startswith("hf_gg.")}
    if ours <= {"hf_gg", "hf_gg.integrations", "hf_gg.integrations.autoload", __name__}:
        for name in ours:
            sys.modules.pop(name, None)


class _HookedLoader:
    """The loader of an awaited module, with its hook behind `exec_module`; in everything else the loader itself."""

    _loader: Any = None

    def __init__(self, loader: Any, finder: PostImportFinder) -> None:
        self._loader = loader
        self._finder = finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        create = getattr(self._loader, "create_module", None)
        return create(spec) if create is not None else None

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        if spec is not None and spec.loader is self:
            spec.loader = self._loader
        if getattr(module, "__loader__", None) is self:
            module.__loader__ = self._loader
        self._loader.exec_module(module)
        run(self._finder, module.__name__)


def _ask_others(
    finder: PostImportFinder, fullname: str, path: Sequence[str] | None, target: ModuleType | None
) -> ModuleSpec | None:
    for other in list(sys.meta_path):
        find_spec = getattr(other, "find_spec", None)
        if other is finder or find_spec is None:
            continue
        spec: ModuleSpec | None = find_spec(fullname, path, target)
        if spec is not None:
            return spec
    return None


def _after_import(name: str, callback: Callable[[], None]) -> None:
    """Calls `callback` when the module, now being imported, has been executed; never, if its import fails.

    The import system announces the end of an import nowhere but in `spec._initializing`, which it sets to False.
    """
    spec: Any = sys.modules[name].__spec__
    plain = type(spec)

    class AnnouncingSpec(plain):  # type: ignore[misc, valid-type]
        @property
        def _initializing(self) -> bool:
            return True

        @_initializing.setter
        def _initializing(self, value: bool) -> None:
            self.__class__ = plain
            self._initializing = value
            if name in sys.modules:
                callback()

    spec.__class__ = AnnouncingSpec


def _register(library: str, registration: str) -> None:
    try:
        import_module(registration)
    except Exception as error:  # whatever it is, the library's own import must go on
        _warn(
            f"hf_gg could not register with {library} {_version_of(library)} ({type(error).__name__}: {error}), so RF8 "
            f'models do not work with it in this process. `python -c "import {registration}"` shows the traceback; '
            f"`pip install -U hf_gg {library}` brings versions that match; {SWITCH}=0 switches this registration off."
        )


def _version_of(library: str) -> str:
    return str(getattr(sys.modules.get(library), "__version__", "of unknown version"))


def _is_too_old(transformers_version: str) -> bool:
    numbers = []
    for part in transformers_version.split(".")[:2]:
        if not part.isdigit():
            break
        numbers.append(int(part))
    return bool(numbers) and tuple(numbers) < OLDEST_TRANSFORMERS


def _warn(message: str) -> None:
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    except Exception:  # `-W error` makes it an exception, which would end somebody else's import
        logger.warning(message)
