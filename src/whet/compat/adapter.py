"""A module object that stands in front of a library and answers some names with ours.

The library itself is not touched: it, and those built on it, go on seeing their own names, because the adapter answers
them with the real ones. Everything else, submodules included, is the library's.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

LIBRARIES = ("transformers", "trl", "peft", "accelerate", "whet")
"""Who is answered with the real names: code that subclasses and checks against them."""

_IDENTITY = ("__spec__", "__loader__", "__package__", "__path__", "__file__")


class Adapter(ModuleType):
    """`real`, but `names` in place of its own for whoever asks from outside of `LIBRARIES`."""

    def __init__(self, real: ModuleType, names: Mapping[str, Any]) -> None:
        super().__init__(real.__name__, real.__doc__)
        # Into the instance's dict, past __setattr__. The import system reads these from a package.
        vars(self).update({name: getattr(real, name) for name in _IDENTITY}, _real=real, _names=dict(names))

    def __getattr__(self, name: str) -> Any:
        if name in self._names and not _asked_by_library():
            return self._names[name]
        return getattr(self._real, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """As without the adapter: the import system binds a submodule to its package this way."""
        setattr(self._real, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled by name: datasets fingerprints a script's functions together with the modules they use."""
        return import_module, (self.__name__,)

    def __dir__(self) -> list[str]:
        return sorted({*dir(self._real), *self._names})


def _asked_by_library() -> bool:
    """Whether the code two calls up, that reads the attribute, is a library's."""
    asking = sys._getframe(2).f_globals.get("__name__") or ""
    return asking.partition(".")[0] in LIBRARIES
