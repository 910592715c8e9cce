"""Text that comes with Python: the docstrings of its standard library and its help pages."""

from __future__ import annotations

import ast
import re
import sysconfig
import warnings
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["KINDS", "Docstring", "docstrings", "help_pages"]

#: Modules of the standard library by their purpose, the classes of the demonstration.
KINDS: dict[str, tuple[str, ...]] = {
    "concurrency": (
        *("asyncio", "concurrent", "contextvars", "multiprocessing", "queue", "sched", "selectors", "socketserver"),
        *("subprocess", "threading"),
    ),
    "files": (
        *("bz2", "configparser", "csv", "fileinput", "gzip", "json", "lzma", "pathlib", "pickle", "plistlib", "shutil"),
        *("tarfile", "tempfile", "xml", "zipfile"),
    ),
    "internet": (
        *("email", "ftplib", "html", "http", "imaplib", "ipaddress", "mailbox", "poplib", "smtplib", "socket", "ssl"),
        *("urllib", "wsgiref", "xmlrpc"),
    ),
    "language": (
        *("ast", "bdb", "dis", "doctest", "importlib", "inspect", "pdb", "pickletools", "pkgutil", "pydoc", "symtable"),
        *("tokenize", "traceback", "typing", "unittest"),
    ),
    "numbers": (
        "_pydecimal",
        "_strptime",
        "calendar",
        "colorsys",
        "datetime",
        "fractions",
        "numbers",
        "random",
        "statistics",
    ),
}
_KIND = {module: kind for kind, modules in KINDS.items() for module in modules}
_LEFT_OUT = {
    "__pycache__",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}
_WORDS = range(6, 200)


@attrs.frozen
class Docstring:
    """A text of the documentation.

    Attributes:
        text: its words, in one line.
        module: the top-level module that it is from; "help" for the help pages.
        kind: the purpose of that module, one of `KINDS`; None if they do not list the module.
    """

    text: str
    module: str
    kind: str | None


def docstrings() -> list[Docstring]:
    """Return the docstrings of 6 to 199 words of the standard library, each once, in the order of the files.

    The sources are parsed, not imported. The texts depend on the release of Python, and on its installed parts.
    """
    root = Path(sysconfig.get_path("stdlib"))
    modules: dict[str, str] = {}
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).parts
        if not _LEFT_OUT & set(parts):
            for text in _texts(file):
                modules.setdefault(text, parts[0].removesuffix(".py"))
    return [Docstring(text, module, _KIND.get(module)) for text, module in modules.items()]


def help_pages() -> list[Docstring]:
    """Return the paragraphs of 6 to 199 words of Python's help pages, as pydoc shows them, each once."""
    topics = import_module("pydoc_data.topics").topics
    paragraphs = (_line(part) for page in topics.values() for part in page.split("\n\n"))
    return [Docstring(text, "help", None) for text in dict.fromkeys(p for p in paragraphs if len(p.split()) in _WORDS)]


def _texts(file: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in their strings
        try:
            tree = ast.parse(file.read_bytes())
        except SyntaxError:
            return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = _line(ast.get_docstring(node) or "")
            if len(text.split()) in _WORDS:
                yield text


def _line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()
