"""This API and its peers, side by side under load: `python3 bootstrap.py bench [--quick]`."""
