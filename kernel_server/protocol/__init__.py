"""The contract: what both sides import. Standard library and numpy only."""
