"""What several test files use: models, servers, runs. Nothing here is a test."""

import os
from pathlib import Path

FULL = os.environ.get("SPECREJ_TEST_FULL") == "1"
"""Whether the long counts are asked for (`make test-slow`)."""

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
"""The checkout."""
GOLDEN = TESTS / "golden"
"""Numbers and records that today's code is held to."""
