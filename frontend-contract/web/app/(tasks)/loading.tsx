import { Mark } from "@/app/icons.tsx";
import { SkeletonRows } from "@/tasks/states.tsx";
import board from "@/tasks/board.module.css";
import sidebar from "@/tasks/sidebar.module.css";

export default function Loading() {
  return (
    <div className={board.page}>
      <div className={sidebar.sidebar}>
        <header className={sidebar.top}><span className={sidebar.brand}><Mark /> Tasks</span></header>
      </div>
      <main className={board.main}>
        <div className={board.column}>
          <h1 className={board.waiting}>Tasks</h1>
          <SkeletonRows />
        </div>
      </main>
    </div>
  );
}
