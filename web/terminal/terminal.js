// The page: a terminal, who it belongs to, and what its state is.

import { Refused, answers, findRental, ticketFor } from "./api.js";
import { Connection } from "./connection.js";
import { Screen, copy } from "./screen.js";

const [NORMAL, OVER, TIME_OVER] = [1000, 4000, 4002];
const AGAIN_AFTER_MS = 2000;
// A bar that has just come up takes no click: it was meant for what was there before.
const CLICKABLE_AFTER_MS = 700;
const KEPT = "terminal"; // in sessionStorage: this tab's, and gone with it

const at = (id) => document.getElementById(id);

let screen;
let connection = null;
let rental = ""; // its id, or what was typed for it
let token = ""; // in memory alone; empty where the page was opened by a ticket
let resumeKey = ""; // opens this one rental's terminal again, after a reload too
let resumed = false; // by such a key, after a reload
let connected = false; // to a shell, once at least
let lost = ""; // when and why the shell before this one was
let mayCopy = true; // programs may ask to
let clickable;

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

// What a program wants to copy is shown whole, and copied by a click of the one who has seen it.
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

function named(name) {
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
    return; // the browser keeps nothing for this page: then a reload asks again
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

// By a ticket, or by the resume key that an earlier terminal of this page was given.
function open(ticket) {
  showTerminal();
  at("again").hidden = true;
  say("connecting", "Connecting…");
  const mine = new Connection(rental, ticket, screen.size, {
    output: (bytes, shown) => screen.show(bytes, shown),
    state: heard,
    close: (code, reason) => { if (connection === mine) ended(code, reason); },
  });
  connection = mine;
}

function heard({ state, message, name, resume, notice: word }) {
  if (state === "connected") {
    say("connected", "Connected");
    named(name);
    keep(resume, name);
    if (connected) screen.renew();
    if (lost) notice(`${lost} This is a new one; what the other had shown is above: scroll up.`);
    else if (word) notice(word);
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
    comeBack();
  } else if (connected) {
    keep("");
    say("ended", `${reason || "The connection broke"}. “orion terminal ${at("rental").textContent}” prints an address for another terminal`);
    at("again").hidden = false;
  } else if (resumed) {
    keep("");
    ask("This terminal cannot be opened again: its right ended, or the manager was restarted. Ask for another with “orion terminal RENTAL”, or give a token.");
    say("ended", "Not connected");
  } else {
    ask("This address does not open a terminal any more: it is good once, for a minute. Ask for another with “orion terminal RENTAL”, or give a token.");
    say("ended", "Not connected");
  }
}

// With the token or the resume key, until it works or will never.
async function comeBack() {
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
    await new Promise((done) => setTimeout(done, AGAIN_AFTER_MS));
  }
}

// Once: a refusal says that the key is over, as the platform was there a moment before.
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

at("again").addEventListener("click", () => (token ? comeBack() : ask()));
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

// The ticket leaves the address bar, and the history, before anything else happens.
const [given, ticket] = location.hash.slice(1).split("/").map(decodeURIComponent);
history.replaceState(null, "", location.pathname);
const before = given ? null : kept();
rental = given || before?.rental || "";
if (given && ticket) open(ticket);
else if (before) {
  named(before.name);
  showTerminal();
  resumeKey = before.key;
  comeBack();
} else ask();
