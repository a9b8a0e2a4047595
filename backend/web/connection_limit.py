"""The number of connections that a worker process accepts."""

from functools import lru_cache
from typing import Final

MAX_CONNECTIONS: Final = 10_000  # per worker, if the limit of open files allows it
_OTHER_FILES: Final = 200  # database, Redis, log, listening socket, libraries


@lru_cache(1)
def max_connections() -> int:
    """Raise the limit of open files as far as needed and allowed, and return the number of connections it permits."""
    try:
        import resource
    except ImportError:
        return MAX_CONNECTIONS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + _OTHER_FILES
    if 0 <= soft < wanted:
        soft = wanted if hard < 0 else min(hard, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return min(MAX_CONNECTIONS, soft - _OTHER_FILES) if soft >= 0 else MAX_CONNECTIONS
