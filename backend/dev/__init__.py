"""What a developer's machine runs in place of a deployment: PostgreSQL, the issuer, its people. For CLI and tests."""
