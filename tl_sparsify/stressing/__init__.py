"""Tests of a circuit that it can fail, each beside a control that can fail."""
