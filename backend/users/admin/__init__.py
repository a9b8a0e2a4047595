"""Administration of user accounts, and the audit log."""
