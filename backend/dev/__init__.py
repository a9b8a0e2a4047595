"""The development environment: PostgreSQL, the reference issuer and its demo users. Used by the CLI and by tests."""
