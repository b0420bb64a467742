"""Triton operators, one folder each: naive.py is the specification, README.md there the derivation."""
