"use client";
import { Failed } from "@/tasks/states.tsx";

export default function Broken({ reset }: { error: Error; reset: () => void }) {
  return <main><Failed again={() => { reset(); window.location.reload(); }} /></main>;
}
