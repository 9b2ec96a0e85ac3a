"""Whole jobs on real data: `inhernet demo digits` and `inhernet demo minilm`, and the published form to compare with."""
