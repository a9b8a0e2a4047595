"""The caller's own tasks."""
