/** A parser for server-sent events (HTML standard, section 9.2.6). */

export interface StreamEvent {
  type: string;
  data: string;
}

/** Maximum length of an event, in characters. */
const MAX_EVENT_LENGTH = 1024 * 1024;

/** Parses the bytes given to `push` and calls `event` for each complete event. */
export class EventStream {
  /** The `id` of the last event, including events without data. */
  lastEventId: string;
  /** The reconnection time set by the server, in milliseconds. */
  retry: number | null = null;
  readonly #decoder = new TextDecoder();
  readonly #event: (event: StreamEvent) => void;
  #rest = "";
  #afterReturn = false;
  #type = "";
  #data: string[] = [];
  #id: string;
  #length = 0;

  constructor(event: (event: StreamEvent) => void, lastEventId = "") {
    this.#event = event;
    this.lastEventId = this.#id = lastEventId;
  }

  /** Throws RangeError if an event exceeds the maximum length. */
  push(bytes: Uint8Array): void {
    let text = this.#decoder.decode(bytes, { stream: true });
    // A CRLF may be split between two chunks.
    if (this.#afterReturn && text !== "") {
      if (text.startsWith("\n")) text = text.slice(1);
      this.#afterReturn = false;
    }
    if (text.endsWith("\r")) this.#afterReturn = true;
    const lines = (this.#rest + text).split(/\r\n|\r|\n/);
    this.#rest = lines.pop()!;
    for (const line of lines) this.#line(line);
    if (this.#length + this.#rest.length > MAX_EVENT_LENGTH) throw new RangeError("the event is too long");
  }

  #line(line: string): void {
    if (line === "") return this.#dispatch();
    const colon = line.indexOf(":");
    const name = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (name === "data") this.#length += this.#data.push(value) && value.length;
    else if (name === "event") this.#type = value;
    else if (name === "id" && !value.includes("\0")) this.#id = value;
    else if (name === "retry" && /^\d+$/.test(value)) this.retry = Number(value);
  }

  #dispatch(): void {
    this.lastEventId = this.#id;
    const event = { type: this.#type || "message", data: this.#data.join("\n") };
    const complete = this.#data.length > 0;
    this.#type = "";
    this.#data = [];
    this.#length = 0;
    if (complete) this.#event(event);
  }
}
