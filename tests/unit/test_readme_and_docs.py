"""The pages are true: both languages have the same commands, and all that they name exists."""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from support.readme import GUIDE, GUIDES, PAGES, READMES, ROOT, code, commands, shell_blocks

import orion.manager.api
from orion.cli import app
from orion.manager.settings import Settings

COMPOSE = (ROOT / "docker-compose.yml").read_text()
SERVICES = yaml.safe_load(COMPOSE)["services"]
MANAGER_SETTINGS = {f"ORION_{name.upper()}": field.default for name, field in Settings.model_fields.items()}
SKIPPED = {".git", ".venv", "node_modules", "__pycache__"}

MAX_README_BYTES = 6 << 10
MAX_ARCHITECTURE_BYTES = 10 << 10

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
each_guide = pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide[0].name)


def test_both_languages_give_the_same_commands() -> None:
    english, french = ([commands(block) for block in shell_blocks(*guide)] for guide in GUIDES)
    assert english == french
    assert len(english) >= 6


@pytest.mark.parametrize("page", READMES, ids=lambda page: page.name)
def test_a_readme_is_read_in_five_minutes(page: Path) -> None:
    assert page.stat().st_size <= MAX_README_BYTES


@pytest.mark.parametrize("command", ["make up", "make test"])
def test_the_first_block_of_a_readme_holds_the_two_commands(command: str) -> None:
    for page in READMES:
        assert command in commands(shell_blocks(page)[0])


def block_with(text: str) -> str:
    (block,) = (block for block in shell_blocks(*GUIDE) if text in block)
    return block


def typed(
    script: str, home: Path, shell: Sequence[str] = ("bash",), **programs: str
) -> subprocess.CompletedProcess[str]:
    """Run these lines in a shell, with stand-ins for programs that the machine may not have; return the result."""
    for name, does in programs.items():
        (home / name).write_text(f"#!/bin/sh\n{does}\n")
        (home / name).chmod(0o755)
    environment = {"PATH": f"{home}:{os.environ['PATH']}", "HOME": str(home)}
    return subprocess.run(
        shell, input=script, env=environment, capture_output=True, text=True, check=False,
        timeout=60, start_new_session=True,  # an interactive shell would stop a process in the background
    )  # fmt: skip


@pytest.mark.parametrize("tried", [False, True])
def test_the_proof_of_the_only_entrance_reports_nothing_where_it_tried_nothing(tmp_path: Path, tried: bool) -> None:
    """Nothing is tried where Compose does not know the command, or the platform is not up."""
    script = block_with("echo refused").replace("scripts/compose.sh", "compose")
    inside = 'shift 3; exec "$@"' if tried else "exit 1"
    curl = 'case "$*" in *manager_proxy*) printf ok;; *) exit 56;; esac'
    done = typed(script, tmp_path, compose=inside, curl=curl)
    assert done.stdout == ("ok through the proxy\nrefused\n" if tried else "")
    assert (done.returncode == 0) is tried


def test_the_proof_of_the_only_entrance_fails_where_the_manager_answers(tmp_path: Path) -> None:
    script = block_with("echo refused").replace("scripts/compose.sh", "compose")
    done = typed(script, tmp_path, compose='shift 3; exec "$@"', curl="printf ok")
    assert done.returncode
    assert "refused" not in done.stdout


def test_the_curl_flow_makes_a_key_where_there_is_none(tmp_path: Path) -> None:
    (tmp_path / ".ssh").mkdir()
    lines = [line for line in commands(block_with("$API/rent ")) if "~/.ssh" in line]
    done = typed("\n".join([*lines, 'echo "$KEY"']), tmp_path)
    assert done.stdout.startswith("ssh-ed25519 AAAA"), done.stderr


RENTED = '{"id": "abcdefgh23", "state": "queued", "worker_id": null, "explanation": "no worker has a free slot"}'
REFUSED = '{"status": 409, "code": "%s", "detail": "%s"}'


