"""Nested weights: of every half-precision matrix, codes of eight bits that stay in memory, and the bits that they lack (docs/nested.md)."""
