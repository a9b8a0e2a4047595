"""The statement that records a received security event token."""

from sqlalchemy.dialects.postgresql import insert
from sqlmodel import col

from backend.database import Statement, parameters
from backend.users.models import ReceivedEvent

_INSERT = insert(ReceivedEvent).values(parameters(("issuer", "jti")))
# Returns no row for a repeated token. A concurrent delivery of the same token waits until the first one commits.
INSERT_RECEIVED_EVENT = Statement(_INSERT.on_conflict_do_nothing().returning(col(ReceivedEvent.jti)))
