// The screen: xterm.js, its size, clipboard and links.
// A program in the rental controls the content of the screen. So this page writes no message of its own there, and the
// user has to agree to whatever such a program wants from the browser.

import { LIGHT, DARK } from "./colours.js";

const { Terminal, FitAddon, Unicode11Addon, WebLinksAddon } = globalThis;
const SCROLLBACK_LINES = 5000;
const LARGEST_SIZE = 1000; // columns and rows: the gateway's limit
const LARGEST_COPY = 100_000; // characters that a program may put into the clipboard
// Resets what a lost program has set. CAN ends an incomplete sequence; 47 leaves the alternate screen and, unlike 1049,
// does not restore a cursor that was never saved; then mouse, line feeds, tab stops, cursor, modes and colours.
const LEAVE = "\x18\x1b[?47l\x1b[?9l\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1005l\x1b[?1006l\x1b[?1015l\x1b[?1016l\x1b[?12l" +
  "\x1b[20l\x1b[0 q\x1b]104\x1b\\\x1b]110\x1b\\\x1b]111\x1b\\\x1b]112\x1b\\\x1b]8;;\x1b\\\x1b[!p\x1b[?7h\x1b[0m\x1b[3g";
const CONTROLS = /[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]/g;
const WIDTHS = "11 and later emoji";
// The wide characters since Unicode 12.1.
const LATER_EMOJI = [
  [0x1f6d6, 0x1f6d7], [0x1f6dc, 0x1f6df], [0x1f6fb, 0x1f6fc], [0x1f7f0, 0x1f7f0], [0x1f90c, 0x1f90c], [0x1f972, 0x1f972],
  [0x1f977, 0x1f979], [0x1f9a3, 0x1f9a4], [0x1f9ab, 0x1f9ad], [0x1f9cb, 0x1f9cc], [0x1fa70, 0x1faff],
];
const encoder = new TextEncoder();

export class Screen {
  #terminal;
  #fit;
  #waiting = null; // while the screen is being emptied: the calls to make after that

  // Calls on.typed(bytes); on.resized(columns, rows); on.leave() when the keyboard leaves the terminal; on.copy(text) when
  // a program wants to copy; and on.link(url) when the mouse is over a link, with "" when it is over none.
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
    this.#terminal.parser.registerOscHandler(52, (request) => this.#requestsCopy(request, on));
    place.addEventListener("paste", (event) => this.#paste(event), true);
  }

  get size() {
    return [this.#terminal.cols, this.#terminal.rows];
  }

  // Makes the terminal as large as its place, up to the gateway's limit.
  fit() {
    const { cols, rows } = this.#fit.proposeDimensions() ?? {};
    if (cols && rows) this.#terminal.resize(Math.min(cols, LARGEST_SIZE), Math.min(rows, LARGEST_SIZE));
  }

  show(bytes, shown) {
    this.#inOrder(() => this.#terminal.write(bytes, shown));
  }

  // Empties the screen for the next shell, and moves its lines into the scrollback.
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
        waiting.forEach((call) => this.#inOrder(call));
      });
    });
  }

  // Makes a call now, or after the screen is empty: xterm.js writes asynchronously, and the next shell's output must wait.
  #inOrder(call) {
    if (this.#waiting) this.#waiting.push(call);
    else call();
  }

  focus() {
    this.#terminal.focus();
  }

  set readerMode(on) {
    this.#terminal.options.screenReaderMode = on;
  }

  // Gives each character the width that the shells of a worker assume.
  #useWidths() {
    const { unicode } = this.#terminal;
    const register = (eleven) => unicode.register({
      version: WIDTHS,
      wcwidth: (point) => (LATER_EMOJI.some(([first, last]) => first <= point && point <= last) ? 2 : eleven.wcwidth(point)),
    });
    new Unicode11Addon.Unicode11Addon().activate({ unicode: { register } });
    unicode.activeVersion = WIDTHS;
  }

  // Returns whether the terminal gets this key.
  #key(event, on) {
    const key = event.key.toLowerCase();
    if (event.ctrlKey && key === "f6") {
      if (event.type === "keydown") on.leave();
      return false;
    }
    const copies = event.ctrlKey && !event.altKey && ((event.shiftKey && key === "c") || key === "insert");
    if (!copies) return true;
    event.preventDefault(); // browsers use this key themselves
    if (event.type === "keydown" && this.#terminal.hasSelection()) copy(this.#terminal.getSelection());
    return false;
  }

  // Pastes text without control characters, which could end the bracketed paste or act as typed keys.
  #paste(event) {
    event.preventDefault();
    event.stopPropagation();
    this.#terminal.paste((event.clipboardData?.getData("text/plain") ?? "").replace(CONTROLS, ""));
  }

  // Handles OSC 52: a program may ask to copy, and never reads the clipboard.
  #requestsCopy(request, on) {
    const encoded = request.slice(request.indexOf(";") + 1);
    if (!request.includes(";") || encoded === "?" || encoded.length > 2 * LARGEST_COPY) return true;
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

// Copies text to the clipboard, during a click or a key. (navigator.clipboard does not exist over plain HTTP.)
export function copy(text) {
  document.addEventListener("copy", (event) => {
    event.clipboardData.setData("text/plain", text);
    event.preventDefault();
    event.stopImmediatePropagation();
  }, { once: true, capture: true });
  return document.execCommand("copy");
}

// Opens a link in a new tab without a reference to this page. If its text hides the address, the user has to confirm.
function follow(address, hidden) {
  const url = URL.canParse(address) ? new URL(address) : null;
  if (!["http:", "https:"].includes(url?.protocol)) return;
  if (hidden && !confirm(`Open ${url.href}?`)) return;
  window.open(url.href, "_blank", "noopener,noreferrer");
}
