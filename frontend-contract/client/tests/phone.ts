/** Loaded first, makes of Node.js what React Native is: a fetch without streams, and none of the newer parts of the web. */
const MISSING = ["ReadableStream", "TransformStream", "WritableStream", "TextDecoder", "TextEncoder", "crypto", "structuredClone", "EventSource"];

const web = globalThis as unknown as Record<string, unknown>;
for (const name of MISSING) {
  const real = web[name];
  // Node.js itself goes on to use them. The stack: the message, `ours`, `get`, who asks.
  const ours = () => new Error().stack!.split("\n")[3]?.includes("file:");
  Object.defineProperty(globalThis, name, { configurable: true, get: () => (ours() ? undefined : real) });
}
for (const [type, name] of [[Response, "body"], [Request, "body"], [AbortSignal, "reason"], [AbortSignal, "throwIfAborted"]] as const) {
  delete (type.prototype as unknown as Record<string, unknown>)[name];
}
for (const name of ["any", "timeout"]) delete (AbortSignal as unknown as Record<string, unknown>)[name];
