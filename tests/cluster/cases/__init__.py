"""Cases that need a cluster: ``make test-cluster`` runs them, ``make test`` does not."""
