"""Reads the commands and the names that the pages show."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
READMES = (ROOT / "README.md", ROOT / "README.fr.md")
GUIDE = (ROOT / "README.md", ROOT / "docs/usage.md")
"""The English pages with commands to type."""
GUIDE_IN_FRENCH = (ROOT / "README.fr.md", ROOT / "docs/usage.fr.md")
GUIDES = (GUIDE, GUIDE_IN_FRENCH)
PAGES = (*READMES, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def shell_blocks(*pages: Path) -> list[str]:
    """Return the blocks marked as `sh`, in their order."""
    blocks = [block for page in pages for block in _BLOCK.findall(page.read_text())]
    return [text for language, text in blocks if language == "sh"]


def commands(block: str) -> list[str]:
    """Return the commands of a block, one a line, without comments."""
    whole = block.replace("\\\n", " ")
    bare = (" ".join(re.sub(r"(^|\s+)# .*", "", line).split()) for line in whole.splitlines())
    return [line for line in bare if line]


def code(*pages: Path) -> list[str]:
    """Return every command of the shell blocks, and every piece of `code` in the text."""
    shown = [command for block in shell_blocks(*pages) for command in commands(block)]
    return shown + [text for page in pages for text in re.findall(r"`([^`\n]+)`", _BLOCK.sub("", page.read_text()))]
