"""The machine under it: files, processes, memory and the terminal."""
