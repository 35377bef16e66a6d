"""A whole Kubernetes of one node on this host, for tests and for looking around: ``python -m tests.cluster``."""
