"""What to install for a part of the library that needs more than its core."""


def needs(what: str, package: str, extra: str) -> str:
    """The message of an import that failed.

    Example:
      >>> needs("--epsilon", "dp-accounting", "dp")
      "--epsilon needs dp-accounting: pip install 'hiso-jax[dp]', or '.[dp]' in a clone"
    """
    return f"{what} needs {package}: pip install 'hiso-jax[{extra}]', or '.[{extra}]' in a clone"
