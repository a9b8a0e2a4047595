"""Benchmarks of this API and of comparable servers under load: `python3 bootstrap.py bench [--quick]`."""
