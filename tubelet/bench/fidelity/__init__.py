"""Accuracy against tokens, measured: every recipe beside dense, random, oracle and controls."""
