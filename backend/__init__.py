"""A resource server for Better Auth: verifies its JWTs and limits each request to the data of its user."""

__version__ = "0.1.0"
