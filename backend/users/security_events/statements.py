"""The statement that records a received security event token."""

from sqlalchemy.dialects.postgresql import insert
from sqlmodel import col

from backend.database import Statement, parameters
from backend.users.security_events.models import ReceivedEvent

# Returns no row for a repeated token. A concurrent delivery of the same token waits until the first one commits.
INSERT_RECEIVED_EVENT = Statement(
    insert(ReceivedEvent)
    .values(parameters(("issuer", "jti")))
    .on_conflict_do_nothing()
    .returning(col(ReceivedEvent.jti))
)
