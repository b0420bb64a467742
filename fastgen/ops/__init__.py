"""Triton operators, one folder per operator. In each, naive.py is the specification and README.md the derivation."""
