"""Faults under load, and what becomes of every attempt meanwhile; ``python -m tests.faults`` runs them from a shell."""
