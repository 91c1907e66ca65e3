// The web socket to the server: messages in and out, and a new one when it breaks.

/** Header and blobs of a binary message (vla_perception/view/wire.py). */
export function unpack(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const start = 4 + length;
  header.bytes = (number) => {
    const [offset, size] = header.blobs[number];
    return new Uint8Array(buffer, start + offset, size);
  };
  header.floats = (number) => {
    const [offset, size] = header.blobs[number];
    return new Float32Array(buffer, start + offset, size / 4);
  };
  return header;
}

export class Connection {
  /** `onMessage(message)` gets objects that have a `type`; `onState(connected)` is called when that changes. */
  constructor(onMessage, onState) {
    this.onMessage = onMessage;
    this.onState = onState;
    this.open();
  }

  open() {
    const address = new URL("socket", location.href);
    address.protocol = address.protocol.replace("http", "ws");
    address.search = location.search; // the key, where the server wants one
    this.socket = new WebSocket(address);
    this.socket.binaryType = "arraybuffer";
    this.socket.onopen = () => this.onState(true);
    this.socket.onmessage = (event) =>
      this.onMessage(typeof event.data === "string" ? JSON.parse(event.data) : unpack(event.data));
    this.socket.onclose = () => {
      this.onState(false);
      setTimeout(() => this.open(), 1000);
    };
  }

  send(message) {
    if (this.socket.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify(message));
  }
}
