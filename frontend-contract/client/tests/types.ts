/** Compile-time tests of the client's types; never executed. */
import { type Client, type components, pages, update } from "../../client.ts";

export async function typed(api: Client): Promise<void> {
  const { data } = await api.POST("/api/v1/tasks", { body: { title: "Buy milk" } });
  const title: string = data.title;
  const status: "todo" | "in_progress" | "done" = data.status;
  const nothing: undefined = (await api.DELETE("/api/v1/tasks/{id}", { params: { path: { id: data.id } } })).data;
  const me: components["schemas"]["Me"] = (await api.GET("/api/v1/users/me")).data;
  for await (const task of pages(api, "/api/v1/tasks", { sort: "-due_at", tag: ["home"] })) task.title.trim();
  void [title, status, nothing, me];

  // @ts-expect-error no such member
  await api.POST("/api/v1/tasks", { body: { title: "x", titel: "y" } });
  // @ts-expect-error no title
  await api.POST("/api/v1/tasks", { body: {} });
  // @ts-expect-error no body
  await api.POST("/api/v1/tasks");
  // @ts-expect-error no such status
  await api.POST("/api/v1/tasks", { body: { title: "x", status: "doing" } });
  // @ts-expect-error no such path
  await api.GET("/api/v1/taks");
  // @ts-expect-error no such method
  await api.PUT("/api/v1/tasks", { body: { title: "x" } });
  // @ts-expect-error no id
  await api.GET("/api/v1/tasks/{id}");
  // @ts-expect-error no such filter
  await api.GET("/api/v1/tasks", { params: { query: { state: "todo" } } });
  // @ts-expect-error not a member of a task
  data.titel;
  // @ts-expect-error null resets a member to its default, and a title has none
  await update(api, data, { title: null });
  // @ts-expect-error set by the server
  await update(api, data, { version: 2 });
  // @ts-expect-error the listing of tags is not paginated
  pages(api, "/api/v1/tags");
  // @ts-expect-error no such sort
  pages(api, "/api/v1/tasks", { sort: "colour" });
  // @ts-expect-error the iterator sets the cursor
  pages(api, "/api/v1/tasks", { cursor: "x" });
}
