import Link from "next/link";
import { Entrance } from "./entrance.tsx";

/** Shown when Better Auth accepts the session and the API returns 403. */
export function Suspended() {
  return (
    <Entrance title="Account suspended" lead="You are signed in, but this account cannot access its tasks. Contact an administrator." below={<Link href="/">Try again</Link>}>
      {null}
    </Entrance>
  );
}
