// One WebSocket to a rental's terminal. src/orion/manager/gateway/terminal.py describes the frames.

const SUBPROTOCOL = "orion.terminal";
const ACK_BYTES = 64 * 1024;
// The most that is on its way to the shell, so that acknowledgements wait behind no more than this.
const IN_FLIGHT_BYTES = 64 * 1024;
const CHUNK_BYTES = 16 * 1024;

export class Connection {
  #socket;
  #shown = 0;
  #waiting = [];
  #inFlight = 0;
  #state = "connecting";
  #size;

  // Calls on.output(bytes, shown), where shown() has to be called when the bytes are on the screen;
  // on.state({state, message}), with the rental's name, a resume key and a notice if the state is "connected";
  // and on.close(code, reason).
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
        const control = JSON.parse(data);
        if ("took" in control) this.#took(control.took);
        else {
          this.#enter(control.state);
          on.state(control);
        }
      } else {
        on.output(new Uint8Array(data), () => this.#acknowledge(data.byteLength));
      }
    });
  }

  // Queues what is typed before the first shell begins; drops what is typed after a shell was lost.
  type(bytes) {
    if (this.#state !== "connecting" && this.#state !== "connected") return;
    this.#waiting.push(bytes);
    this.#send();
  }

  // Sends the size; before the WebSocket is open, keeps the last one for later.
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

  #control(message) {
    if (this.#socket.readyState === WebSocket.OPEN) this.#socket.send(JSON.stringify(message));
  }
}
