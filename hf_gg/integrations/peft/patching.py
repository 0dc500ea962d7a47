"""The two ways in which PEFT is changed."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any


_MARK = "_hf_gg_wrapped"


def wrap(owner: Any, name: str, make: Callable[[Callable], Callable]) -> None:
    """Put `make(original)` in place of an attribute of a class or a module, once.

    Raises:
        AttributeError: there is no such attribute.
    """
    original = vars(owner)[name] if name in vars(owner) else getattr(owner, name)
    if not getattr(original, _MARK, False):
        setattr(owner, name, _made(original, make))


def rebind(owner: Any, name: str, make: Callable[[Callable], Callable]) -> None:
    """The same for a function of a module that other modules of PEFT have imported by name.

    Those that are imported later take it from `owner`, or from one that has been changed.

    Raises:
        AttributeError: there is no such attribute.
    """
    original = getattr(owner, name)
    if getattr(original, _MARK, False):
        return
    new = _made(original, make)
    for module_name, module in list(sys.modules.items()):
        if module is not None and (module_name == "peft" or module_name.startswith("peft.")):
            for attribute, value in list(vars(module).items()):
                if value is original:
                    setattr(module, attribute, new)


def _made(original: Callable, make: Callable[[Callable], Callable]) -> Callable:
    new = functools.wraps(original)(make(original))
    setattr(new, _MARK, True)
    return new
