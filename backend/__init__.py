"""A resource server for Better Auth: it judges tokens, knows its users, and shows each only what is theirs."""

__version__ = "0.1.0"
