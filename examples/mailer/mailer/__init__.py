"""An email pipeline on streamworker, small and complete: see the README beside it."""
