"""What is decided: sessions, pages, breakpoints, edits, scheduling. No torch, no I/O, no clock."""
