"""Tasks and tags of the user."""
