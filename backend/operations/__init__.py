"""Running the process: logs, metrics, traces, health checks and shutdown."""
