"""The notebooks, and the harness by which the evaluation ones are run and judged."""
