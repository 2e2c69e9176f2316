// The calls of the API. The token is an argument and is not stored here.

// Messages for a person, in place of the API's messages for a program.
const FOR_A_PERSON = {
  unauthorized: "This token is not valid: it is mistyped, was revoked or has expired. “make token” on the platform's machine prints the administrator's token; an administrator makes tokens for others.",
  not_found: "You have no rental with this name or id. “orion ls” lists your rentals.",
};

export class Refused extends Error {
  constructor(status, code, detail) {
    super(detail);
    this.status = status;
    this.code = code;
  }

  // Returns whether the same call may succeed later.
  get mayPass() {
    return this.status === 0 || this.status === 429 || this.status >= 500 || this.code === "not_active";
  }
}

// Returns the rental. An administrator sees all rentals: an own one comes before others with the same name.
export async function findRental(nameOrId, token) {
  const named = `../api/rentals?name=${encodeURIComponent(nameOrId)}`;
  let found = (await ask("GET", named, token)).items;
  if (found.length > 1) {
    const own = (await ask("GET", `${named}&mine=true`, token)).items;
    if (own.length !== 1) throw new Refused(409, "ambiguous", `Several rentals have the name ${nameOrId}: enter an id.`);
    found = own;
  }
  return found[0] ?? (await ask("GET", `../api/rentals/${encodeURIComponent(nameOrId)}`, token));
}

export async function ticketFor(rental, token) {
  return (await ask("POST", `../api/rentals/${encodeURIComponent(rental)}/terminal`, token)).ticket;
}

// Returns whether the platform answers.
export async function answers() {
  try {
    return (await fetch("../healthz", { cache: "no-store" })).ok;
  } catch {
    return false;
  }
}

async function ask(method, path, token) {
  let reply;
  try {
    reply = await fetch(path, { method, headers: { Authorization: `Bearer ${token}` }, cache: "no-store" });
  } catch {
    throw new Refused(0, "unreachable", "The platform cannot be reached.");
  }
  const body = await reply.json().catch(() => ({}));
  if (!reply.ok) throw new Refused(reply.status, body.code, FOR_A_PERSON[body.code] ?? body.detail ?? `The platform answers ${reply.status}.`);
  return body;
}
