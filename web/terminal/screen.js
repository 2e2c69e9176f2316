// The screen: xterm.js, its size, and what goes between it and the browser (clipboard, links).
// A program in the rental decides what stands on the screen. So nothing of ours is ever written there, and what such a
// program wants of the browser is asked of the one who sits before it.

import { LIGHT, DARK } from "./colours.js";

const { Terminal, FitAddon, Unicode11Addon, WebLinksAddon } = globalThis;
const SCROLLBACK_LINES = 5000;
const LARGEST_SIZE = 1000; // columns and rows, as the gateway has it
const LARGEST_COPY = 100_000; // characters that a program may put into the clipboard
// Leaves what a program that is gone has set. CAN ends a half sequence; 47 leaves the other screen and, unlike 1049, moves
// the cursor to no place that was never saved; then the mouse, line feeds, tab stops, cursor, modes and colours.
const LEAVE = "\x18\x1b[?47l\x1b[?9l\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1005l\x1b[?1006l\x1b[?1015l\x1b[?1016l\x1b[?12l" +
  "\x1b[20l\x1b[0 q\x1b]104\x1b\\\x1b]110\x1b\\\x1b]111\x1b\\\x1b]112\x1b\\\x1b]8;;\x1b\\\x1b[!p\x1b[?7h\x1b[0m\x1b[3g";
const CONTROLS = /[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]/g;
const WIDTHS = "11 and later emoji";
// The wide ones since Unicode 12.1.
const LATER_EMOJI = [
  [0x1f6d6, 0x1f6d7], [0x1f6dc, 0x1f6df], [0x1f6fb, 0x1f6fc], [0x1f7f0, 0x1f7f0], [0x1f90c, 0x1f90c], [0x1f972, 0x1f972],
  [0x1f977, 0x1f979], [0x1f9a3, 0x1f9a4], [0x1f9ab, 0x1f9ad], [0x1f9cb, 0x1f9cc], [0x1fa70, 0x1faff],
];
const encoder = new TextEncoder();

export class Screen {
  #terminal;
  #fit;
  #waiting = null; // while the screen is being emptied: what comes after that

