"""Differential privacy at the hospital: ledger, noise, sampling, engine."""
