import Link from "next/link";
import { Entrance } from "./entrance.tsx";

/** For somebody whom Better Auth knows and the API turns away. */
export function Suspended() {
  return (
    <Entrance title="Account suspended" lead="You are signed in, but this account may not use the tasks at present. Ask an administrator." below={<Link href="/">Try again</Link>}>
      {null}
    </Entrance>
  );
}
