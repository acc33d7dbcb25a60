"""Everything that touches Ray. Ray reads these when it is imported, so they are set here, before."""

import os

os.environ.setdefault("RAY_AUTH_MODE", "token")
# Ray's switch for desktop systems: a cluster that is started here calls itself 127.0.0.1, so it listens nowhere else
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
