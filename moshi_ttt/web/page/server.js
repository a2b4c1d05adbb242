// What the server is asked, and the connection of one talk.

import { session } from "./storage.js";

const HANDSHAKE = 0, AUDIO = 1, TEXT = 2, METADATA = 4, ERROR = 5, PING = 6;
const SILENT_FOR = 10_000; // ms without a word from the server, which says something every second
const ASLEEP = 2_000; // ms without a frame of ours: this page did not run
const MOST_WAITING = 8; // frames the network may have taken in and not sent yet

let token = "";

/** The token that the server wants: from `#token=` of the address, or as given in this tab before. */
export function findToken() {
  const fragment = new URLSearchParams(location.hash.slice(1)).get("token");
  if (fragment) {
    setToken(fragment);
    history.replaceState(null, "", location.pathname + location.search);
  }
  token = session.get("token");
  return token;
}

export function setToken(value) {
  token = value.trim();
  session.set("token", token);
}

/** An answer that is not what was asked for, with the server's own sentence. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function ask(path, options = {}) {
  if (/[^!-~]/.test(token)) throw new Refused(401, "the token is wrong"); // no header can hold it
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const answer = await fetch(new URL(`api/${path}`, document.baseURI), { ...options, headers });
  if (answer.ok) return answer;
  const said = await answer.json().catch(() => ({}));
  throw new Refused(answer.status, said.error ?? `The server answers ${answer.status}.`);
}

/** What it is that one can talk to. */
export const model = async () => (await ask("model")).json();

const memoryPath = (name) => `memories/${encodeURIComponent(name)}`;

/** The memory kept under a name, null if there is none. */
export async function findMemory(name) {
  try {
    return await (await ask(memoryPath(name))).json();
  } catch (error) {
    if (error.status === 404) return null;
    throw error;
  }
}

export const deleteMemory = (name) => ask(memoryPath(name), { method: "DELETE" });

/** The file of a memory, as a Blob. */
export const exportMemory = async (name) => (await ask(`${memoryPath(name)}/export`)).blob();

/** One talk: frames out, frames and text in. Begins at once. */
export class Talk {
  /**
   * @param {object} options of the query: rate, user, start, incognito.
   * @param {object} handlers onready(), onaudio(buffer), ontext(text), onmetadata(object), and
   *   onover({ reason, code, begun }) once; reason is the server's own sentence, or "".
   */
  constructor(options, handlers) {
    const url = new URL("api/chat", document.baseURI);
    url.protocol = url.protocol.replace("http", "ws");
    const query = { format: "pcm", readings: "1", ...options, token };
    for (const [key, value] of Object.entries(query)) {
      if (value) url.searchParams.set(key, value);
    }
    this.handlers = handlers;
    this.begun = false;
    this.over = false;
    this.reason = "";
    this.unsent = 0;
    this.lastWord = this.lastFrame = performance.now();
    this.socket = new WebSocket(url);
    this.socket.binaryType = "arraybuffer";
    this.socket.onmessage = ({ data }) => this.receive(data);
    this.socket.onclose = ({ code }) => this.end(code);
  }

  receive(buffer) {
    if (this.over) return;
    this.lastWord = performance.now();
    const bytes = new Uint8Array(buffer);
    const text = () => new TextDecoder().decode(bytes.subarray(1));
    switch (bytes[0]) {
      case HANDSHAKE:
        this.begun = true;
        return this.handlers.onready();
      case AUDIO:
        return this.handlers.onaudio(buffer);
      case TEXT:
        return this.handlers.ontext(text());
      case METADATA:
        return this.handlers.onmetadata(JSON.parse(text()));
      case ERROR:
        this.reason = text();
        return undefined;
      case PING:
        return this.socket.send(new Uint8Array([PING]));
      default:
        return console.warn(`a message of unknown kind ${bytes[0]}`);
    }
  }

  /** Send a frame (kind 1); too late ones are counted in `unsent`, not queued. */
  hear(buffer) {
    if (!this.begun || this.over) return;
    const now = performance.now();
    if (now - this.lastFrame > ASLEEP) this.lastWord = now; // its words wait behind this frame
    this.lastFrame = now;
    if (now - this.lastWord > SILENT_FOR) {
      this.socket.close();
      this.end(1006); // a connection that is gone may take minutes to say so
    } else if (this.socket.bufferedAmount > MOST_WAITING * buffer.byteLength) {
      this.unsent++;
    } else {
      this.socket.send(buffer);
    }
  }

  /** Ask for a save now, under a name if the talk began without. */
  keep(user) {
    const text = JSON.stringify(user ? { type: "keep", user } : { type: "keep" });
    this.socket.send(new Uint8Array([METADATA, ...new TextEncoder().encode(text)]));
  }

  end(code) {
    if (this.over) return;
    this.over = true;
    this.handlers.onover({ reason: this.reason, code, begun: this.begun });
  }

  /** Hang up; `onover` is not called. */
  close() {
    this.over = true;
    this.socket.close();
  }
}
