"""The server side of Djinn. Importing it imports nothing: the client needs the contract alone."""
