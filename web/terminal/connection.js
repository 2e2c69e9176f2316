// One WebSocket to a rental's terminal. What the frames are: src/orion/manager/gateway/terminal.py.

const SUBPROTOCOL = "orion.terminal";
const ACK_BYTES = 64 * 1024;
// On the way to the shell at most: what this page acknowledges must never stand behind more than that.
const IN_FLIGHT_BYTES = 64 * 1024;
const CHUNK_BYTES = 16 * 1024;

export class Connection {
  #socket;
  #shown = 0;
  #waiting = [];
  #inFlight = 0;
  #state = "connecting";
  #size;

  // on.output(bytes, shown): shown() is called when they are on the screen; on.state({state, message});
  // where it is connected also the rental's name, a key to resume by, and a notice if any; on.close(code, reason)
  constructor(rental, ticket, size, on) {
    const url = new URL(`../api/rentals/${encodeURIComponent(rental)}/terminal`, location.href);
    url.protocol = location.protocol === "https:" ? "wss:" : "ws:";
    this.#size = size;
    url.search = new URLSearchParams({ columns: size[0], rows: size[1] });
    this.#socket = new WebSocket(url, [SUBPROTOCOL, ticket]);
    this.#socket.binaryType = "arraybuffer";
    this.#socket.addEventListener("open", () => this.resize(...this.#size));
    this.#socket.addEventListener("close", (event) => on.close(event.code, event.reason));
    this.#socket.addEventListener("message", ({ data }) => {
      if (typeof data === "string") {
        const told = JSON.parse(data);
        if ("took" in told) this.#took(told.took);
        else {
          this.#enter(told.state);
          on.state(told);
        }
      } else {
        on.output(new Uint8Array(data), () => this.#acknowledge(data.byteLength));
      }
    });
  }

  // What is typed before the first shell is there waits for it; what is typed while one is lost is meant for nobody.
  type(bytes) {
    if (this.#state !== "connecting" && this.#state !== "connected") return;
    this.#waiting.push(bytes);
    this.#send();
  }

  // Before it is open the size waits; then the last one counts.
  resize(columns, rows) {
    this.#size = [columns, rows];
    this.#control({ resize: [columns, rows] });
  }

  close() {
    this.#socket.close(1000);
  }

  #enter(state) {
    this.#state = state;
    if (state === "connected") this.#send();
    else this.#waiting = [];
  }

  #took(count) {
    this.#inFlight -= count;
    this.#send();
  }

  #send() {
    const open = this.#state === "connected" && this.#socket.readyState === WebSocket.OPEN;
    while (open && this.#waiting.length && this.#inFlight < IN_FLIGHT_BYTES) {
      const first = this.#waiting.shift();
      if (first.length > CHUNK_BYTES) this.#waiting.unshift(first.subarray(CHUNK_BYTES));
      const chunk = first.subarray(0, CHUNK_BYTES);
      this.#inFlight += chunk.length;
      this.#socket.send(chunk);
    }
  }

  #acknowledge(count) {
    this.#shown += count;
    if (this.#shown < ACK_BYTES) return;
    this.#control({ ack: this.#shown });
    this.#shown = 0;
  }

  #control(said) {
    if (this.#socket.readyState === WebSocket.OPEN) this.#socket.send(JSON.stringify(said));
  }
}
