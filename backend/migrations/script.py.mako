<%!
def code(text):
    """The operations without Alembic's comments, which ask for changes."""
    return "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("# ###")).strip() or "pass"
%>\
"""${message}"""

import sqlalchemy as sa
from alembic import op
${imports if imports else ""}
revision = "${up_revision}"
down_revision = "${down_revision}"


def upgrade() -> None:
    ${upgrades | code}


def downgrade() -> None:
    ${downgrades | code}
