"""Each table in the documents, as a command."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see lwcompile.cli: spinning threads distort every timing