@pytest.mark.parametrize(
    ("rent", "show", "complaint"),
    [
        (REFUSED % ("name_taken", "you have a rental named lab"), REFUSED % ("not_found", "-"), "a rental named lab"),
        (REFUSED % ("unauthorized", "the token is unknown"),) * 2 + ("the token is unknown",),
        (RENTED, RENTED, "no worker has a free slot"),
        (RENTED, REFUSED % ("not_found", "there is no such rental"), "there is no such rental"),
        ("", "", "was not rented"),
    ],
    ids=["refused", "not let in", "queued", "gone", "no answer"],
)
def test_the_curl_flow_ends_nothing_where_nothing_was_rented(
    tmp_path: Path, rent: str, show: str, complaint: str
) -> None:
    """Each line that fails says why, and the shell stays open."""
    (tmp_path / ".ssh").mkdir()
    script = "\n".join([*commands(block_with("$API/rent ")), "echo the shell goes on"])
    call_log = f"{tmp_path}/asked"
    curl = f"""echo "$*" >> {call_log}; case "$*" in */api/rent) echo '{rent}';; *) echo '{show}';; esac"""
    programs = {"curl": curl, "docker": f'echo "docker $*" >> {call_log}', "make": "echo token"}
    done = typed(script, tmp_path, ("bash", "--norc", "--noprofile", "-i"), **programs)
    assert "the shell goes on" in done.stdout
    assert complaint in "".join(re.findall("^(?:bash|jq): .*", done.stderr, re.MULTILINE)), done.stderr
    calls = (tmp_path / "asked").read_text()
    assert "docker" not in calls
    assert "null" not in calls
    assert not re.search(r"rentals/(\?|$)|rental_id=($|&)|-X DELETE .*rentals/\?", calls, re.MULTILINE)


@each_guide
def test_points_are_numbered_one_after_the_other(guide: Sequence[Path]) -> None:
    text = "".join(page.read_text() for page in guide)
    numbers = [int(number) for number in re.findall(r"^(\d+)\. \*\*", text, re.MULTILINE)]
    assert numbers == list(range(1, 9))


def test_both_languages_name_the_same_files_and_calls() -> None:
    english, french = ({text for text in code(*guide) if re.search(r"\.yml$|^/", text)} for guide in GUIDES)
    assert english - french - {"/r/RENTAL/PORT/"} == set()


@each_guide
def test_a_guide_names_targets_commands_ports_and_paths(guide: Sequence[Path]) -> None:
    """The tests below would pass for pages that name nothing."""
    texts = code(*guide)
    assert any(_targets(text) for text in texts)
    assert any(_calls(text) for text in texts)
    assert {"8080", "8443", "5000"} <= {port for page in guide for port in _ports(page)}
    assert len([path for text in texts for path in _api_paths(text)]) >= 5


@each_page
def test_every_make_target_exists(page: Path) -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {target for text in code(page) for target in _targets(text)} <= targets


@each_page
def test_every_variable_of_make_is_read_somewhere(page: Path) -> None:
    readers = "".join(path.read_text() for path in [ROOT / "Makefile", *(ROOT / "scripts").glob("*.*")])
    for text in code(page):
        if re.search(r"\bmake [a-z]", text):
            for name in re.findall(r"\b([A-Z][A-Z_]+)=[^\s$(]", text):
                assert name in readers + COMPOSE, f"{text}: nothing reads {name}"


@each_page
def test_every_command_and_option_of_orion_exists(page: Path) -> None:
    for text in code(page):
        for call in _calls(text):
            _check_call(call.split())


@each_page
def test_every_environment_variable_is_known(page: Path) -> None:
    known = COMPOSE + "".join(path.read_text() for path in (ROOT / "scripts").glob("*.*"))
    known += (ROOT / "src/orion/login.py").read_text() + (ROOT / "worker/sshd_config").read_text()
    named = set(re.findall(r"\bORION_[A-Z_]*[A-Z]\b", page.read_text()))
    assert {name for name in named if not re.search(rf"\b{name}\b", known)} == set()


def test_each_variable_that_compose_passes_to_the_manager_is_a_setting() -> None:
    handed = {line.split("=")[0] for line in SERVICES["manager_app"]["environment"]}
    assert handed <= set(MANAGER_SETTINGS)


def test_the_defaults_of_the_table_are_the_defaults() -> None:
    table = re.findall(r"^\| (`ORION_.*?) \| (.*?) \|", (ROOT / "docs/operations.md").read_text(), re.MULTILINE)
    shown = {
        name: value
        for names, values in table
        for name, value in zip(re.findall(r"ORION_\w+", names), values.split(", "), strict=True)
    }
    assert {name: _default(name) for name in shown} == shown
    assert len(shown) >= 12


@each_page
def test_every_port_is_published_or_listened_on(page: Path) -> None:
    published = {port for pair in SERVICES["manager_proxy"]["ports"] for port in re.findall(r"\d+", pair)}
    exposed = {port for file in ROOT.glob("*/Dockerfile") for port in _exposed(file)}
    assert _ports(page) <= published | exposed | {str(MANAGER_SETTINGS["ORION_PORT"])}


@each_page
def test_every_path_of_the_api_exists(page: Path) -> None:
    routes = {_without_names(route) for route in _routes()} | {"/api/openapi.json"}
    assert {path for text in code(page) for path in _api_paths(text)} <= routes


