// Nginx passes on what is no HTTP as it is, without a header of its own (for HTTP/0.9), and what is only the beginning of an
// answer (1xx) as if it were all of it. A browser would find an answer in what follows, without the sandbox. So an answer
// must have been read as one: then it has the header that a worker's door puts into each.

function isAnAnswer(r) {
  if (!r.variables.upstream_status) return; // Nginx's own
  const switches = r.status === 101 && r.variables.passed_upgrade === "websocket";
  if (!r.variables.upstream_http_x_orion_door || (r.status < 200 && !switches)) {
    throw new Error("this is no answer"); // the connection is closed, and nothing is sent
  }
}

// What the manager says to whom it refuses: it comes in a header (web_asking.conf).

function refusedText(r) {
  return decodeURIComponent(r.variables.web_refused_encoded || "");
}

export default { isAnAnswer, refusedText };
