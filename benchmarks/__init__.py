"""Benchmarks: one file per question, always beside the reference loop in the same run, so that results are ratios."""
