"""The error that ends a benchmark without a result."""


class BenchmarkError(Exception):
    """A server responded incorrectly, or a program is missing; the message says so in one line."""
