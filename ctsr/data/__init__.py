"""Training data: volumes, pairs made on the fly, splits by patient."""
