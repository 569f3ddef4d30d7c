"""Suites that measure the methods on the zoo, with intervals: `attn-control eval SUITE`."""

from attn_control.eval.suite import Suite, load_suite, suite_names

__all__ = ["Suite", "load_suite", "suite_names"]
