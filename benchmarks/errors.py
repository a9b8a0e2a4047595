"""What ends a benchmark without a result."""


class BenchmarkError(Exception):
    """Something does not answer as it must, or is not there; the message says what in one line."""
