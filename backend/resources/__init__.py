"""Common to all owned resources: table columns, responses, pages, value types, idempotency and retention."""