@each_page
def test_every_file_exists(page: Path) -> None:
    tree = {str(path.relative_to(ROOT)) for path in _tree()}
    for name in {text for text in code(page) if _is_a_path(text)}:
        inside = {path for path in tree if f"/{path}".endswith("/" + name.strip("/"))}
        assert inside or _is_in_an_image(name), f"{page.name} names {name}"


@each_page
def test_every_link_leads_to_a_file(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists()


@each_page
def test_every_anchor_is_a_heading(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text()):
        text = (page.parent / target if target else page).read_text()
        headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _targets(text: str) -> list[str]:
    return re.findall(r"\bmake (?:-s )?([a-z][a-z0-9-]*)", text)


def _calls(text: str) -> list[str]:
    """Return the words behind each `orion` of a command."""
    return re.findall(r"(?:^|[\s|(])orion((?: +[^\s|)]+)+)", re.sub(r"'[^'\n]*'", "QUOTED", text))


def _ports(page: Path) -> set[str]:
    named = (
        r"(?:localhost|manager_app|manager_proxy|172\.20\.0\.\d+):(\d+)|\bports? (\d+)(?: \(HTTP\) (?:and|et) (\d+))?"
    )
    return {port for groups in re.findall(named, page.read_text()) for port in groups if port}


def _api_paths(text: str) -> set[str]:
    if text.endswith((".py", "/api/")):
        return set()
    whole = re.sub(r"\$\{([A-Z]+):\?[^}]*\}", r"$\1", text.replace("$API", "/api"))
    return {_without_names(path) for path in re.findall(r"/api/[^\s\"'`)|?]+", whole)}


def _check_call(words: list[str]) -> None:
    """Check that the command `orion WORDS` exists and has these options."""
    command = app.commands()
    options = {"-h", "--help", "--json", "--version"}
    while words and hasattr(command, "commands") and not words[0].startswith("-"):
        name = words.pop(0)
        assert name in command.commands, f"there is no orion {name}"
        command = command.commands[name]
        if hasattr(command, "commands"):  # such as the rental in `orion keys RENTAL ls`
            words = words[sum(parameter.param_type_name == "argument" for parameter in command.params) :]
    options |= {option for parameter in command.params for option in parameter.opts}
    for word in words:
        assert not re.match(r"--?[a-z]", word) or word in options, f"orion {command.name} has no {word}"


def _default(variable: str) -> str:
    """Return the default as the table writes it: that of Compose, else the manager's own, else `none`."""
    in_compose = re.search(rf"\$\{{{variable}:-([^}}]*)\}}", COMPOSE)
    if in_compose:
        return in_compose[1] or "none"
    setting = MANAGER_SETTINGS.get(variable)
    if isinstance(setting, int):
        return str(setting)
    return "none" if setting in {None, ""} else f"{setting:g}"


def _exposed(dockerfile: Path) -> list[str]:
    lines = re.findall(r"^EXPOSE (.*)$", dockerfile.read_text(), re.MULTILINE)
    return [port for line in lines for port in line.split()]


def _routes() -> set[str]:
    found = set()
    for module in pkgutil.iter_modules(orion.manager.api.__path__, "orion.manager.api."):
        router = getattr(importlib.import_module(module.name), "router", None)
        found |= {route.path for route in router.routes} if router else set()
    return found


def _without_names(path: str) -> str:
    """Return a path without its parameters: `/api/rentals/$RENTAL` is `/api/rentals/{rental_id}`."""
    return re.sub(r"\{[^}]*\}|\$[A-Z]+", "{}", path.rstrip("/"))


def _tree() -> list[Path]:
    tops = [path for path in ROOT.iterdir() if path.name not in SKIPPED and not path.name.startswith(".")]
    below = [path for top in tops if top.is_dir() for path in top.rglob("*") if not SKIPPED & set(path.parts)]
    return tops + below


def _is_a_path(text: str) -> bool:
    if not re.fullmatch(r"[A-Za-z_/][\w./-]*", text) or text.startswith(("/api/", "/healthz", "text/", "application/")):
        return False
    if text.startswith("/") and "orion" not in text:
        return False  # a path of any Linux, or of the user's own
    return "/" in text or re.search(r"\.(ya?ml|py|sh|conf|md|crt|key|db)$", text) is not None


def _is_in_an_image(name: str) -> bool:
    """Return whether a path is in an image or a volume: code of that image contains it."""
    rooms = [path for room in ("manager_app", "manager_proxy", "worker", "src") for path in (ROOT / room).rglob("*")]
    kinds = {".py", ".sh", ".conf", ""}
    wanted = name.rstrip("/")
    return any(wanted in path.read_text() for path in rooms if path.is_file() and path.suffix in kinds)
