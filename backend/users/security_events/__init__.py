"""The receiver of Better Auth's security event tokens (RFC 8417, RFC 8935)."""
