// The page: a terminal, its rental and its state.

import { Refused, answers, findRental, ticketFor } from "./api.js";
import { Connection } from "./connection.js";
import { Screen, copy } from "./screen.js";

const [NORMAL, OVER, TIME_OVER] = [1000, 4000, 4002];
const RETRY_AFTER_MS = 2000;
// A bar that has just appeared takes no click, which was meant for what was there before.
const CLICKABLE_AFTER_MS = 700;
const KEPT = "terminal"; // the key in sessionStorage, which ends with this tab

const at = (id) => document.getElementById(id);

let screen;
let connection = null;
let rental = ""; // the rental's id, or what was typed for it
let token = ""; // only in memory; empty if the page was opened by a ticket
let resumeKey = ""; // opens the terminal of this rental again, after a reload too
let resumed = false; // whether a resume key was used
let connected = false; // whether there has been a shell
let lost = ""; // the time and the reason of the loss of the last shell
let mayCopy = true; // whether programs may ask to copy
let clickable; // the timer that enables the button Copy

function say(state, message) {
  at("status").dataset.state = state;
  at("status").textContent = message;
}

function notice(message) {
  at("notice").hidden = !message;
  at("notice-text").textContent = message;
}

function lose(reason) {
  if (!connected || lost) return;
  lost = `The shell was lost at ${new Date().toLocaleTimeString()}: ${reason.replace(/\.$/, "")}.`;
  notice(lost);
}

// Shows the whole text that a program wants to copy; a click copies it.
function askToCopy(text) {
  if (!mayCopy) return;
  clearTimeout(clickable);
  at("copy").disabled = true;
  clickable = setTimeout(() => { at("copy").disabled = false; }, CLICKABLE_AFTER_MS);
  at("copying-text").textContent = text.replace(/\p{Cf}/gu, "\ufffd");
  at("copying-what").textContent = `A program in the rental asks to copy ${text.length} characters to your clipboard:`;
  at("copy").onclick = () => {
    copy(text);
    at("copying").hidden = true;
    screen.focus();
  };
  at("copying").hidden = false;
}

function showName(name) {
  at("rental").textContent = name;
  at("rental").title = `id ${rental}`;
  document.title = `${name} · Orion-Sec`;
}

function keep(key, name) {
  resumeKey = key;
  try {
    if (key) sessionStorage.setItem(KEPT, JSON.stringify({ rental, key, name }));
    else sessionStorage.removeItem(KEPT);
  } catch {
    return; // without storage, a reload of the page asks for the token again
  }
}

function kept() {
  try {
    return JSON.parse(sessionStorage.getItem(KEPT));
  } catch {
    return null;
  }
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
  screen ??= new Screen(at("screen"), {
    typed: (bytes) => connection?.type(bytes),
    resized: (columns, rows) => connection?.resize(columns, rows),
    leave: () => at("reader").focus(),
    copy: askToCopy,
    link: (url) => {
      at("target").hidden = !url;
      at("target").textContent = url;
    },
  });
}

// Opens the terminal by a ticket or by the resume key of an earlier terminal of this page.
function open(ticket) {
  showTerminal();
  at("again").hidden = true;
  say("connecting", "Connecting…");
  const mine = new Connection(rental, ticket, screen.size, {
    output: (bytes, shown) => screen.show(bytes, shown),
    state: stateChanged,
    close: (code, reason) => { if (connection === mine) ended(code, reason); },
  });
  connection = mine;
}

function stateChanged({ state, message, name, resume, notice: text }) {
  if (state === "connected") {
    say("connected", "Connected");
    showName(name);
    keep(resume, name);
    if (connected) screen.renew();
    if (lost) notice(`${lost} This is a new shell; scroll up for the output of the lost one.`);
    else if (text) notice(text);
    connected = true;
    lost = "";
    screen.focus();
  } else {
    if (state === "waiting") lose(message);
    say(state, message);
  }
}

function ended(code, reason) {
  connection = null;
  if ([NORMAL, OVER, TIME_OVER].includes(code)) {
    keep("");
    say("ended", reason || "Closed");
    at("again").hidden = false;
  } else if (token || resumeKey) {
    lose(reason || "the connection broke");
    reconnect();
  } else if (connected) {
    keep("");
    say("ended", `${reason || "The connection broke"}. “orion terminal ${at("rental").textContent}” prints an address for a new terminal`);
    at("again").hidden = false;
  } else if (resumed) {
    keep("");
    ask("This terminal cannot be opened again: its resume key expired, or the manager was restarted. “orion terminal RENTAL” prints a new address; or enter a token.");
    say("ended", "Not connected");
  } else {
    ask("This address does not open a terminal any more: it is valid once, for a minute. “orion terminal RENTAL” prints a new address; or enter a token.");
    say("ended", "Not connected");
  }
}

// Connects again with the token or the resume key, until that works or a refusal is final.
async function reconnect() {
  for (;;) {
    try {
      if (token) open(await ticketFor(rental, token));
      else if (await answers()) resume();
      else throw new Refused(0, "unreachable", "The platform cannot be reached.");
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
    await new Promise((done) => setTimeout(done, RETRY_AFTER_MS));
  }
}

// Uses the resume key once. The platform answered just before, so a refusal means that the key has expired.
function resume() {
  const key = resumeKey;
  resumed = true;
  resumeKey = "";
  open(key);
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

at("again").addEventListener("click", () => (token ? reconnect() : ask()));
at("notice-close").addEventListener("click", () => {
  notice("");
  screen.focus();
});
at("refuse").addEventListener("click", () => {
  mayCopy = false;
  at("copying").hidden = true;
  screen.focus();
});
at("reader").addEventListener("change", () => {
  screen.readerMode = at("reader").checked;
  screen.focus();
});

// The ticket is removed from the address bar and from the history before anything else.
const [given, ticket] = location.hash.slice(1).split("/").map(decodeURIComponent);
history.replaceState(null, "", location.pathname);
const before = given ? null : kept();
rental = given || before?.rental || "";
if (given && ticket) open(ticket);
else if (before) {
  showName(before.name);
  showTerminal();
  resumeKey = before.key;
  reconnect();
} else ask();
