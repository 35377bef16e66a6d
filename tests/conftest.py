"""What every test may use: real servers (tests/broker) and the settings of hypothesis."""

from __future__ import annotations

import hypothesis

pytest_plugins = ["tests.broker.fixtures", "tests.kernel.plugin"]

# Machines that run the tests are slow and shared: a deadline would measure the neighbour.
hypothesis.settings.register_profile("bindsnoop", deadline=None, max_examples=60, database=None)
hypothesis.settings.load_profile("bindsnoop")
