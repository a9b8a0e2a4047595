/** Sign-in with Better Auth on a phone. The session token is stored in secure storage; JWTs are stored in memory only. */
import { bearerSession, type TokenSource } from "../client.ts";

/** Access to the keychain or keystore, for example with expo-secure-store or react-native-keychain. */
export interface SecureStorage {
  get(key: string): Promise<string | null>;
  set(key: string, value: string): Promise<void>;
  delete(key: string): Promise<void>;
}

/** Better Auth rejected a sign-in or sign-up. `code` is Better Auth's, such as INVALID_EMAIL_OR_PASSWORD. */
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

interface Stored {
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
   * Returns the token source of one user, for `createClient`. person: the id returned by `person()` and the sign-in.
   *
   * Its `token()` throws SignedOut while no user is signed in, and AnotherPerson while another user is.
   */
  tokenOf(person: string): TokenSource {
    let source = this.#sources.get(person);
    if (!source) {
      const sessionToken = async () => (await this.#stored())?.sessionToken ?? null;
      source = bearerSession({ authUrl: this.#authUrl, fetch: this.#fetch, sessionToken, subject: person });
      this.#sources.set(person, source);
    }
    return source;
  }

  /** The id of the signed-in user, or null. Works offline. */
  async person(): Promise<string | null> {
    return (await this.#stored())?.person ?? null;
  }

  /** Signs in and returns the user's id. Throws SignInRefused, or errors of `fetch`. */
  signIn(email: string, password: string): Promise<string> {
    return this.#start("/sign-in/email", { email, password });
  }

  /** Creates an account and returns the user's id. Throws like `signIn`. */
  signUp(email: string, password: string, name: string): Promise<string> {
    return this.#start("/sign-up/email", { email, password, name });
  }

  /** Creates an anonymous account and returns the user's id. Throws like `signIn`. */
  signInAnonymously(): Promise<string> {
    return this.#start("/sign-in/anonymous", {});
  }

  /**
   * Deletes the session token, then ends the session at Better Auth.
   *
   * Throws errors of `fetch`. The user is signed out on this phone even then, but the session stays valid until it expires.
   */
  async signOut(): Promise<void> {
    const stored = await this.#stored();
    await this.#storage.delete(KEY);
    this.#clear();
    if (stored) await this.#post("/sign-out", {}, stored.sessionToken);
  }

  async #start(path: string, body: object): Promise<string> {
    const response = await this.#post(path, body, (await this.#stored())?.sessionToken);
    const answer = (await response.json().catch(() => ({}))) as { user?: { id: string }; code?: string; message?: string };
    const sessionToken = response.headers.get("set-auth-token");
    if (!response.ok || !answer.user || !sessionToken) {
      const code = answer.code ?? (response.ok ? "NO_BEARER_PLUGIN" : "UNKNOWN");
      throw new SignInRefused(response.status, code, answer.message ?? `Better Auth responded with status ${response.status}`);
    }
    const stored: Stored = { sessionToken, person: answer.user.id };
    await this.#storage.set(KEY, JSON.stringify(stored));
    this.#clear();
    return stored.person;
  }

  // React Native may send stored cookies despite `omit`, and Better Auth requires an Origin with cookies.
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

  async #stored(): Promise<Stored | null> {
    const text = await this.#storage.get(KEY);
    return text === null ? null : (JSON.parse(text) as Stored);
  }
}
