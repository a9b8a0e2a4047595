import Link from "next/link";
import { Entrance } from "@/auth/entrance.tsx";

export default function NotFound() {
  return <Entrance title="Page not found" lead="There is no page at this address." below={<Link href="/">Go to your tasks</Link>}>{null}</Entrance>;
}
