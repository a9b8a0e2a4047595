"""The development environment: PostgreSQL, the reference issuer and its demo users. Used by the CLI and by tests."""


class DevError(Exception):
    """A tool cannot do its work. The message gives the reason."""
