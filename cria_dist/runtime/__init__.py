"""Everything that touches Ray. Ray reads its authentication mode when it is imported, so it is set here, before."""

import os

os.environ.setdefault("RAY_AUTH_MODE", "token")
