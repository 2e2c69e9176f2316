"""The commands and the names that README and docs show, as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
READMES = (ROOT / "README.md", ROOT / "README.fr.md")
PAGES = (*READMES, *sorted((ROOT / "docs").glob("*.md")))

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def shell_blocks(page: Path) -> list[str]:
    """The blocks marked as `sh`, in their order."""
    return [text for language, text in _BLOCK.findall(page.read_text()) if language == "sh"]


def commands(block: str) -> list[str]:
    """One command a line, without comments."""
    whole = block.replace("\\\n", " ")
    bare = (" ".join(re.sub(r"(^|\s+)# .*", "", line).split()) for line in whole.splitlines())
    return [line for line in bare if line]


def code(page: Path) -> list[str]:
    """Every command of the shell blocks, and every piece of `code` in the text."""
    shown = [command for block in shell_blocks(page) for command in commands(block)]
    return shown + re.findall(r"`([^`\n]+)`", _BLOCK.sub("", page.read_text()))
