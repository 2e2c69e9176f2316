// Refuse what is not a complete HTTP answer. Nginx forwards bytes that are not HTTP without adding headers (as HTTP/0.9),
// and an interim answer (1xx) as if it were the whole answer. A browser would then read an answer in the following bytes,
// without the sandbox. The worker's port proxy adds the header X-Orion-Door to each complete answer.

function requireAnswer(r) {
  if (!r.variables.upstream_status) return; // an answer of Nginx itself
  const isWebSocket = r.status === 101 && r.variables.passed_upgrade === "websocket";
  if (!r.variables.upstream_http_x_orion_door || (r.status < 200 && !isWebSocket)) {
    throw new Error("not a complete HTTP answer"); // Nginx closes the connection without sending anything
  }
}

// Return the text of the manager's refusal, which is in a header of its answer (web_access.conf).

function refusedText(r) {
  return decodeURIComponent(r.variables.web_refused_encoded || "");
}

export default { requireAnswer, refusedText };
