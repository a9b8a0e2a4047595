import Link from "next/link";
import { Entrance } from "@/auth/entrance.tsx";

export default function NotFound() {
  return <Entrance title="Nothing here" lead="This address leads nowhere." below={<Link href="/">To the tasks</Link>}>{null}</Entrance>;
}
