// What stands behind the # was never sent anywhere. It is given once, in a form, and leaves the address bar before.

const [rental, port, ticket] = location.hash.slice(1).split("/");
history.replaceState(null, "", location.pathname);
if (rental && port && ticket) {
  const form = document.getElementById("give");
  form.rental.value = rental;
  form.port.value = port;
  form.ticket.value = ticket;
  form.submit();
} else {
  document.getElementById("status").textContent = "There is no ticket in this address: it was opened before, or its end is missing. “orion open RENTAL PORT” prints another one.";
}
