"""The server side of Djinn. Importing this package imports nothing: the client needs the contract alone."""
