// The two calls that need a token. It is an argument, and kept nowhere here.

// Where the platform speaks to a program, and a person reads it here.
const FOR_A_PERSON = {
  unauthorized: "This token opens nothing: it is mistyped, was revoked, or its time is over. “make token” on the platform's machine prints the administrator's; everybody else gets one from an administrator.",
  not_found: "You have no rental of this name or id. “orion ls” lists yours.",
};

export class Refused extends Error {
  constructor(status, code, detail) {
    super(detail);
    this.status = status;
    this.code = code;
  }

  // Whether the same may be granted a little later.
  get mayPass() {
    return this.status === 0 || this.status === 429 || this.status >= 500 || this.code === "not_active";
  }
}

// An administrator sees everybody's: an own rental goes before others of its name.
export async function findRental(nameOrId, token) {
  const named = `../api/rentals?name=${encodeURIComponent(nameOrId)}`;
  let found = (await ask("GET", named, token)).items;
  if (found.length > 1) {
    const own = (await ask("GET", `${named}&mine=true`, token)).items;
    if (own.length !== 1) throw new Refused(409, "ambiguous", `Several rentals are called ${nameOrId}: give the id of one.`);
    found = own;
  }
  return found[0] ?? (await ask("GET", `../api/rentals/${encodeURIComponent(nameOrId)}`, token));
}

export async function ticketFor(rental, token) {
  return (await ask("POST", `../api/rentals/${encodeURIComponent(rental)}/terminal`, token)).ticket;
}

// Whether the platform does.
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
  const told = await reply.json().catch(() => ({}));
  if (!reply.ok) throw new Refused(reply.status, told.code, FOR_A_PERSON[told.code] ?? told.detail ?? `The platform answers ${reply.status}.`);
  return told;
}
