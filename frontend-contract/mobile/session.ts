/** Who is signed in on this phone: Better Auth's session token in secure storage, and a JWT for it when one is needed. */
import { bearerSession, type TokenSource } from "../client.ts";

/** The keychain or the keystore: expo-secure-store, react-native-keychain. */
export interface SecureStorage {
  get(key: string): Promise<string | null>;
  set(key: string, value: string): Promise<void>;
  delete(key: string): Promise<void>;
}

/** Better Auth's refusal to sign somebody in; `code` is its own, such as INVALID_EMAIL_OR_PASSWORD. */
export class SignInRefused extends Error {
  override readonly name = "SignInRefused";
  readonly status: number;
  readonly code: string;

  constructor(status: number, code: string, message: string) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

type Fetch = (input: string, init?: RequestInit) => Promise<Response>;

interface Kept {
  sessionToken: string;
  person: string;
}

const KEY = "better-auth.session";

export class Session {
  readonly #sources = new Map<string, TokenSource>();
  readonly #authUrl: string;
  readonly #storage: SecureStorage;
  readonly #fetch: Fetch;

  constructor({ authUrl, storage, fetch = globalThis.fetch }: { authUrl: string; storage: SecureStorage; fetch?: Fetch }) {
    this.#authUrl = authUrl.replace(/\/+$/, "");
    this.#storage = storage;
    this.#fetch = fetch;
  }

  /**
   * For `createClient`: the tokens of this person, whose id `person()` and the sign-in return.
   *
   * Throws SignedOut while no one is signed in on this phone, and AnotherPerson while another person is.
   */
  tokenOf(person: string): TokenSource {
    let source = this.#sources.get(person);
    if (!source) {
      const sessionToken = async () => (await this.#kept())?.sessionToken ?? null;
      source = bearerSession({ authUrl: this.#authUrl, fetch: this.#fetch, sessionToken, subject: person });
      this.#sources.set(person, source);
    }
    return source;
  }

  /** The id of who is signed in, also without a network; null when nobody is. */
  async person(): Promise<string | null> {
    return (await this.#kept())?.person ?? null;
  }

  /** Throws SignInRefused. Returns the id of the person. */
  signIn(email: string, password: string): Promise<string> {
    return this.#begin("/sign-in/email", { email, password });
  }

  signUp(email: string, password: string, name: string): Promise<string> {
    return this.#begin("/sign-up/email", { email, password, name });
  }

  signInAnonymously(): Promise<string> {
    return this.#begin("/sign-in/anonymous", {});
  }

  /** Signed out on this phone whatever happens; without a network the session at the issuer lives on until it expires. */
  async signOut(): Promise<void> {
    const kept = await this.#kept();
    await this.#storage.delete(KEY);
    this.#clear();
    if (kept) await this.#post("/sign-out", {}, kept.sessionToken);
  }

  async #begin(path: string, body: object): Promise<string> {
    const response = await this.#post(path, body, (await this.#kept())?.sessionToken);
    const answer = (await response.json().catch(() => ({}))) as { user?: { id: string }; code?: string; message?: string };
    const sessionToken = response.headers.get("set-auth-token");
    if (!response.ok || !answer.user || !sessionToken) {
      const code = answer.code ?? (response.ok ? "NO_BEARER_PLUGIN" : "UNKNOWN");
      throw new SignInRefused(response.status, code, answer.message ?? `Better Auth answered ${response.status}`);
    }
    const kept: Kept = { sessionToken, person: answer.user.id };
    await this.#storage.set(KEY, JSON.stringify(kept));
    this.#clear();
    return kept.person;
  }

  // No cookies are wanted, but React Native may send those that it kept on its own; then Better Auth asks for an Origin.
  #post(path: string, body: object, sessionToken?: string): Promise<Response> {
    const origin = /^https?:\/\/[^/]+/.exec(this.#authUrl)?.[0] ?? "";
    return this.#fetch(this.#authUrl + path, {
      method: "POST",
      headers: {
        "Content-Type": "application/json",
        Origin: origin,
        ...(sessionToken && { Authorization: `Bearer ${sessionToken}` }),
      },
      body: JSON.stringify(body),
      credentials: "omit",
    });
  }

  #clear(): void {
    for (const source of this.#sources.values()) source.clear();
  }

  async #kept(): Promise<Kept | null> {
    const text = await this.#storage.get(KEY);
    return text === null ? null : (JSON.parse(text) as Kept);
  }
}
