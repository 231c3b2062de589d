"""A real task that needs no download: which topic does a docstring belong to?

The texts are the docstrings of the running Python's own standard library, read with `ast`
(nothing is imported or executed). Every module is one client, so the split over clients is
naturally non-IID: a client sees one topic only.
"""

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

TOPICS: dict[str, tuple[str, ...]] = {
    "networking": (
        "email", "ftplib", "http", "imaplib", "ipaddress", "mailbox", "poplib", "smtplib",
        "socket", "socketserver", "ssl", "urllib", "webbrowser", "wsgiref", "xmlrpc",
    ),
    "files and directories": (
        "bz2", "fileinput", "genericpath", "gzip", "ntpath", "os", "pathlib", "posixpath",
        "_pyio", "shutil", "stat", "tarfile", "tempfile", "zipfile",
    ),
    "numbers and mathematics": (
        "calendar", "datetime", "fractions", "heapq", "numbers", "_pydatetime", "_pydecimal",
        "random", "statistics",
    ),
    "text processing": (
        "argparse", "base64", "codecs", "configparser", "difflib", "html", "json", "locale",
        "optparse", "pprint", "re", "shlex", "textwrap", "xml",
    ),
    "concurrency": (
        "asyncio", "concurrent", "contextlib", "multiprocessing", "queue", "selectors",
        "subprocess", "threading",
    ),
    "debugging and testing": (
        "bdb", "dis", "doctest", "inspect", "logging", "pdb", "timeit", "trace", "traceback",
        "tracemalloc", "unittest", "warnings",
    ),
}  # fmt: skip
"""Topic -> the standard library's modules; those this Python lacks are left out."""


class Example(NamedTuple):
    """One docstring."""

    client: str  # the module
    text: str
    label: int  # index into TOPICS


LABEL_SENTENCES = (
    "network protocol, server or message",
    "file, directory or path",
    "number, date or mathematical operation",
    "string, text or markup",
    "thread, process or asynchronous task",
    "test, debugger, log or source code",
)
"""One a topic; the sentence's embedding is where the topic's label embedding starts."""


def _docstrings(source: str) -> Iterator[str]:
    """First paragraphs of all docstrings in a file, white space folded."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and (text := ast.get_docstring(node)):
            yield " ".join(text.split("\n\n")[0].split())


def load(min_words: int = 5) -> list[Example]:
    """Read the examples, in a fixed order: topics, modules, files, place in the file.

    A text that occurs more than once is kept where it occurs first. The examples depend on
    the Python that runs: 3.11 and 3.12 differ in a few per cent of them.

    Args:
      min_words: shorter texts are left out.

    Example:
      >>> examples = load()
      >>> len(examples) > 2000, len({e.client for e in examples}) > 60
      (True, True)
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    seen: set[str] = set()
    examples = []
    for label, modules in enumerate(TOPICS.values()):
        for module in modules:
            paths = [library / f"{module}.py", *sorted((library / module).rglob("*.py"))]
            for path in paths:
                if not path.is_file() or {"test", "tests"} & set(path.parts[len(library.parts) :]):
                    continue
                for text in _docstrings(path.read_text("utf-8")):
                    if len(text.split()) >= min_words and text not in seen:
                        seen.add(text)
                        examples.append(Example(module, text, label))
    return examples