  // on.typed(bytes); on.resized(columns, rows); on.leave(): the keyboard goes elsewhere; on.copy(text): a program wants to copy;
  // on.link(url): the mouse is over a link, or over none
  constructor(place, on) {
    const dark = matchMedia("(prefers-color-scheme: dark)");
    const link = {
      activate: (_, url) => follow(url, true),
      hover: (_, url) => on.link(url),
      leave: () => on.link(""),
    };
    this.#terminal = new Terminal({
      theme: dark.matches ? DARK : LIGHT, fontSize: 15, scrollback: SCROLLBACK_LINES, cursorBlink: false,
      macOptionClickForcesSelection: true, linkHandler: link, allowProposedApi: true, // the widths of characters are one
    });
    dark.addEventListener("change", () => { this.#terminal.options.theme = dark.matches ? DARK : LIGHT; });
    this.#fit = new FitAddon.FitAddon();
    this.#terminal.loadAddon(this.#fit);
    this.#useWidths();
    this.#terminal.loadAddon(new WebLinksAddon.WebLinksAddon((_, url) => follow(url, false), { hover: link.hover, leave: link.leave }));
    this.#terminal.open(place);
    this.fit();
    new ResizeObserver(() => requestAnimationFrame(() => this.fit())).observe(place);
    this.#terminal.onResize(({ cols, rows }) => on.resized(cols, rows));
    this.#terminal.onData((text) => on.typed(encoder.encode(text)));
    this.#terminal.onBinary((text) => on.typed(Uint8Array.from(text, (one) => one.charCodeAt(0))));
    this.#terminal.attachCustomKeyEventHandler((event) => this.#key(event, on));
    this.#terminal.parser.registerOscHandler(52, (asked) => this.#asksToCopy(asked, on));
    place.addEventListener("paste", (event) => this.#paste(event), true);
  }

  get size() {
    return [this.#terminal.cols, this.#terminal.rows];
  }

  // As large as its place. A window of thousands of columns has the most that the gateway takes.
  fit() {
    const { cols, rows } = this.#fit.proposeDimensions() ?? {};
    if (cols && rows) this.#terminal.resize(Math.min(cols, LARGEST_SIZE), Math.min(rows, LARGEST_SIZE));
  }

  show(bytes, shown) {
    this.#inOrder(() => this.#terminal.write(bytes, shown));
  }

  // An empty screen for the next shell, as a new terminal has it; what stood on it is in the lines above.
  renew() {
    this.#inOrder(() => {
      this.#waiting = [];
      this.#terminal.write(encoder.encode(LEAVE), () => {
        const { buffer, cols, rows } = this.#terminal;
        let used = rows;
        while (used && !buffer.normal.getLine(buffer.normal.baseY + used - 1)?.translateToString(true)) used -= 1;
        let stops = "";
        for (let column = 9; column <= cols; column += 8) stops += `\x1b[${column}G\x1bH`;
        this.#terminal.write(`\x1b[${rows};1H${"\n".repeat(used)}\x1b[2J${stops}\x1b[H`);
        this.#terminal.scrollToBottom();
        const waiting = this.#waiting;
        this.#waiting = null;
        waiting.forEach((what) => this.#inOrder(what));
      });
    });
  }

  // What the next shell says must not come before the screen is empty: the terminal reads what it is given a moment later.
  #inOrder(what) {
    if (this.#waiting) this.#waiting.push(what);
    else what();
  }

  focus() {
    this.#terminal.focus();
  }

  set readerMode(on) {
    this.#terminal.options.screenReaderMode = on;
  }

  // As wide as the shells of a worker take each character to be.
  #useWidths() {
    const { unicode } = this.#terminal;
    const register = (eleven) => unicode.register({
      version: WIDTHS,
      wcwidth: (point) => (LATER_EMOJI.some(([first, last]) => first <= point && point <= last) ? 2 : eleven.wcwidth(point)),
    });
    new Unicode11Addon.Unicode11Addon().activate({ unicode: { register } });
    unicode.activeVersion = WIDTHS;
  }

  // Whether the terminal gets this key.
  #key(event, on) {
    const key = event.key.toLowerCase();
    if (event.ctrlKey && key === "f6") {
      if (event.type === "keydown") on.leave();
      return false;
    }
    const copies = event.ctrlKey && !event.altKey && ((event.shiftKey && key === "c") || key === "insert");
    if (!copies) return true;
    event.preventDefault(); // a browser has other plans with it
    if (event.type === "keydown" && this.#terminal.hasSelection()) copy(this.#terminal.getSelection());
    return false;
  }

  // Without what would end the brackets around it, or type for the one who pastes.
  #paste(event) {
    event.preventDefault();
    event.stopPropagation();
    this.#terminal.paste((event.clipboardData?.getData("text/plain") ?? "").replace(CONTROLS, ""));
  }

  // OSC 52: a program may ask to copy, and never to read.
  #asksToCopy(asked, on) {
    const encoded = asked.slice(asked.indexOf(";") + 1);
    if (!asked.includes(";") || encoded === "?" || encoded.length > 2 * LARGEST_COPY) return true;
    try {
      const bytes = Uint8Array.from(atob(encoded), (one) => one.charCodeAt(0));
      const text = new TextDecoder("utf-8", { fatal: true }).decode(bytes).replace(CONTROLS, "");
      if (text && text.length <= LARGEST_COPY) on.copy(text);
    } catch {
      return true; // neither base64 nor text
    }
    return true;
  }
}

// Into the clipboard, from within a click or a key. (navigator.clipboard is not there over plain HTTP.)
export function copy(text) {
  document.addEventListener("copy", (event) => {
    event.clipboardData.setData("text/plain", text);
    event.preventDefault();
    event.stopImmediatePropagation();
  }, { once: true, capture: true });
  return document.execCommand("copy");
}

// In a new tab that knows nothing of this page. Text that hides where it leads is asked about first.
function follow(address, hidden) {
  const url = URL.canParse(address) ? new URL(address) : null;
  if (!["http:", "https:"].includes(url?.protocol)) return;
  if (hidden && !confirm(`Open ${url.href}?`)) return;
  window.open(url.href, "_blank", "noopener,noreferrer");
}
