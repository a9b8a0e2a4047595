/** Simulates React Native when imported first: removes streaming from `fetch`, and web APIs that React Native lacks. */
const MISSING = ["ReadableStream", "TransformStream", "WritableStream", "TextDecoder", "TextEncoder", "crypto", "structuredClone", "EventSource"];

const web = globalThis as unknown as Record<string, unknown>;
for (const name of MISSING) {
  const real = web[name];
  // Node.js itself still needs them. Stack lines: the message, `calledByUs`, the getter, the caller.
  const calledByUs = () => new Error().stack!.split("\n")[3]?.includes("file:");
  Object.defineProperty(globalThis, name, { configurable: true, get: () => (calledByUs() ? undefined : real) });
}
for (const [type, name] of [[Response, "body"], [Request, "body"], [AbortSignal, "reason"], [AbortSignal, "throwIfAborted"]] as const) {
  delete (type.prototype as unknown as Record<string, unknown>)[name];
}
for (const name of ["any", "timeout"]) delete (AbortSignal as unknown as Record<string, unknown>)[name];
