"""What is done: segments, paged attention, edits, sampling. All torch of the server lives here."""
