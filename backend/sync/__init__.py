"""Delta sync and live updates of owned resources."""
