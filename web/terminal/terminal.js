// The page: a terminal, who it belongs to, and what its state is.

import { Refused, findRental, ticketFor } from "./api.js";
import { Connection } from "./connection.js";

const { Terminal, FitAddon } = globalThis;
const [NORMAL, OVER, TIME_OVER] = [1000, 4000, 4002];
const AGAIN_AFTER_MS = 2000;
// Leaves what a program that is gone has set: the other screen, the mouse, pasted text in brackets, colours.
const FRESH = "\x1b[?1049l\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1006l\x1b[?2004l\x1b[!p\x1b[0m";
const LIGHT = {
  background: "#ffffff", foreground: "#1b1f24", cursor: "#0b5fbd", cursorAccent: "#ffffff", selectionBackground: "#b6d6fb",
  black: "#24292f", red: "#b3261e", green: "#1a6f37", yellow: "#7d4e00", blue: "#0b5fbd", magenta: "#8250df", cyan: "#1b6f7a", white: "#6e7781",
  brightBlack: "#57606a", brightRed: "#9b1c15", brightGreen: "#116329", brightYellow: "#633c01", brightBlue: "#0a4f9e", brightMagenta: "#6639ba", brightCyan: "#115a63", brightWhite: "#424a53",
};
const DARK = {
  background: "#11151a", foreground: "#e6e9ed", cursor: "#6cb1ff", cursorAccent: "#11151a", selectionBackground: "#2d4f77",
  black: "#3b444d", red: "#ff8f86", green: "#63d188", yellow: "#f0b04c", blue: "#6cb1ff", magenta: "#d2a8ff", cyan: "#5fd0dc", white: "#c9d1d9",
  brightBlack: "#8b949e", brightRed: "#ffb1aa", brightGreen: "#8be6a6", brightYellow: "#ffd08a", brightBlue: "#9ccbff", brightMagenta: "#e2c5ff", brightCyan: "#94e6ee", brightWhite: "#ffffff",
};

const at = (id) => document.getElementById(id);
const dark = matchMedia("(prefers-color-scheme: dark)");
const encoder = new TextEncoder();

let terminal;
let connection = null;
let rental = "";
let token = ""; // in memory alone; empty where the page was opened by a ticket
let connected = false; // to a shell, once at least

function say(state, message) {
  at("status").dataset.state = state;
  at("status").textContent = message;
}

function note(message) {
  terminal.write(`${FRESH}\r\n\x1b[2m— ${message.replace(/[\x00-\x1f\x7f-\x9f]/g, " ")}\x1b[0m\r\n`);
}

function ask(why = "") {
  at("screen").hidden = at("hint").hidden = at("reader-switch").hidden = at("again").hidden = true;
  at("ask").hidden = false;
  at("why").textContent = why;
  at("name").value ||= rental;
  (at("name").value ? at("token") : at("name")).focus();
}

function showTerminal() {
  at("ask").hidden = true;
  at("screen").hidden = at("hint").hidden = at("reader-switch").hidden = false;
  if (terminal) return;
  terminal = new Terminal({ theme: dark.matches ? DARK : LIGHT, fontSize: 15, scrollback: 5000, cursorBlink: false });
  const fit = new FitAddon.FitAddon();
  terminal.loadAddon(fit);
  terminal.open(at("screen"));
  fit.fit();
  new ResizeObserver(() => requestAnimationFrame(() => fit.fit())).observe(at("screen"));
  dark.addEventListener("change", () => { terminal.options.theme = dark.matches ? DARK : LIGHT; });
  terminal.onResize(({ cols, rows }) => connection?.resize(cols, rows));
  terminal.onData((text) => connection?.type(encoder.encode(text)));
  terminal.onBinary((text) => connection?.type(Uint8Array.from(text, (one) => one.charCodeAt(0))));
  terminal.attachCustomKeyEventHandler((event) => {
    if (!(event.key === "F6" && event.ctrlKey)) return true;
    if (event.type === "keydown") at("reader").focus();
    return false;
  });
}

function open(ticket) {
  showTerminal();
  at("again").hidden = true;
  at("rental").textContent = rental;
  document.title = `${rental} · Orion-Sec`;
  say("connecting", "Connecting…");
  const mine = new Connection(rental, ticket, [terminal.cols, terminal.rows], {
    output: (bytes, shown) => terminal.write(bytes, shown),
    state: (state, message) => heard(state, message),
    close: (code, reason) => { if (connection === mine) ended(code, reason); },
  });
  connection = mine;
}

function heard(state, message) {
  if (state === "connected") {
    say("connected", "Connected");
    if (connected) note("connected again");
    connected = true;
    terminal.focus();
  } else if (state === "waiting") {
    if (at("status").textContent !== message) note(message);
    say("waiting", message);
  } else if (state === "ended") {
    say("ended", message);
    note(message);
  } else {
    say(state, message);
  }
}

function ended(code, reason) {
  connection = null;
  if ([NORMAL, OVER, TIME_OVER].includes(code)) {
    say("ended", reason || "Closed");
    at("again").hidden = false;
  } else if (token) {
    note(reason || "the connection broke");
    comeBack();
  } else if (connected) {
    say("ended", `${reason || "The connection broke"}. For another: orion terminal`);
    at("again").hidden = false;
  } else {
    ask("That address does not open a terminal any more: it is good once, for a minute. Ask for another with “orion terminal”, or give a token.");
    say("ended", "Not connected");
  }
}

// With the token, until it works or will never.
async function comeBack() {
  for (;;) {
    try {
      open(await ticketFor(rental, token));
      return;
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      if (!error.mayPass) {
        token = "";
        say("ended", error.message);
        at("again").hidden = false;
        return;
      }
      say("waiting", error.message);
    }
    await new Promise((done) => setTimeout(done, AGAIN_AFTER_MS));
  }
}

at("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  const [name, given] = [at("name").value.trim(), at("token").value.trim()];
  at("why").textContent = "";
  try {
    const found = await findRental(name, given);
    const ticket = await ticketFor(found.id, given);
    [rental, token] = [found.id, given];
    at("token").value = "";
    open(ticket);
  } catch (error) {
    at("why").textContent = error.message;
  }
});

at("again").addEventListener("click", () => (token ? comeBack() : ask()));
at("reader").addEventListener("change", () => {
  terminal.options.screenReaderMode = at("reader").checked;
  terminal.focus();
});

// The ticket leaves the address bar, and the history, before anything else happens.
const [given, ticket] = location.hash.slice(1).split("/").map(decodeURIComponent);
history.replaceState(null, "", location.pathname);
rental = given;
if (given && ticket) open(ticket);
else ask();
