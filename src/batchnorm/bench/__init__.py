"""Measure the figures that README and docs state; every raw value is kept."""
