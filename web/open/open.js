// Opens a web port. A browser sends no part of the address after the #. This page removes it from the address bar, and
// then posts the ticket once, in a form.

const [rental, port, ticket] = location.hash.slice(1).split("/");
history.replaceState(null, "", location.pathname);
if (rental && port && ticket) {
  const form = document.getElementById("give");
  form.rental.value = rental;
  form.port.value = port;
  form.ticket.value = ticket;
  form.submit();
} else {
  document.getElementById("status").textContent = "This address contains no ticket: it was opened before, or its end is missing. “orion open RENTAL PORT” prints a new address.";
}
