"""Names of earlier versions: they work, and warn with the name of today."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def warn(old: str, new: str, stacklevel: int = 3) -> None:
    """Say at the caller's line that a name has another one."""
    warnings.warn(f"{old} is now called {new}", DeprecationWarning, stacklevel)


def arguments(
    **names: str,
) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Let a function take keywords under their old names, old=new.

    Example:
      >>> import warnings
      >>> double = arguments(number="x")(lambda x: 2 * x)
      >>> with warnings.catch_warnings(record=True) as caught:
      ...     warnings.simplefilter("always")
      ...     double(number=2), str(caught[0].message)
      (4, 'number is now called x')
    """

    def wrap(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Result:
            for old in options.keys() & names.keys():
                warn(old, names[old])
                options[names[old]] = options.pop(old)
            return function(*args, **options)

        return call  # pyright: ignore[reportReturnType]

    return wrap


def attribute(old: str, new: str) -> Any:
    """An attribute of a class under its old name."""

    def read(self: Any) -> Any:
        warn(old, new)
        return getattr(self, new)

    return property(read, doc=f"Now called `{new}`.")


def functions(module: dict[str, Any], **names: str) -> Callable[[str], Any]:
    """``__getattr__`` of a module whose functions have new names, old=new."""

    def find(name: str) -> Any:
        if name in names:
            warn(name, names[name])
            return module[names[name]]
        raise AttributeError(f"module {module['__name__']!r} has no attribute {name!r}")

    return find
