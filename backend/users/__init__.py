"""The current user, and the administration of users."""
