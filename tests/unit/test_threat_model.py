"""docs/threat-model.md: each defence names the test that is the attack, and that test exists."""

from __future__ import annotations

import re
from pathlib import Path

from support.readme import READMES, ROOT

PAGE = ROOT / "docs/threat-model.md"
ATTACKERS = ("Somebody outside", "A client", "A renter", "A compromised worker", "Somebody in orion_net", "A thief")


def sections() -> dict[str, str]:
    return dict(part.split("\n", 1) for part in PAGE.read_text().split("\n## ")[1:])


def functions_of(folder: Path) -> set[str]:
    return {name for file in folder.rglob("*.py") for name in re.findall(r"def (test_\w+)\(", file.read_text())}


def test_each_test_that_the_threat_model_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", PAGE.read_text()))
    assert named - functions_of(ROOT / "tests") == set()
    assert len(named) > 80


def test_each_defence_names_the_test_that_shows_it() -> None:
    tables = [text for title, text in sections().items() if title != "What is to be protected"]
    rows = [line for text in tables for line in text.splitlines() if line.startswith("| ") and "shown by" not in line]
    assert [row for row in rows if not re.search(r"`test_\w+` ?\|$|`test_\w+`,.*\|$", row)] == []
    assert len(rows) > 40


def test_each_attacker_has_a_section_that_says_what_is_not_defended() -> None:
    found = sections()
    for attacker in (*ATTACKERS, "The operator's own mistakes"):
        (title,) = (title for title in found if title.startswith(attacker))
        assert "**Not defended.**" in found[title], title


def test_each_attack_is_on_the_page_of_the_threat_model() -> None:
    """The attacks are the tests of tests/integration/test_attacks_*.py; variations of a named test need no place."""
    page = PAGE.read_text()
    for file in (ROOT / "tests/integration").glob("test_attacks_*.py"):
        attacks = re.findall(r"def (test_\w+)\(", file.read_text())
        named = [name for name in attacks if f"`{name}`" in page]
        assert len(named) >= len(attacks) / 2, file.name


def test_both_readmes_link_to_the_threat_model() -> None:
    for readme in READMES:
        assert "(docs/threat-model.md)" in readme.read_text()
